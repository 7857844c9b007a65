"""Rounding float64 values to a model's dtype exactly once, exact powers of two, and counting units in the last place."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from surgery.errors import OptionError
from surgery.torch_threads import one_thread

_Bits = TypeVar("_Bits", torch.Tensor, npt.NDArray[Any])

#: Bits of the significand (hidden one included) and exponent of the smallest normal number.
_FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}

_SIGNED = {2: torch.int16, 4: torch.int32}


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 values to ``dtype``, to nearest with ties to even, once.

    A plain ``x.to(torch.bfloat16)`` goes through float32 and so rounds twice: a value just above a tie of the
    coarse grid can land on the tie first and then on the wrong side.

    Args:
        x: float64, any shape, any device with float64.
        dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        Tensor of ``dtype``, the shape of ``x``. Values past the largest finite one become infinite.
    """
    if dtype == torch.float32:
        return x.to(dtype)
    precision, min_exponent = _FORMATS[dtype]
    # The power of two at or below each |x|, but not below the smallest normal one, times 1.5 * 2^(53 - precision):
    # added and taken away, it leaves x rounded to the target's grid, since float64 addition rounds to
    # nearest-even and the grid's unit is the last place of the sum. Exact for subnormals of the target too.
    magic = (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    magic.clamp_(min=2.0**min_exponent).mul_(1.5 * 2.0 ** (53 - precision))
    rounded = (x + magic).sub_(magic).copysign_(x)  # a negative number that rounds to zero gives -0
    return rounded.to(torch.float32).to(dtype)


def times_power_of_two(x: torch.Tensor, exponent: int) -> torch.Tensor:
    """``x 2^exponent``, exact unless the result is subnormal or overflows; then it is rounded once.

    ``torch.ldexp`` is not exact: before torch 2.11 it multiplies by a float32 power, which may be wrong or out of range.

    Args:
        x: float32 or float64, any shape and device.
    """
    limits = torch.finfo(x.dtype)
    most, digits = math.frexp(limits.max)[1] - 1, 2 - math.frexp(limits.eps)[1]
    with one_thread():  # as exact_arithmetic asks for
        while exponent > most:
            x, exponent = x * 2.0**most, exponent - most
        # If one of these steps rounds, the next one leaves no digits at all: the result is zero in any case.
        while exponent < 1 - most:
            x, exponent = x * 2.0 ** (1 - most + digits), exponent - (1 - most + digits)
        return x * 2.0**exponent


def is_vanished(exact: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Whether numbers are mostly below what their new dtype can hold, so that rounding took a hundredth of their norm or more.

    Numbers in its range lose a fourth of that at most, in bfloat16.

    Args:
        exact: float32 or float64, any shape.
        rounded: the same in another dtype.
    """
    lost = torch.linalg.vector_norm(rounded.to(exact.dtype) - exact, dtype=torch.float64)
    return bool(lost > 0.01 * torch.linalg.vector_norm(exact, dtype=torch.float64))


def check_dense(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor that is not a dense tensor of real floating-point numbers in memory.

    Raises:
        OptionError: it is complex, of whole numbers or truth values, packed, sparse, nested, or on the meta device.
    """
    odd = not tensor.dtype.is_floating_point or tensor.dtype == torch.float4_e2m1fn_x2
    if odd or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        where = ", which has no numbers," if tensor.is_meta else ""
        raise OptionError(
            f"{name} does not hold real floating-point numbers that are in memory",
            got=f"a tensor of {tensor.dtype} on {tensor.device}{where} with layout {tensor.layout}",
            expected="a dense tensor of torch.float32, float64, bfloat16 or float16",
            hint="take .to_dense() of a sparse one, .float() of whole numbers",
        )


def all_finite(x: torch.Tensor) -> bool:
    """Whether a float tensor with at least one entry holds neither NaN nor infinity."""
    # The minimum or maximum of numbers with a NaN is NaN. This takes one pass, and is many times faster than isfinite.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(x))


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The bits of floats as int16 or int32, by their width; a view of the same memory."""
    return x.view(_SIGNED[x.element_size()])


def flipped(bits: _Bits) -> _Bits:
    """Map the bits of floats to integers in the order of the reals, so that neighbours differ by one; -0 is just below +0.

    Args:
        bits: int16 or int32, a tensor or an array, see ``bits_of``.

    Returns:
        The same kind and shape. Its own inverse.
    """
    width = 8 * bits.itemsize
    # Negative floats grow downwards in their bits: flip all but the sign.
    result: _Bits = bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))
    return result


def indices_of_others(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two integer tensors differ, as indices into the flattened ones."""
    if a.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(a.numpy() != b.numpy()))  # many times faster than torch on a CPU
    return (a != b).view(-1).nonzero().flatten()
