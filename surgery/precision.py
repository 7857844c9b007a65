"""Making sure that float32 products are computed in float32, whatever precision the caller has set in torch."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: tuple[str | None, list[str]] = (None, [])


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keeps TF32, bfloat16 and autocast out of float32 products for as long as the context lasts.

    The settings are global in the process: of several threads inside, the first changes them, the last restores them.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _set()
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _put_back(*_before)


def _backends() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _set() -> tuple[str | None, list[str]]:
    """Allow full precision only; returns the previous settings of the older and the newer interface, for ``_put_back``."""
    try:
        # Torch has two interfaces for this, and raises if both have been used and contradict each other.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch 2.9 recommends the newer one, once
            older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one is in use
        older = None
    before = [backend.fp32_precision for backend in _backends()]
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for backend in _backends():
        backend.fp32_precision = "ieee"
    return older, before


def _put_back(older: str | None, before: list[str]) -> None:
    if older is not None:
        torch.set_float32_matmul_precision(older)
    for backend, precision in zip(_backends(), before, strict=True):
        backend.fp32_precision = precision
