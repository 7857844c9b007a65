"""Float32 arithmetic that is float32, whatever the caller has allowed torch to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, bfloat16 or autocast inside float32 products, whatever the caller has chosen; put back afterwards."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    try:
        # Torch has two interfaces for this, and fails where one has been used and the other says something else.
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one is in use
        older = None
    before = [backend.fp32_precision for backend in backends]
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
