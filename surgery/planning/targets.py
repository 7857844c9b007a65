"""Which tensors are factorized, and why the others are not: a pure function of names, dtypes and shapes."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.errors import OptionError
from surgery.format.safetensors import TensorEntry
from surgery.linalg.energy import check_energy
from surgery.linalg.views import View
from surgery.names import DTYPE_BITS, FACTORIZABLE_DTYPES, target_key

_BLOCK_INDEX = re.compile(r"(^|\.)\d+\.")
_EMBEDDING = re.compile(r"embed|^(wte|wpe|shared|relative_attention_bias)$|position")
_NORM = re.compile(r"norm|^ln(_|\d|$)|layernorm")
_HEAD = frozenset(
    {"lm_head", "head", "heads", "score", "classifier", "embed_out", "cls", "qa_outputs", "output_layer", "pooler"}
)
_ROUTER = frozenset({"router", "gate", "shared_expert_gate", "wg"})
_NO_WEIGHT = re.compile(r"^(A_log|D|dt_bias|inv_freq)$|_bias$|^bias$|rotary|freqs")


@dataclass(frozen=True, slots=True)
class Target:
    """A weight that will be factorized, or a slice of one.

    Attributes:
        tensor, shard, dtype, shape: of the tensor, as in the checkpoint.
        view: how it is seen as matrices.
        rank: directions kept of each matrix, at most min(m, n).
        energy: share of the squared Frobenius norm to keep with as few directions as will do; ``rank`` is then the
            most. None: exactly ``rank``.
    """

    tensor: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    view: View
    rank: int
    energy: float | None = None

    @property
    def key(self) -> str:
        """Its name among factors and scales."""
        return target_key(self.tensor, self.view.slice.name if self.view.slice else None)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(B, m, n)."""
        return self.view.shape(self.shape)

    @property
    def entries(self) -> int:
        return math.prod(self.matrices)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """(k,), or (B, k) for a stack."""
        return (self.matrices[0], self.rank) if self.view.kind == "stack" else (self.rank,)

    @property
    def trainable(self) -> int:
        return math.prod(self.scales_shape)

    @property
    def factor_bytes(self) -> int:
        count, m, n = self.matrices
        return 4 * self.rank * count * (m + n + 1)

    @property
    def at_a_time(self) -> int | None:
        """How many matrices of a stack are held at a time; None for one matrix."""
        return self.view.at_a_time(self.shape, DTYPE_BITS[self.dtype] // 8)

    def place(self, index: int) -> int | None:
        """Which of a stack a matrix is; None for one matrix."""
        return index if self.view.kind == "stack" else None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor that is passed over."""

    tensor: str
    shard: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user asks for.

    Attributes:
        rank: directions to keep of each matrix.
        energy: keep this share of each matrix instead, with at most ``rank`` directions.
        include: globs over tensor names. If any are given, exactly the matrices they match are taken, embeddings
            and heads too.
        exclude: globs over tensor names that are never taken.
    """

    rank: int
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    energy: float | None = None


def choose(entry: TensorEntry, shard: str, choice: Choice) -> Target | Skipped:
    """The fate of one tensor."""
    impossible = _impossible(entry)
    if impossible is not None:
        return Skipped(entry.name, shard, impossible)
    reason = (None if matches(entry.name, choice.include) else "not matched by --include") if choice.include else _role(entry)
    if reason is None and matches(entry.name, choice.exclude):
        reason = "matched by --exclude"
    if reason is not None:
        return Skipped(entry.name, shard, reason)
    m, n = entry.shape
    return Target(entry.name, shard, entry.dtype, (m, n), View("matrix"), min(choice.rank, m, n), choice.energy)


def _impossible(entry: TensorEntry) -> str | None:
    """Why a tensor can never be a target, whatever is asked for."""
    if entry.dtype not in FACTORIZABLE_DTYPES:
        if entry.dtype.startswith(("F", "C")):
            return f"dtype {entry.dtype} is not supported"
        return f"no floating-point weight ({entry.dtype})"
    if len(entry.shape) < 2:
        return "a vector (norm, bias)"
    if len(entry.shape) > 2:
        return f"a {len(entry.shape)}-D tensor is not supported (stacked experts, convolution)"
    if _NO_WEIGHT.search(entry.name.split(".")[-1]):
        return "no weight (bias, state or table)"
    if min(entry.shape) < 2:
        return "a single row or column"
    return None


def _role(entry: TensorEntry) -> str | None:
    """Why a matrix is no target unless it is asked for: it is not a linear layer of a transformer block."""
    *modules, last = entry.name.split(".")
    if last != "weight":
        return "no weight of a linear layer"
    if any(_EMBEDDING.search(part) for part in modules):
        return "an embedding"
    if any(_NORM.search(part) for part in modules):
        return "a norm"
    if "router" in modules or (modules and modules[-1] in _ROUTER):
        return "a router"
    if _HEAD.intersection(modules):
        return "an output head"
    if not _BLOCK_INDEX.search(entry.name):
        return "outside the transformer blocks"
    return None


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether any of the globs fits the whole name; case counts."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def check_choice(choice: Choice, names: list[str]) -> None:
    """Refuse a rank below 1 and globs that match no tensor.

    Raises:
        OptionError: with the nearest names.
    """
    if choice.energy is not None:
        check_energy(choice.energy, choice.rank)
    if choice.rank < 1:
        raise OptionError("the rank must be at least 1", got=choice.rank, hint="--rank 16")
    for option, globs in (("--include", choice.include), ("--exclude", choice.exclude)):
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise OptionError(f"{option} {glob!r} matches no tensor", expected=near_misses(glob, names))


def near_misses(glob: str, names: list[str]) -> str:
    """A few tensor names that the user may have meant."""
    literal = re.sub(r"[*?\[\]]", "", glob)
    # Names differ in their block index only too often: compare one of each kind.
    kinds = {re.sub(r"\.\d+\.", ".*.", name): name for name in reversed(names)}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(literal.strip("."), parts, n=2, cutoff=0.5)
    hits = [kind for kind in kinds if any(part in kind.split(".") for part in near)]
    hits += difflib.get_close_matches(literal, kinds, n=3, cutoff=0.3)
    chosen = list(dict.fromkeys(hits))[:3] or list(kinds)[:3]
    return "a glob over names such as " + ", ".join(chosen)
