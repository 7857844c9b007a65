"""Tensor memory as bytes, without a copy and without NumPy (which neither torch nor this project requires)."""

from __future__ import annotations

import ctypes

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy. Keeps the tensor alive."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("bytes_of needs a contiguous tensor on the CPU")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]  # the memory must outlive the view
    return memoryview(array).cast("B")
