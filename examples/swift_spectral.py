"""Train scales or cores with ms-swift (4.6): an external plugin that adds `--tuner_type spectral`.

    FACTORIZED=factorized swift sft --external_plugins examples/swift_spectral.py --tuner_type spectral --model MODEL ...
    TRAIN=core ...                                    # cores instead of scales
    ... --adapters output/checkpoint-500              # to continue an earlier run

Afterwards run `surgery fold FACTORIZED output/checkpoint-500`.
"""

import os
from typing import Any

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from surgery.peft import SpectralConfig


class SpectralTuner(PeftTuner):
    """PEFT saves and loads the adapter; this class only makes it."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        train = os.environ.get("TRAIN", "scales")
        return get_peft_model(model, SpectralConfig(factorized=os.environ["FACTORIZED"], train=train, task_type="CAUSAL_LM"))


tuners_map["spectral"] = SpectralTuner
