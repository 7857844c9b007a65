"""Surgery on model checkpoints: factorize weights by truncated SVD, train only scales, fold them back.

    surgery.factorize("model/", "factorized/", rank=16)
    surgery.fold("factorized/", "scales.safetensors", "folded/")

Names are imported when first used, so that ``surgery --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

#: By this the package is told from another project's of the same name, see ``surgery.installation``.
__distribution__ = "model-surgery"

if TYPE_CHECKING:
    from surgery.errors import SurgeryError
    from surgery.format.manifest import Manifest
    from surgery.linalg.energy import energy_svd
    from surgery.linalg.svd import Certificate, TruncatedSVD, truncated_svd
    from surgery.operations.blend import BlendReport, blend
    from surgery.operations.export import ExportReport, export
    from surgery.operations.factorize import factorize, plan
    from surgery.operations.fold import FoldReport, fold
    from surgery.operations.project import ProjectReport, project
    from surgery.operations.recommend import Recommendation, recommend
    from surgery.operations.spectra import spectra
    from surgery.operations.verify import VerifyReport, verify
    from surgery.training.attach import Scales, attach
    from surgery.training.trainer import SaveScales

_HOMES = {
    "BlendReport": "surgery.operations.blend",
    "Certificate": "surgery.linalg.svd",
    "ExportReport": "surgery.operations.export",
    "FoldReport": "surgery.operations.fold",
    "Manifest": "surgery.format.manifest",
    "ProjectReport": "surgery.operations.project",
    "Recommendation": "surgery.operations.recommend",
    "SaveScales": "surgery.training.trainer",
    "Scales": "surgery.training.attach",
    "SurgeryError": "surgery.errors",
    "TruncatedSVD": "surgery.linalg.svd",
    "attach": "surgery.training.attach",
    "blend": "surgery.operations.blend",
    "energy_svd": "surgery.linalg.energy",
    "export": "surgery.operations.export",
    "factorize": "surgery.operations.factorize",
    "fold": "surgery.operations.fold",
    "plan": "surgery.operations.factorize",
    "project": "surgery.operations.project",
    "recommend": "surgery.operations.recommend",
    "spectra": "surgery.operations.spectra",
    "truncated_svd": "surgery.linalg.svd",
    "VerifyReport": "surgery.operations.verify",
    "verify": "surgery.operations.verify",
}

__all__ = [
    "BlendReport",
    "Certificate",
    "ExportReport",
    "FoldReport",
    "Manifest",
    "ProjectReport",
    "Recommendation",
    "SaveScales",
    "Scales",
    "SurgeryError",
    "TruncatedSVD",
    "VerifyReport",
    "__version__",
    "attach",
    "blend",
    "energy_svd",
    "export",
    "factorize",
    "fold",
    "plan",
    "project",
    "recommend",
    "spectra",
    "truncated_svd",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'surgery' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
