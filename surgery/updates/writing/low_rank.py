"""What adapters are written from: tensors of a checkpoint with a low-rank update each, in no adapter's layout yet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from surgery.errors import OptionError
from surgery.escapes import quoted
from surgery.format.views import Kind, Slice
from surgery.names import target_key

#: The layouts that adapters are written in.
Layout = Literal["peft", "diffusers", "kohya"]


@dataclass(frozen=True, slots=True)
class LowRankTensor:
    """A tensor of a checkpoint, or a slice of one, that has an update of low rank.

    Attributes:
        tensor: its name.
        shape: of the whole tensor, as it is stored.
        view: how it is seen as matrices (``surgery.format.views``).
        rank: of the update of each matrix.
        aliases: other tensors that are the same parameter.
        slice: the rows or columns that are updated; None for whole matrices.
    """

    tensor: str
    shape: tuple[int, ...]
    view: Kind
    rank: int
    aliases: tuple[str, ...] = ()
    slice: Slice | None = None

    @property
    def key(self) -> str:
        """Its name, followed by the slice in brackets if it is one."""
        return target_key(self.tensor, None if self.slice is None else self.slice.name)


#: float32 left (m, r) and right (n, r), on the CPU, of a tensor (or slice) that is one matrix; (B, m, r) and (B, n, r) of a
#: stack: ``left right^T`` is added. A convolution (out, in, kernel...) is the matrix (out, in * kernel).
Halves = Callable[[LowRankTensor], tuple[torch.Tensor, torch.Tensor]]


class Copied(Protocol):
    """A tensor that an adapter holds whole, in the place of the model's own, as ``surgery.updates.changes.StoredTensor``."""

    @property
    def dtype(self) -> str:
        """As the format names it: F32, F16 or BF16."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> torch.Tensor:
        """Its numbers, on the CPU."""


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """What an adapter is written as.

    Attributes:
        layout: ``peft``: a folder with ``adapter_config.json``; ``diffusers``: a folder that a pipeline loads; ``kohya``: one
            file, for ComfyUI and tools like it.
        dtype: of the halves, as the format names it: F32, BF16 or F16.
        component: of a diffusion pipeline, such as ``unet``, that the checkpoint is; None for any other model.
        uniform_rank: whether all halves are padded with zeros to one rank, for loaders that ignore ranks by module (vLLM).
        base, revision: the hub's id, or path, and commit of the model that the adapter is for; None if it is not known.
        name: of the file of kohya's layout, without its suffix.
        task: of the model, as PEFT calls it; None where it is not told.
        residual_of: where the adapter is for the residual of a factorized checkpoint, and begins as what that lacks: the
            fingerprint of its factors. It is trained on then.
    """

    layout: Layout
    dtype: str = "F32"
    component: str | None = None
    uniform_rank: bool = False
    base: str | None = None
    revision: str | None = None
    name: str = "adapter"
    task: str | None = None
    residual_of: str | None = None


class NotWritten(OptionError):
    """A tensor that cannot be written.

    Attributes:
        alike: a glob that matches the tensor and those of other blocks whose names differ in numbers alone.
    """

    def __init__(self, what: str, *, got: object = None, hint: str | None = None, alike: str = "") -> None:
        super().__init__(what, got=got, hint=hint)
        self.alike = alike


@dataclass(frozen=True, slots=True)
class Refusal:
    """How it is said that a tensor cannot be written.

    Attributes:
        what: cannot be done to it.
        hint: what to do instead; GLOB stands for the tensor and those of other blocks whose names differ in numbers alone.
    """

    what: str
    hint: str

    def of(self, key: str, got: str) -> NotWritten:
        """The error for a tensor; ``got`` says what it is."""
        alike = glob_of_alike(key.partition("[")[0])
        hint = self.hint.replace("GLOB", quoted(alike))
        return NotWritten(f"{key!r} cannot be {self.what}", got=got, hint=hint, alike=alike)


def glob_of_alike(tensor: str) -> str:
    """A glob that matches a tensor and those of other blocks whose names differ in numbers alone."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor)
