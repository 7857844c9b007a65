"""Any adapter, in any of the layouts that users have, onto the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.format.header import TensorEntry
from surgery.updates.adapter_update import AdapterUpdate


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
            only for modules that are not found by the names of the checkpoint's tensors.
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
    raise NotImplementedError
