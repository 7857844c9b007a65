"""Objects in the place of weights that modules use by themselves: a product with one adds its low-rank path inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from surgery.training.inner import Inner
from surgery.training.lowrank import Summand


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

    def __init__(self, path: Summand, holder: nn.Module, name: str) -> None:
        self._path = path
        self._holder = holder
        self._name = name
        self._depth = 0  # of modules that run one inside the other
        self.used = False

    def enter(self, _module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self._depth += 1
        if self._depth == 1 and not self._path.idle:
            self._holder.__dict__[self._name] = self._path(self._path.left, self._sum, None)

    def leave(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder.__dict__.pop(self._name, None)

    def _sum(self, _: Any, left: torch.Tensor, right: torch.Tensor, inner: Inner, _owner: Any) -> LowRankWeight:
        return LowRankWeight(self._weight, left, right, inner)

    def _weight(self) -> Any:
        """The weight, looked up when it is used: with offloading it may have been moved in between."""
        self.used = True
        return self._holder._parameters[self._name]


class LowRankWeight:
    """``weight + left M right^T``, the sum never formed for matrix products, and formed for anything else.

    What is between the factors is applied between the two factors: what autograd keeps for their gradient is of rank k then.

    Args:
        weight: gives (m, n), or (B, m, n) for a stack.
        left: (m, k) or (B, m, k).
        right: (n, k) or (B, n, k).
        inner: M; of a stack if they are.
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

    def __init__(self, weight: Callable[[], Any], left: torch.Tensor, right: torch.Tensor, inner: Inner) -> None:
        self._weight = weight
        self._left = left
        self._right = right
        self._inner = inner

    def dense(self) -> torch.Tensor:
        weight: torch.Tensor = self._weight()
        added = self._inner.after(self._left) @ self._right.mT
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
        return LowRankWeight(lambda: weight, self._left[index], self._right[index], self._inner[index])

    @property
    def mT(self) -> LowRankWeight:  # noqa: N802
        return LowRankWeight(lambda: self._weight().mT, self._right, self._left, self._inner.mT)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.mT if self.ndim == 2 else self.dense().T

    def t(self) -> Any:
        return self.T

    def transpose(self, dim0: int, dim1: int) -> Any:
        last = {self.ndim - 2, self.ndim - 1}
        return self.mT if {dim0 % self.ndim, dim1 % self.ndim} == last else self.dense().transpose(dim0, dim1)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 1 < self._left.ndim - 1:
            return self.__matmul__(x.unsqueeze(-1)).squeeze(-1)
        hidden = self._inner.columns(self._right, x)
        product: torch.Tensor = self._weight() @ x + self._left @ hidden
        return product

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 1 < self._left.ndim - 1:
            return self.__rmatmul__(x.unsqueeze(-2)).squeeze(-2)
        hidden = self._inner.rows(x, self._left)
        product: torch.Tensor = x @ self._weight() + hidden @ self._right.mT
        return product

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self._weight(), bias) + self._inner.mT.rows(x, self._right) @ self._left.mT

    def _grouped(self, product: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        # Which matrix a row belongs to is known to the product alone: what is between goes into the second factor.
        hidden = product(x, self._left, *args, **named)
        scaled = self._inner.mT.after(self._right).mT
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
