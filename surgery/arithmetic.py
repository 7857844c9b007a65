"""Making sure that floating-point arithmetic follows IEEE 754, whatever the host program has set in the processor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from surgery.errors import OptionError

_SMALLEST_NORMAL = sys.float_info.min
_HALF, _ONE, _BELOW_ROUNDING = 0.5, 1.0, 2.0**-60


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Keeps subnormal numbers, instead of flushing them to zero, for as long as the context lasts.

    The setting holds for this thread and for those that it starts. Threads that torch has already started for its operations
    keep theirs, so what depends on subnormal numbers has to be computed in one thread.

    Raises:
        OptionError: the processor flushes them and torch cannot switch that off, or it does not round to nearest.
    """
    if not (_ONE + _BELOW_ROUNDING == _ONE == _ONE - _BELOW_ROUNDING):
        raise OptionError(
            "the processor has been told to round otherwise than to nearest, so that no result would be exact",
            hint="find what in this process has called fesetround, or run surgery in a process of its own",
        )
    if not _flushes():
        yield
        return
    if not torch.set_flush_denormal(False) or _flushes():
        raise OptionError(
            "the processor has been told to flush subnormal numbers to zero, so that no result would be exact",
            hint="find what in this process has set that, or run surgery in a process of its own",
        )
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


def _flushes() -> bool:
    return _SMALLEST_NORMAL * _HALF == 0.0
