"""What a model's config says of it as a whole: where the config is, and which part of a diffusion pipeline the model is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.names import CONFIG_FILE
from surgery.source.protocol import Source


def config_folder(source: Source) -> Path | None:
    """The folder on this machine with the ``config.json`` of a model; None if it has none."""
    return source.fetch(CONFIG_FILE).parent if CONFIG_FILE in source.selection.others else None


def component_of(source: Source) -> str | None:
    """Which part of a diffusion pipeline the model is, such as ``unet``; None for any other model."""
    return component_in(source.config(), source.record.subfolder)


def component_in(config: Mapping[str, Any], subfolder: str | None) -> str | None:
    """The same, by the model's config and the folder of a repository that it was in."""
    if subfolder is not None:
        last = subfolder.rpartition("/")[2]
        return last if "_diffusers_version" in config or last.startswith("text_encoder") else None
    kind = config.get("_class_name")
    if not isinstance(kind, str):
        return None
    return "unet" if "UNet" in kind else "transformer" if "Transformer" in kind else "vae" if "Autoencoder" in kind else kind
