"""The trainable part of an attached model: the low-rank path beside each weight that has scales or cores.

Where a layer is linear, its output gets ``((x V) M^T) U^T`` added to it, with M a coefficient for each direction or a small
matrix, so that a step keeps rank-k activations and nothing of the size of the weight. A weight that its module uses in another
way, such as stacked experts, is replaced during the module's forward by an object that does the same inside matrix products
(``surgery.training.lowrank_weight``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from surgery.models.terms import Term
from surgery.training.inner import Diagonal, Full, Inner, convolved
from surgery.training.ways import Way, change_from, spread_out

#: Columns of the factors of a stack come in multiples of this: grouped products want rows of 16 bytes.
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A target in a path.

    Attributes:
        delta: what is trained of it, float32, flat, 0 when untouched (``surgery.training.ways``); shared with the paths of
            other parameters that the target lies in.
        s: singular values of each of its matrices, float32 (B, k).
        offset: 0 where the parameter holds the original weight, 1 where it holds the residual.
        terms: its directions in the coordinates of the parameter.
    """

    delta: nn.Parameter
    s: torch.Tensor
    offset: int
    terms: Sequence[Term]


class Summand(nn.Module):
    """What layers add to a parameter in their computation: a path, or several.

    Attributes:
        idle: whether nothing is to be added.
        left: the left factor, which tells the dtype and the device.
    """

    left: torch.Tensor

    @property
    def idle(self) -> bool:
        return False


class LowRankPath(Summand):
    """``left M right^T`` for a parameter, from all targets that lie in it: for each of these U and V, in columns, and between
    them ``diag(s (g - 1 + offset))``, or ``sqrt(s s^T) (C - I + offset I)``.

    Args:
        way: what is trained.
        entries: the targets.
        count: matrices of the parameter; None if it is no stack.
        like: gives dtype and device.

    Attributes:
        untouched: whether it computes as with deltas of 0, whatever they are.
        restores: whether it adds what the residual lacks; of several paths of one parameter one does.
        left, right: (rows, K) and (columns, K), or (B, ...) for a stack; zero where a matrix has fewer columns than others.
        roots: float32: for scales s of all targets, flat; for cores ``sqrt(s s^T)``, (N, k, k) for all N matrices of the
            targets, k being the largest rank.
        offsets: float32, for scales of each of them, for cores (N, 1, 1).
        order: for scales which one each column takes; for cores (B, T), which one each block of k columns takes. What is not
            there is one more than the last. None if all are in order.
        turned: bool (B, T, 1, 1), the blocks in which a core is transposed; None if it is in none.
    """

    left: torch.Tensor
    right: torch.Tensor
    roots: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor | None
    turned: torch.Tensor | None

    def __init__(self, way: Way, entries: Sequence[Entry], count: int | None, like: torch.Tensor) -> None:
        super().__init__()
        self.untouched = False
        self.restores = True
        self._way = way
        self._offsets = [entry.offset for entry in entries]
        self._is_stack = count is not None
        #: Targets whose delta is a parameter of another module -> that, and its name there.
        self._lent: dict[int, tuple[nn.Module, str]] = {}
        for i, entry in enumerate(entries):
            self.register_parameter(f"delta_{i}", entry.delta)
            self._keep(f"trained_{i}", None)
        members = [
            [(i, term) for i, entry in enumerate(entries) for term in entry.terms if term.matrix == m]
            for m in range(count or 1)
        ]
        ranks = [entry.s.shape[1] for entry in entries]
        #: For each matrix of the parameter its blocks of columns: target, matrix of the target, whether transposed.
        self._blocks = [[(i, term.first // ranks[i], term.transposed) for i, term in terms] for terms in members]
        self._arrange([entry.s.to(like.device) for entry in entries])
        starts, width = self._columns()
        factors = []
        for side in ("left", "right"):
            some = getattr(entries[0].terms[0], side)
            whole = some.new_zeros(len(members), len(some), width)
            for m, terms in enumerate(members):
                for (i, term), start in zip(terms, starts[m], strict=True):
                    whole[m, :, start : start + ranks[i]] = getattr(term, side)
            factors.append((whole if self._is_stack else whole[0]).to(like))
        self._keep("left", factors[0])
        self._keep("right", factors[1])

    def _keep(self, name: str, value: torch.Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def delta(self, i: int) -> nn.Parameter:
        """What is trained of target i. Looked up each time: a trainer may have replaced the object."""
        holder, name = self._lent.get(i, (self, f"delta_{i}"))
        return holder.get_parameter(name)

    def lend(self, i: int, holder: nn.Module, name: str) -> None:
        """Take what is trained of target i from a parameter of another module from here on."""
        self._parameters.pop(f"delta_{i}", None)
        self._lent[i] = holder, name

    @property
    def lacking(self) -> bool:
        """Whether the parameter lacks directions that the path adds whatever is trained: it holds a residual."""
        return any(self._offsets)

    def deltas(self) -> list[nn.Parameter]:
        return [self.delta(i) for i in range(len(self._offsets))]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast as ``nn.Module`` does, but keep what is trained in float32: half precision is too coarse for g - 1."""
        kept = [*self._parameters, "roots", "offsets"]
        before = {name: getattr(self, name).data for name in kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != value.dtype:
                tensor.data = value.to(tensor.device)
        return self

    def _arrange(self, s: Sequence[torch.Tensor]) -> None:
        """Make the buffers that say what is between the factors, of the singular values (B, k) that are computed with."""
        self._shapes = [tuple(values.shape) for values in s]
        firsts = [0, *accumulate(count for count, _ in self._shapes)]
        device, s = s[0].device, [values.cpu() for values in s]
        turned = None
        if self._way == "scales":
            roots = torch.cat([values.flatten() for values in s])
            offsets = torch.cat([torch.full_like(v, offset).flatten() for v, offset in zip(s, self._offsets, strict=True)])
            order = self._order_of_columns(len(roots))
        else:
            k = self._block_size()
            # The root of the product in float64: on the diagonal it is s itself.
            wide = torch.cat([functional.pad(values.double(), (0, k - values.shape[1])) for values in s])
            roots = (wide.unsqueeze(2) * wide.unsqueeze(1)).sqrt().float()
            offsets = torch.cat([v.new_full((len(v), 1, 1), offset) for offset, v in zip(self._offsets, s, strict=True)])
            most = max(map(len, self._blocks))
            order = torch.full((len(self._blocks), most), len(roots))
            turned = torch.zeros(len(self._blocks), most, dtype=torch.bool)
            for m, blocks in enumerate(self._blocks):
                for t, (i, index, transposed) in enumerate(blocks):
                    order[m, t], turned[m, t] = firsts[i] + index, transposed
            turned = turned[:, :, None, None] if bool(turned.any()) else None
            order = None if torch.equal(order.flatten(), torch.arange(len(roots))) else order
        for name, value in (("roots", roots), ("offsets", offsets), ("order", order), ("turned", turned)):
            self._keep(name, None if value is None else value.to(device))

    def _order_of_columns(self, total: int) -> torch.Tensor | None:
        """Which scale each column takes, see ``order``."""
        starts, width = self._columns()
        firsts = [0, *accumulate(count * k for count, k in self._shapes)]
        order = torch.full((len(self._blocks), width), total)
        for m, blocks in enumerate(self._blocks):
            for (i, index, _), start in zip(blocks, starts[m], strict=True):
                k = self._shapes[i][1]
                first = firsts[i] + index * k
                order[m, start : start + k] = torch.arange(first, first + k)
        if self._is_stack:
            return order
        return None if torch.equal(order[0], torch.arange(total)) else order[0]

    def _block_size(self) -> int:
        """How many columns each block of a core has."""
        k = max(k for _, k in self._shapes)
        return -(-k // _ALIGNMENT) * _ALIGNMENT if self._is_stack else k

    def _columns(self) -> tuple[list[list[int]], int]:
        """The first column of each block of each matrix, and the number of columns."""
        if self._way != "scales":
            k = self._block_size()
            return [[t * k for t in range(len(blocks))] for blocks in self._blocks], k * max(map(len, self._blocks))
        ends = [[0, *accumulate(self._shapes[i][1] for i, _, _ in blocks)] for blocks in self._blocks]
        width = max(end[-1] for end in ends)
        return [end[:-1] for end in ends], -(-width // _ALIGNMENT) * _ALIGNMENT if self._is_stack else width

    def restrict(self, kept: Sequence[torch.Tensor]) -> bool:
        """Go on with some of the directions. What is trained must be cut to them (``ways.restricted``) by the caller.

        Directions that the residual lacks stay in the computation, untouched; others leave it, and the factors shrink.

        Args:
            kept: for each target (B, k') int64, which of those directions that are trained, ascending.

        Returns:
            Whether any stay that are not trained.
        """
        lacking = False
        s = self._singular_values()
        columns = []
        for i, at in enumerate(kept):
            at = at.to(self.roots.device)
            if self._offsets[i]:
                before = getattr(self, f"trained_{i}")
                self._keep(f"trained_{i}", at if before is None else before.gather(1, at))
                lacking |= at.shape[1] < s[i].shape[1]
                at = torch.arange(s[i].shape[1], device=at.device).expand(len(at), -1)
            s[i] = s[i].gather(1, at)
            columns.append(at.cpu())
        before, width = self._columns()
        self._arrange(s)
        after, new_width = self._columns()
        taken = torch.full((len(self._blocks), new_width), width)
        for m, blocks in enumerate(self._blocks):
            for (i, index, _), old, new in zip(blocks, before[m], after[m], strict=True):
                at = columns[i][index]
                taken[m, new : new + len(at)] = old + at
        taken = taken.to(self.left.device)
        for side in ("left", "right"):
            padded = functional.pad(getattr(self, side), (0, 1))
            if self._is_stack:
                self._keep(side, padded.gather(2, taken.unsqueeze(1).expand(-1, padded.shape[1], -1)))
            else:
                self._keep(side, padded[:, taken[0]])
        return lacking

    def _singular_values(self) -> list[torch.Tensor]:
        """(B, k) of each target, those that are computed with."""
        if self._way == "scales":
            flat = torch.split(self.roots, [count * k for count, k in self._shapes])
            return [values.view(shape) for values, shape in zip(flat, self._shapes, strict=True)]
        wide = torch.split(self.roots.diagonal(dim1=1, dim2=2), [count for count, _ in self._shapes])
        return [values[:, :k] for values, (_, k) in zip(wide, self._shapes, strict=True)]

    def inner(self) -> Inner:
        """M, float32: what is between the factors."""
        return self._diagonal() if self._way == "scales" else self._full()

    def _diagonal(self) -> Diagonal:
        if self.untouched:
            values = self.roots * self.offsets
        else:
            spread = self._spread()
            deltas = spread[0] if len(spread) == 1 else torch.cat(spread)
            values = self.roots * (deltas + self.offsets if self.restores else deltas)
        if self.order is None:
            return Diagonal(values)
        return Diagonal(functional.pad(values, (0, 1))[self.order])  # padding is taken from behind the last

    def _full(self) -> Full:
        k = self.roots.shape[-1]
        blocks = self.offsets * torch.eye(k, dtype=self.roots.dtype, device=self.roots.device)
        if not self.untouched:
            blocks = self._changes(k) + blocks if self.restores else self._changes(k)
        blocks = self.roots * blocks
        count = len(self._blocks)
        blocks = blocks.view(count, -1, k, k) if self.order is None else functional.pad(blocks, (0, 0, 0, 0, 0, 1))[self.order]
        if self.turned is not None:
            blocks = torch.where(self.turned, blocks.mT, blocks)
        wide = blocks.shape[1] * k
        if blocks.shape[1] > 1:  # along the diagonal of one matrix
            blocks = torch.diag_embed(blocks.movedim(1, 3)).permute(0, 3, 1, 4, 2)
        values = blocks.reshape(count, wide, wide)
        return Full(values if self._is_stack else values[0])

    def _changes(self, k: int) -> torch.Tensor:
        """``C - I`` of all matrices of all targets (N, k, k), zero outside their ranks."""
        deltas = [delta.view(count, -1) for delta, (count, _) in zip(self._spread(), self._shapes, strict=True)]
        ranks = [rank for _, rank in self._shapes]
        if len(set(ranks)) == 1:  # one computation for all
            deltas, ranks = [torch.cat(deltas)] if len(deltas) > 1 else deltas, ranks[:1]
        changes = [change_from(self._way, delta, rank) for delta, rank in zip(deltas, ranks, strict=True)]
        padded = [functional.pad(change, (0, k - rank, 0, k - rank)) for change, rank in zip(changes, ranks, strict=True)]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    def _spread(self) -> list[torch.Tensor]:
        """The deltas, flat, of all directions that are computed with: 0 for those that are not trained any more."""
        deltas: list[torch.Tensor] = []
        for i, (count, k) in enumerate(self._shapes):
            delta: torch.Tensor = self.delta(i)
            if (trained := getattr(self, f"trained_{i}")) is not None:
                delta = spread_out(self._way, delta.view(count, -1), k, trained).flatten()
            deltas.append(delta)
        return deltas

    def forward(self, x: torch.Tensor, apply: Callable[..., Any], owner: Any) -> Any:
        """``apply(x, left, right, inner, owner)``, all in the dtype of x and on the device of the path."""
        x = x.to(self.left.device)
        kind = self.left.dtype if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() else x.dtype
        return apply(x, self.left.to(kind), self.right.to(kind), self.inner().to(kind), owner)


class Adding:
    """A forward hook that adds a path's update to the output of a layer.

    An object and not a closure, so that a deep copy of the model has the copy of the path in it.

    Args:
        path: of the layer's weight.
        kind: of the layer, one of ``UPDATES``.

    Attributes:
        used: whether the layer has been run.
    """

    def __init__(self, path: Summand, kind: str) -> None:
        self._path = path
        self._kind = kind
        self.used = False

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        self.used = True
        if self._path.idle:
            return output
        x = inputs[0] if inputs else next(iter(named.values()))
        added: torch.Tensor = self._path(x, UPDATES[self._kind], layer)
        return output + added.to(output.device)


def _linear(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, inner: Inner, _: Any) -> torch.Tensor:
    """Apply the path of a layer that computes ``x W^T``."""
    return inner.mT.rows(x, right) @ left.T


def _transposed(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, inner: Inner, _: Any) -> torch.Tensor:
    """Apply the path of a layer that computes ``x W``, such as GPT-2's Conv1D."""
    return inner.rows(x, left) @ right.T


def _embedding(ids: torch.Tensor, left: torch.Tensor, right: torch.Tensor, inner: Inner, _: Any) -> torch.Tensor:
    return inner.after(functional.embedding(ids, left)) @ right.T


def _convolution(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, inner: Inner, layer: Any) -> torch.Tensor:
    """Apply the path of a convolution: one to k channels with the layer's kernel, then one with kernel 1."""
    groups, k = layer.groups, left.shape[1]
    kernel = right.T.reshape(k, *layer.weight.shape[1:])
    hidden = layer._conv_forward(x, kernel.repeat(groups, *(1,) * (kernel.ndim - 1)), None)
    return convolved(inner.on_channels(hidden, groups), left, groups)


#: Kind of a layer -> ``update(x, left, right, inner, layer)``, x being its first argument.
UPDATES: dict[str, Callable[..., torch.Tensor]] = {
    "linear": _linear,
    "transposed": _transposed,
    "embedding": _embedding,
    "convolution": _convolution,
}
