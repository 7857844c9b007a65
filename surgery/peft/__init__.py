"""Scales and cores as a method of PEFT. Import it before you make or load such an adapter.

    import surgery.peft

    model = peft.get_peft_model(model, surgery.peft.SpectralConfig(factorized="factorized"))

The method is called SPECTRAL. Everything that takes a ``peft_config``, such as the trainers of TRL, takes this one.
"""

from surgery.peft.installed import check_peft

check_peft()

from surgery.peft.config import SpectralConfig  # noqa: E402
from surgery.peft.tuner import SpectralModel, register, scales_of  # noqa: E402

register()

__all__ = ["SpectralConfig", "SpectralModel", "scales_of"]
