"""What an adapter's file holds, in whatever layout: updates of modules, tensors that replace others, rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from surgery.errors import FormatError, OptionError
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.updates.changes import ReplacedRows, StoredTensor

#: What an adapter scales an update with, by the name of what is updated, the rows of its A, and the matrices of a stack.
Scaling = Callable[[str, int, int], float]


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """What an adapter adds to a module's weight: ``scaling B A``, and perhaps to its bias.

    Attributes:
        module: its name.
        A: float32 (r, in), or (r, in, kernel...) for a convolution; of a stack of E matrices (E r, in).
        B: float32 (out, r); of a stack (out, r E).
        scaling: what the adapter multiplies with; see ``Scaling``.
        parts: the tensors of the file that it is made from: of ``A``, ``B``, and of ``magnitude``, ``bias`` and ``alpha`` where
            it has them.
        magnitude: of DoRA, float32 (out,); None without.
        bias: of B, float32 (out,), which is scaled as the matrix is; None without.
        embedding: whether the module is an embedding, whose weight is (in, out).
        transposed: whether the adapter says that the weight is (in, out); not to be relied on where the module is known.
        depth: how many of PEFT's layers are around the module besides its own: those of other parameters of a stack.
    """

    module: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: Scaling
    parts: Mapping[str, str]
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    embedding: bool = False
    transposed: bool = False
    depth: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the file that it is made from."""
        return tuple(self.parts.values())


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """An adapter as it was read.

    Attributes:
        where: its folder or file, for messages.
        updates: of modules.
        copied: name of a parameter -> the tensor that takes its place.
        tokens: name of a module -> the tensor of the file with the rows of trained tokens, and these.
        compared: tensor of the file -> the name of the parameter that it is a copy of, and the copy; None for what is none.
        stacked: ends of the names of parameters that PEFT adapts without their modules, as stacks of experts.
        version: of the PEFT that wrote it, as its config has it; None where nothing says.
        of_residual: whether its config says that it is for the residual of a factorized checkpoint.
        rounded: the tensors of the file that are parts of updates in half precision.
    """

    where: str
    updates: Sequence[ModuleUpdate]
    copied: Mapping[str, StoredTensor] = field(default_factory=dict)
    tokens: Mapping[str, tuple[str, ReplacedRows]] = field(default_factory=dict)
    compared: Mapping[str, tuple[str, StoredTensor] | None] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    version: object = None
    of_residual: bool = False
    rounded: Sequence[str] = ()


def changes_nothing(where: str, got: str) -> OptionError:
    """The error for an adapter without any effect; ``got`` is what it holds."""
    return OptionError(
        f"{where}: an adapter that changes nothing", got=got, hint="give the adapter that was saved after the training"
    )


def read_numbers(reader: ShardReader, entry: TensorEntry, hint: str) -> torch.Tensor:
    """A tensor of an adapter, float32, on the CPU.

    Raises:
        OptionError: of a dtype that adapters do not have; ``hint`` says what to do then.
        FormatError: it holds NaN or infinity.
    """
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise OptionError(
            f"{reader.name}: {entry.name!r} is no part of a LoRA update by its dtype",
            got=entry.dtype,
            expected="F32, F16 or BF16",
            hint=hint,
        )
    tensor = reader.read(entry).float()
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{reader.name}: {entry.name!r} holds NaN or infinity", hint="take an earlier checkpoint")
    return tensor


def checked_halves(where: str, module: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A as it is and B as a matrix (out, r).

    Raises:
        FormatError: their shapes do not fit each other.
    """
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1] or B.shape[2:].numel() != 1 or not len(A):
        raise FormatError(
            f"{where}: the halves of {module!r} do not fit",
            got=[list(A.shape), list(B.shape)],
            expected="(rank, in) and (out, rank), with a rank of 1 or more",
        )
    return A, B.reshape(B.shape[:2])
