"""A model without weights, for what has to be known of its modules when only its folder is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import MissingExtra, SourceError
from surgery.format.files import read_json_object
from surgery.names import CONFIG_FILE


def skeleton(folder: Path) -> nn.Module | None:
    """The model that a folder loads as, on the meta device; None if it is none of transformers' models.

    Raises:
        MissingExtra: transformers is not installed.
        SourceError: transformers does not know the model, or only by code that comes with it.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path, str(path)) if path.is_file() else {}
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        return None
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(
            "names of modules are found with transformers, which is not installed", hint="pip install 'model-surgery[train]'"
        ) from error
    kind: Any = getattr(transformers, names[0], None)
    if kind is None or not hasattr(kind, "config_class"):
        raise SourceError(f"{folder}: transformers has no model {names[0]!r}", hint="fold, and adapt the folded model")
    try:
        described = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # What the checkpoint is quantized with is no part of the shapes.
        if hasattr(described, "quantization_config"):
            del described.quantization_config
        with torch.device("meta"):
            model: nn.Module = kind(described)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, ImportError) as error:
        raise SourceError(f"{folder}: transformers cannot make a {names[0]} from its config", got=error) from error
    return model.eval()
