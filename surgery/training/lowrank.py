"""The trainable part of an attached model: the low-rank path beside each weight that has scales.

Where a layer is linear, its output gets ``((x V) c) U^T`` added to it, with a coefficient for each direction, so that a
step keeps rank-k activations and nothing of the size of the weight. A weight that its module uses in another way, such
as stacked experts, is replaced during the module's forward by an object that does the same inside matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from surgery.models.terms import Term

#: Columns of the factors of a stack come in multiples of this: grouped products want rows of 16 bytes.
_ALIGNMENT = 8


class LowRankPath(nn.Module):
    """``left diag(s (delta + offset)) right^T`` for a parameter, from all targets that lie in it.

    Args:
        deltas: ``g - 1`` of each target, float32, flat; shared with the paths of other parameters that it lies in.
        singular_values: float32, of each target, shaped like its delta.
        offsets: of each target: 0 where the parameter holds the original weight, 1 where it holds the residual.
        terms: of each target.
        count: matrices of the parameter; None if it is no stack.
        like: gives dtype and device.

    Attributes:
        untouched: whether it computes as with deltas of 0, whatever they are.
    """

    left: torch.Tensor
    right: torch.Tensor
    singular_values: torch.Tensor
    offsets: torch.Tensor
    order: torch.Tensor | None

    def __init__(
        self,
        deltas: Sequence[nn.Parameter],
        singular_values: Sequence[torch.Tensor],
        offsets: Sequence[int],
        terms: Sequence[Sequence[Term]],
        count: int | None,
        like: torch.Tensor,
    ) -> None:
        super().__init__()
        self.untouched = False
        self._count = len(deltas)
        for i, delta in enumerate(deltas):
            self.register_parameter(f"delta_{i}", delta)
        spread = [torch.full_like(s, offset) for s, offset in zip(singular_values, offsets, strict=True)]
        self._keep("singular_values", torch.cat(list(singular_values)).to(like.device))
        self._keep("offsets", torch.cat(spread).to(like.device))
        left, right, order = _side_by_side(terms, [len(s) for s in singular_values], count)
        self._keep("left", left.to(like))
        self._keep("right", right.to(like))
        self._keep("order", None if order is None else order.to(like.device))

    def _keep(self, name: str, value: torch.Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def delta(self, i: int) -> nn.Parameter:
        """The parameter ``g - 1`` of target i. Looked up each time: a trainer may have replaced the object."""
        return self.get_parameter(f"delta_{i}")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast as ``nn.Module`` does, but keep the coefficients in float32: half precision is too coarse for g - 1."""
        kept = [*(f"delta_{i}" for i in range(self._count)), "singular_values", "offsets"]
        before = {name: getattr(self, name).data for name in kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != value.dtype:
                tensor.data = value.to(tensor.device)
        return self

    def coefficients(self) -> torch.Tensor:
        """float32 (k,), or (B, k) for a stack."""
        if self.untouched:
            values = self.singular_values * self.offsets
        else:
            deltas: list[torch.Tensor] = [self.delta(i) for i in range(self._count)]
            values = self.singular_values * ((deltas[0] if len(deltas) == 1 else torch.cat(deltas)) + self.offsets)
        if self.order is None:
            return values
        return functional.pad(values, (0, 1))[self.order]  # padding is taken from behind the last

    def forward(self, x: torch.Tensor, apply: Callable[..., Any], owner: Any) -> Any:
        """``apply(x, left, right, coefficients, owner)``, all in the dtype of x and on the device of the path."""
        x = x.to(self.left.device)
        kind = self.left.dtype if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() else x.dtype
        return apply(x, self.left.to(kind), self.right.to(kind), self.coefficients().to(kind), owner)


def _side_by_side(
    terms: Sequence[Sequence[Term]], lengths: Sequence[int], count: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Factors of all terms in columns, (rows, K) and (columns, K), or (B, ...) for a stack; and which scale each column
    takes, None if all in order."""
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    members: list[list[tuple[int, Term]]] = [[] for _ in range(count or 1)]
    for first, group in zip(firsts, terms, strict=True):
        for term in group:
            members[term.matrix].append((first + term.first, term))
    ranks = [sum(term.left.shape[1] for _, term in matrix) for matrix in members]
    width = max(ranks) if count is None else -(-max(ranks) // _ALIGNMENT) * _ALIGNMENT
    some = terms[0][0]
    left = some.left.new_zeros(len(members), len(some.left), width)
    right = some.right.new_zeros(len(members), len(some.right), width)
    order = torch.full((len(members), width), sum(lengths))
    for i, matrix in enumerate(members):
        column = 0
        for first, term in matrix:
            k = term.left.shape[1]
            left[i, :, column : column + k] = term.left
            right[i, :, column : column + k] = term.right
            order[i, column : column + k] = torch.arange(first, first + k)
            column += k
    if count is not None:
        return left, right, order
    in_order = torch.equal(order[0], torch.arange(sum(lengths)))
    return left[0], right[0], None if in_order else order[0]


class Adding:
    """A forward hook that adds a path's update to the output of a layer.

    An object and not a closure, so that a deep copy of the model has the copy of the path in it.

    Args:
        path: of the layer's weight.
        kind: of the layer, one of ``UPDATES``.

    Attributes:
        used: whether the layer has been run.
    """

    def __init__(self, path: LowRankPath, kind: str) -> None:
        self._path = path
        self._kind = kind
        self.used = False

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        self.used = True
        x = inputs[0] if inputs else next(iter(named.values()))
        added: torch.Tensor = self._path(x, UPDATES[self._kind], layer)
        return output + added.to(output.device)


def _narrow(x: torch.Tensor, factor: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """``(x factor) c``; in float32 where the product may leave the range of float16, however small c is."""
    if coefficients.dtype == torch.float16:
        return ((x.float() @ factor.float()) * coefficients.float()).half()
    return (x @ factor) * coefficients


def _linear(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor, _: Any) -> torch.Tensor:
    """Apply the path of a layer that computes ``x W^T``."""
    return _narrow(x, right, coefficients) @ left.T


def _transposed(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor, _: Any) -> torch.Tensor:
    """Apply the path of a layer that computes ``x W``, such as GPT-2's Conv1D."""
    return _narrow(x, left, coefficients) @ right.T


def _embedding(ids: torch.Tensor, left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor, _: Any) -> torch.Tensor:
    return (functional.embedding(ids, left) * coefficients) @ right.T


def _convolution(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor, layer: Any
) -> torch.Tensor:
    """Apply the path of a convolution: one to k channels with the layer's kernel, then one with kernel 1."""
    groups, k = layer.groups, left.shape[1]
    points = (1,) * (layer.weight.ndim - 2)
    kernel = right.T.reshape(k, *layer.weight.shape[1:])
    hidden = layer._conv_forward(x, kernel.repeat(groups, *(1,) * (kernel.ndim - 1)), None)
    hidden = hidden * coefficients.repeat(groups).view(-1, *points)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(points) - 1]
    return convolve(hidden, left.view(*left.shape, *points), groups=groups)


#: Kind of a layer -> ``update(x, left, right, coefficients, layer)``, x being its first argument.
UPDATES: dict[str, Callable[..., torch.Tensor]] = {
    "linear": _linear,
    "transposed": _transposed,
    "embedding": _embedding,
    "convolution": _convolution,
}


class Shadow:
    """Puts a ``LowRankWeight`` in a parameter's place while modules run that use it.

    In the instance's dictionary, which comes before parameters when an attribute is looked up and is in no state dict.

    Args:
        path: of the parameter.
        holder: the module that has it.
        name: the attribute.

    Attributes:
        used: whether the weight has been read meanwhile.
    """

    def __init__(self, path: LowRankPath, holder: nn.Module, name: str) -> None:
        self._path = path
        self._holder = holder
        self._name = name
        self._depth = 0  # of modules that run one inside the other
        self.used = False

    def enter(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._holder.__dict__[self._name] = self._path(self._path.left, self._sum, None)

    def leave(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder.__dict__.pop(self._name, None)

    def _sum(self, _: Any, left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor, _owner: Any) -> LowRankWeight:
        return LowRankWeight(self._weight, left, right, coefficients)

    def _weight(self) -> Any:
        """The weight, looked up when it is used: with offloading it may have been moved in between."""
        self.used = True
        return self._holder._parameters[self._name]


class LowRankWeight:
    """``weight + left diag(c) right^T``, the sum never formed for matrix products, and formed for anything else.

    The coefficients are applied between the two factors: what autograd keeps for their gradient is of rank k then.

    Args:
        weight: gives (m, n), or (B, m, n) for a stack.
        left: (m, k) or (B, m, k).
        right: (n, k) or (B, n, k).
        coefficients: (k,) or (B, k).
    """

    _OF_THE_WEIGHT = frozenset(
        [
            *("data_ptr", "device", "dim", "dtype", "element_size", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point"),
            *(
                "is_leaf",
                "is_meta",
                "itemsize",
                "layout",
                "nbytes",
                "ndim",
                "numel",
                "requires_grad",
                "shape",
                "size",
                "stride",
            ),
        ]
    )

    def __init__(self, weight: Callable[[], Any], left: torch.Tensor, right: torch.Tensor, coefficients: torch.Tensor) -> None:
        self._weight = weight
        self._left = left
        self._right = right
        self._coefficients = coefficients

    def dense(self) -> torch.Tensor:
        weight: torch.Tensor = self._weight()
        added = (self._left * self._coefficients.unsqueeze(-2)) @ self._right.mT
        return weight + added.reshape(weight.shape).to(weight.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight() if name in self._OF_THE_WEIGHT else self.dense(), name)

    def __len__(self) -> int:
        return len(self._weight())

    def __getitem__(self, index: Any) -> Any:
        matrices = isinstance(index, int | slice) or (isinstance(index, torch.Tensor) and index.dtype is not torch.bool)
        if self._left.ndim < 3 or not matrices:
            return self.dense()[index]
        weight = self._weight()[index]
        return LowRankWeight(lambda: weight, self._left[index], self._right[index], self._coefficients[index])

    @property
    def mT(self) -> LowRankWeight:  # noqa: N802
        return LowRankWeight(lambda: self._weight().mT, self._right, self._left, self._coefficients)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.mT if self.ndim == 2 else self.dense().T

    def t(self) -> Any:
        return self.T

    def transpose(self, dim0: int, dim1: int) -> Any:
        last = {self.ndim - 2, self.ndim - 1}
        return self.mT if {dim0 % self.ndim, dim1 % self.ndim} == last else self.dense().transpose(dim0, dim1)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        hidden = _narrow(self._right.mT, x, self._coefficients.unsqueeze(-1) if x.ndim > 1 else self._coefficients)
        product: torch.Tensor = self._weight() @ x + self._left @ hidden
        return product

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        stacked = self._coefficients.ndim > 1 and x.ndim > 1
        hidden = _narrow(x, self._left, self._coefficients.unsqueeze(-2) if stacked else self._coefficients)
        product: torch.Tensor = x @ self._weight() + hidden @ self._right.mT
        return product

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self._weight(), bias) + _narrow(x, self._right, self._coefficients) @ self._left.mT

    def _grouped(self, product: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        # Which coefficients a row takes is known to the product alone: they go into the second factor.
        hidden = product(x, self._left, *args, **named)
        scaled = (self._right * self._coefficients.unsqueeze(-2)).mT
        return product(x, self._weight(), *args, **named) + product(hidden, scaled, *args, **named)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.linear and len(args) >= 2 and cls._only(args, 1) and args[1]._left.ndim == 2:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return args[1]._linear(args[0], bias)
        if function in _PRODUCTS and not kwargs and len(args) == 2:
            if cls._only(args, 1):
                return args[1].__rmatmul__(args[0])
            if cls._only(args, 0):
                return args[0].__matmul__(args[1])  # by name: torch.compile takes the operator for that of a tensor
        if function in _GROUPED and cls._only(args, 1):
            return args[1]._grouped(function, args[0], *args[2:], **kwargs)
        return function(*_formed(args), **_formed(kwargs))

    @staticmethod
    def _only(args: Sequence[Any], place: int) -> bool:
        return all(isinstance(arg, LowRankWeight) == (i == place) for i, arg in enumerate(args))


def _delegated(name: str) -> Callable[..., Any]:
    def operator(self: LowRankWeight, *args: Any) -> Any:
        return getattr(self.dense(), name)(*_formed(args))

    return operator


# Operators are looked up in the class, past __getattr__.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "pow"):
    setattr(LowRankWeight, f"__{_name}__", _delegated(f"__{_name}__"))

_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__}
_GROUPED = {product for product in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if product}


def _formed(value: Any) -> Any:
    """Replace each ``LowRankWeight`` among arguments by its sum, formed."""
    if isinstance(value, LowRankWeight):
        return value.dense()
    if isinstance(value, dict):
        return {key: _formed(item) for key, item in value.items()}
    return type(value)(_formed(item) for item in value) if isinstance(value, list | tuple) else value
