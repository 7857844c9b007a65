"""Any adapter, in any of the layouts that users have, onto the tensors of a checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.errors import OptionError
from surgery.format.header import TensorEntry
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIFFUSERS_WEIGHTS
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.content import AdapterContent
from surgery.updates.adapters.diffusion_lora import read_diffusion
from surgery.updates.adapters.homes import Homes
from surgery.updates.adapters.peft_lora import read_peft
from surgery.updates.adapters.placement import PlacedAdapter, placed
from surgery.updates.changes import TensorChange, summed


def read_adapters(
    adapters: Sequence[tuple[Path, float]],
    folder: Path | None,
    entries: Mapping[str, TensorEntry],
    component: str | None = None,
) -> AdapterUpdate:
    """Read one adapter or several, and find the tensors that they change.

    Args:
        adapters: folder of each (of a diffusion model also the file), and the weight with which it counts in the sum.
        folder: with the ``config.json`` of the checkpoint; None where there is none. It is read, and transformers imported,
            only for modules that are not found by the names of the checkpoint's tensors, or whose tensors do not tell enough.
        entries: of all tensors of the checkpoint, by name.
        component: of a diffusion model, such as ``unet``, that the checkpoint is; None for any other model. What an adapter
            has for other components is left out, with a note.

    Raises:
        SourceError: there is no adapter, or in a format that has to be converted first.
        OptionError: an adapter of another kind, one that does not fit the checkpoint or changes nothing, or several that
            cannot be summed.
        FormatError: a file is damaged or contradicts itself.
        ReadError: a file cannot be read.
        MissingExtra: transformers is needed, and not installed.
    """
    homes = Homes(folder, entries)
    shapes = {name: entry.shape for name, entry in entries.items()}
    found: list[tuple[Path, PlacedAdapter]] = []
    for path, weight in adapters:
        if not math.isfinite(weight) or weight == 0:
            raise OptionError(f"{path} has a weight that makes no sense", got=weight, expected="a number other than 0")
        found.append((path, placed(_content(path, component, entries), homes, shapes, weight)))
    changes: dict[str, list[tuple[Path, TensorChange]]] = {}
    for path, one in found:
        for tensor, change in one.changes.items():
            changes.setdefault(tensor, []).append((path, change))
    for tensor, several in changes.items():
        whole = [path for path, change in several if change.replacement is not None or change.rows is not None]
        if whole and len(several) > 1:
            raise OptionError(
                f"{whole[0]} replaces {tensor!r} or rows of it, which another adapter changes too",
                got=next(str(path) for path, _ in several if path != whole[0] or len(whole) > 1),
                hint="merge one adapter after the other, in the order that is meant",
            )
    return AdapterUpdate(
        {tensor: functools.reduce(summed, [change for _, change in several]) for tensor, several in changes.items()},
        [one.account for _, one in found],
    )


def diffusion_file(path: Path, *, of_any_name: bool) -> Path | None:
    """The file of an adapter in a layout of diffusion models; None where there is none and it has to be PEFT's.

    Args:
        path: file or folder that the user gives.
        of_any_name: whether a folder's only safetensors file is taken whatever its name.
    """
    if path.is_file() and path.suffix == ".safetensors" and path.name != ADAPTER_WEIGHTS:
        return path
    if path.is_dir() and not (path / ADAPTER_CONFIG).is_file():
        if (path / DIFFUSERS_WEIGHTS).is_file():
            return path / DIFFUSERS_WEIGHTS
        files = [one for one in path.glob("*.safetensors") if one.is_file()]
        if len(files) == 1 and not files[0].name.startswith("adapter_model") and of_any_name:
            return files[0]
    return None


def _content(path: Path, component: str | None, entries: Mapping[str, TensorEntry]) -> AdapterContent:
    """Read an adapter in the layout that its files have."""
    file = diffusion_file(path, of_any_name=component is not None)
    return read_peft(path) if file is None else read_diffusion(file, component, entries)
