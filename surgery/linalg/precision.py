"""Float32 arithmetic that is float32, whatever the caller has allowed torch to do."""

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
    """No TF32, bfloat16 or autocast inside float32 products, whatever the caller has chosen; put back afterwards.

    The settings are the process's: where several threads are inside, the first one sets them, the last one puts them back.
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
    """Allow full precision only; what was set before."""
    try:
        # Torch has two interfaces for this, and fails where one has been used and the other says something else.
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
