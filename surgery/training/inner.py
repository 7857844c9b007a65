"""What is between the two factors of a low-rank path: multipliers of the directions, or a matrix that also turns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch.nn import functional


class Inner:
    """A matrix ``M`` between two factors; ``Diagonal`` or ``Full``.

    Args:
        values: of the matrix; with a leading dimension B for a stack.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(self.values.to(dtype))

    def __getitem__(self, index: Any) -> Self:
        """Those of some matrices of a stack."""
        return type(self)(self.values[index])

    @property
    def mT(self) -> Self:  # noqa: N802
        raise NotImplementedError

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """``x M`` for rows x (..., k)."""
        raise NotImplementedError

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """``M x`` for columns x (..., k, n), or a vector (k,)."""
        raise NotImplementedError

    def on_channels(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """``M`` times the k channels of each group of x (batch, groups k, ...)."""
        raise NotImplementedError

    def rows(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """``x factor M``; in float32 where that may leave the range of float16 on the way, however small M is."""
        if self.values.dtype == torch.float16:
            return self.to(torch.float32).after(x.float() @ factor.float()).half()
        return self.after(x @ factor)

    def columns(self, factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``M factor^T x``, likewise."""
        if self.values.dtype == torch.float16:
            return self.to(torch.float32).before(factor.mT.float() @ x.float()).half()
        return self.before(factor.mT @ x)


class Diagonal(Inner):
    """``diag(c)``; the values are (k,), or (B, k) for a stack."""

    @property
    def mT(self) -> Self:  # noqa: N802
        return self

    def after(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.values.unsqueeze(-2) if self.values.ndim > 1 else self.values)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.values.unsqueeze(-1) if x.ndim > self.values.ndim else self.values)

    def on_channels(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        return x * self.values.repeat(groups).view(-1, *(1,) * (x.ndim - 2))


class Full(Inner):
    """Any matrix; the values are (k, k), or (B, k, k) for a stack."""

    @property
    def mT(self) -> Self:  # noqa: N802
        return type(self)(self.values.mT)

    def after(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.values

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.values @ x

    def on_channels(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        return convolved(x, self.values.repeat(groups, 1), groups)


def joined(inners: Sequence[Inner]) -> Inner:
    """What is between factors that are put beside each other, column after column."""
    if all(isinstance(inner, Diagonal) for inner in inners):
        return Diagonal(torch.cat([inner.values for inner in inners], dim=-1))
    blocks = [torch.diag_embed(inner.values) if isinstance(inner, Diagonal) else inner.values for inner in inners]
    k = sum(block.shape[-1] for block in blocks)
    whole = blocks[0].new_zeros(*blocks[0].shape[:-2], k, k)
    start = 0
    for block in blocks:
        stop = start + block.shape[-1]
        whole[..., start:stop, start:stop] = block
        start = stop
    return Full(whole)


def convolved(x: torch.Tensor, matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """A convolution with a kernel of one point: a matrix (out, in / groups) for the channels of x (batch, in, ...)."""
    points = (1,) * (x.ndim - 2)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(points) - 1]
    return convolve(x, matrix.view(*matrix.shape, *points), groups=groups)
