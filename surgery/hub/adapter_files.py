"""Which files of a repository on the hub an adapter is made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE, DIFFUSERS_WEIGHTS


def adapter_files(files: Iterable[str], folder: str | None, file: str | None) -> list[str]:
    """The files of an adapter, by their names in the repository; empty if there is none in it, or not all of it.

    What lies beside an adapter, such as a model that was pushed together with it, is none of it. A model is not fetched to
    find that it is no adapter.

    Args:
        files: of the repository.
        folder: of it that the adapter is in; None for the repository itself.
        file: the one that is meant; None for what is known by its name.
    """
    inside = PurePosixPath(folder or "")
    here = {PurePosixPath(name).name: name for name in files if PurePosixPath(name).parent == inside}
    weights = [name for name in here if name.endswith(".safetensors")]
    if file is not None:
        wanted = [PurePosixPath(file).name]
    elif ADAPTER_CONFIG in here:
        wanted = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    elif DIFFUSERS_WEIGHTS in here:
        wanted = [DIFFUSERS_WEIGHTS]
    else:
        wanted = weights if len(weights) == 1 and CONFIG_FILE not in here else []
    return [here[name] for name in wanted] if all(name in here for name in wanted) else []
