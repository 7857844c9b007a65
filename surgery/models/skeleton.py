"""The skeleton of a model: its modules without weights, made from the config in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import SourceError
from surgery.files.json_files import read_json_object
from surgery.models.transformers_api import imported, tie
from surgery.names import CONFIG_FILE


def skeleton(folder: Path, *, exact: bool = False) -> nn.Module | None:
    """The model that a folder loads as, on the meta device; None if its config is not one of transformers.

    Args:
        folder: with a ``config.json``.
        exact: whether the class has to be the model's own, so that names of modules are right. Otherwise the bare model of
            its family will do.

    Raises:
        MissingExtra: transformers is not installed, or cannot be imported.
        SourceError: transformers does not have the model, or only with code that comes with it, which is not run.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path, str(path)) if path.is_file() else {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None and "model_type" not in config:
        return None
    if name is None and exact:
        raise SourceError(
            f"{path} does not say what class the model is", expected='"architectures": ["..."]', hint="add it, and try again"
        )
    transformers = imported("names of modules are found with")
    try:
        kind: Any = transformers.AutoModel if name is None else getattr(transformers, name, None)
        if kind is None:
            raise SourceError(f"{folder}: transformers has no model {name!r}", hint="fold, and adapt the folded model")
        # Shapes do not depend on the quantization or the attention, and either may need packages that are not installed.
        described = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
        )
        if hasattr(described, "quantization_config"):
            del described.quantization_config
        with torch.device("meta"):
            model: nn.Module = kind.from_config(described) if name is None else kind(described)
        tie(model)
    except SourceError:
        raise
    except Exception as error:  # a strange config, or a class that needs other packages, may raise anything
        raise SourceError(
            f"{folder}: transformers cannot make a {name or 'model'} from its config",
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
        ) from error
    return model.eval()
