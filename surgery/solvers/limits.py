"""The valid ranges of tolerance, seed, energy and rank of an SVD. Without torch: options are checked before it is loaded."""

from __future__ import annotations

from typing import Literal

from surgery.errors import OptionError

#: Default of ``surgery.truncated_svd``: the residual over the largest singular value at which it stops.
DEFAULT_TOLERANCE = 1e-5
#: Default of ``surgery.linalg.low_rank``: the share by which an error may be above the best one, by the estimate.
DEFAULT_EXCESS = 5e-5
#: Units of the working precision that rounding may leave in a residual.
ROUNDING = 16
#: dtype -> the distance from 1 to the next larger number.
_EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


def check_accuracy(tolerance: float, seed: int, dtype: Literal["float32", "float64"] = "float32") -> None:
    """Refuse a tolerance that cannot be reached in ``dtype``, or a seed that is out of range.

    Raises:
        OptionError: tells the limits.
    """
    floor = ROUNDING * _EPSILON[dtype]
    if not floor <= tolerance < 1:
        raise OptionError(
            "the tolerance makes no sense",
            got=tolerance,
            expected=f"at least {floor:.1e}, the rounding of torch.{dtype}, and below 1",
        )
    if not 0 <= seed < 1 << 63:
        raise OptionError("the seed makes no sense", got=seed, expected="a whole number from 0 to 2^63 - 1")


def check_excess(excess: float) -> None:
    """Refuse a share by which an error may be above the best one that is out of range.

    Raises:
        OptionError: tells the range.
    """
    if not 1e-6 <= excess <= 1e-3:
        raise OptionError("the excess makes no sense", got=excess, expected="a share from 1e-6 to 1e-3")


def check_energy(energy: float, max_rank: int) -> None:
    """Refuse an energy or a largest rank that is out of range.

    Raises:
        OptionError: tells the range.
    """
    if not 0 < energy <= 1:
        raise OptionError("the energy makes no sense", got=energy, expected="a share above 0 and at most 1")
    check_max_rank(max_rank)


def check_max_rank(max_rank: int) -> None:
    """Refuse a largest rank below 1 with an OptionError."""
    if max_rank < 1:
        raise OptionError("the largest rank must be at least 1", got=max_rank)
