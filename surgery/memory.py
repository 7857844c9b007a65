"""Tensor memory as bytes."""

from __future__ import annotations

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. Writable; keeps the tensor alive."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("bytes_of needs a contiguous tensor on the CPU")
    array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # arrays are buffers; the stubs know it from 3.12 on
