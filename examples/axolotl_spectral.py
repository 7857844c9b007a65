"""Train scales or cores with axolotl (0.19): a plugin that adds `adapter: spectral`.

    plugins: [axolotl_spectral.SpectralPlugin]   # this file beside the YAML, and the folder in PYTHONPATH
    adapter: spectral
    spectral: {factorized: factorized, train: scales}
    lora_model_dir:                              # optional: an adapter of an earlier run, to continue with it

All other keys that begin with `lora_` have no effect. Afterwards run `surgery fold FACTORIZED OUTPUT_DIR`.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from surgery.peft import SpectralConfig


class SpectralArgs(BaseModel):
    """The key ``spectral`` of the YAML: the fields of ``SpectralConfig``."""

    spectral: dict[str, Any] | None = None


class SpectralPlugin(BasePlugin):
    """Adds the adapter. axolotl imports the class by its name under ``plugins``."""

    def get_input_args(self) -> str:
        return f"{__name__}.SpectralArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="spectral")]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        if cfg.adapter != "spectral":
            return None
        config = SpectralConfig(**dict(cfg.spectral), task_type="CAUSAL_LM")
        if config_only:  # axolotl's DPO, IPO and KTO: TRL makes the adapter
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config
