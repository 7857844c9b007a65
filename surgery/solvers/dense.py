"""Decompositions of small dense matrices by LAPACK, also for those on a GPU, and what is done where one fails."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from surgery.device import is_unsolved
from surgery.torch_threads import one_thread, one_thread_each

#: The order up to which a symmetric matrix on a GPU is decomposed on the host: there such a matrix is many small kernels.
_HOST_ORDER = 512
#: What a device's eigenvectors may be off orthonormal, and off their matrix over its norm; LAPACK's are within 1e-13.
_TRUSTED = 1e-11


def eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors of positive semidefinite matrices, whose lower triangles alone are read.

    A large one on a GPU is decomposed there. What comes back is checked, since cuSOLVER has returned vectors that were not
    orthonormal, without an error (pytorch issue 192483); if it fails, or what it gives is wrong, the CPU does it. LAPACK's
    own fails on some graded matrices: then its SVD finds the same vectors.

    Args:
        symmetric: float64 (..., n, n).

    Returns:
        (..., n) and (..., n, n), columns, on its device.
    """
    if symmetric.device.type == "cpu":
        try:
            values, vectors = torch.linalg.eigh(symmetric)
            return values, vectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in its list of names
            left, values, _ = torch.linalg.svd(symmetric.tril() + symmetric.tril(-1).mT)
            return values.flip(-1), left.flip(-1)
    if symmetric.shape[-1] > _HOST_ORDER:
        try:
            values, vectors = torch.linalg.eigh(symmetric)
        except RuntimeError as error:  # LinAlgError is one
            if not is_unsolved(error):
                raise
        else:
            if _trusted(symmetric, values, vectors):
                return values, vectors
    values, vectors = eigh(symmetric.cpu())
    return values.to(symmetric.device), vectors.to(symmetric.device)


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``torch.linalg.svd`` of float64 matrices (..., m, n), reduced; on the CPU where that of a GPU fails."""
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except RuntimeError as error:
        if matrix.device.type == "cpu" or not is_unsolved(error):
            raise
        left, values, right = (part.to(matrix.device) for part in torch.linalg.svd(matrix.cpu(), full_matrices=False))
    return left, values, right


def eigh_on_host(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``eigh`` of small matrices (B, n, n), with the results on the CPU."""
    if batch.device.type == "cpu":
        return eigh(batch)
    values, vectors = on_all_cores(eigh, batch.cpu())
    return values, vectors


def svd_on_host(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``svd`` of small matrices (B, m, n), with the results on the CPU."""
    if batch.device.type == "cpu":
        return svd(batch)
    left, values, right = on_all_cores(svd, batch.cpu())
    return left, values, right


def on_all_cores(
    decompose: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], batch: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What ``decompose`` gives of each matrix of a batch on the CPU, stacked, each in one thread, while a GPU waits for it.

    So the result depends neither on the number of cores nor on the rest of the batch.
    """
    workers = min(len(batch), os.cpu_count() or 1)
    if workers == 1:
        with one_thread():
            found = [decompose(matrix) for matrix in batch]
    else:
        with one_thread_each(workers) as pool:
            found = list(pool.map(decompose, batch))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def _trusted(symmetric: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Whether these are the eigenvalues and eigenvectors of matrices (..., n, n), whose lower triangles count."""
    eye = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    whole = symmetric.tril() + symmetric.tril(-1).mT
    scale = values.abs().amax(dim=-1)[..., None, None].clamp(min=1e-300)
    off = torch.maximum((vectors.mT @ vectors - eye).abs(), (whole @ vectors - vectors * values[..., None, :]).abs() / scale)
    return bool(off.max() <= _TRUSTED)
