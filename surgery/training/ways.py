"""The ways to train what is between U and V^T: scales, a core, or a core that is kept near an orthogonal one.

Each has a flat float32 parameter for each target, 0 when untouched, with as many numbers for each matrix as ``numbers_of_way``
says. What it amounts to is a change: ``g - 1``, or ``C - I``.
"""

from __future__ import annotations

from typing import Literal

import torch

from surgery.names import Train

#: What ``attach`` makes trainable.
Way = Literal["scales", "core", "orthogonal"]


def saved_as(way: Way) -> Train:
    """What a scales file holds of it."""
    return "scales" if way == "scales" else "core"


def numbers_of_way(way: Way, k: int) -> int:
    """How many parameters k directions have."""
    return {"scales": k, "core": k * k, "orthogonal": k * (k - 1) // 2 + 2 * k}[way]


def change_from(way: Way, parameters: torch.Tensor, k: int) -> torch.Tensor:
    """What parameters amount to.

    Args:
        way: how they are meant.
        parameters: (N, numbers) of N matrices.
        k: directions of each.

    Returns:
        ``g - 1`` (N, k), or ``C - I`` (N, k, k), in their dtype and on their device; exactly 0 where they are 0.
    """
    if way == "scales":
        return parameters
    if way == "core":
        return parameters.reshape(len(parameters), k, k)
    return _of_orthogonal(parameters, k)


def values_from(way: Way, change: torch.Tensor) -> torch.Tensor:
    """``g`` or ``C`` of a change, (..., k) or (..., k, k)."""
    if way == "scales":
        return 1 + change
    return change + torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)


def values_of(way: Way, parameters: torch.Tensor, k: int) -> torch.Tensor:
    """``g`` (N, k) or ``C`` (N, k, k), float32, that parameters (N, numbers) of k directions amount to."""
    change = change_from(way, parameters.double() if way == "orthogonal" else parameters, k)
    return values_from(way, change).float()


def _of_orthogonal(parameters: torch.Tensor, k: int) -> torch.Tensor:
    """``diag(1 + a) (I - A)^-1 (I + A) diag(1 + b) - I``: a rotation, Cayley's transform of a skew A, between two scalings.

    With ``(I - A)^-1 (I + A) = I + E`` the identity is taken off before anything is rounded. Source: PSOFT
    (arXiv 2505.11235).
    """
    skew, a, b = torch.split(parameters, [k * (k - 1) // 2, k, k], dim=1)
    rows, columns = torch.tril_indices(k, k, -1, device=parameters.device)
    lower = parameters.new_zeros(len(parameters), k * k).index_copy(1, rows * k + columns, skew).view(-1, k, k)
    A = lower - lower.mT
    # I - A is singular only where parameters are so large that I is lost beside them: then E is no number, and no error raised.
    # A check would wait for the GPU at each matrix.
    E: torch.Tensor = torch.linalg.solve_ex(torch.eye(k, dtype=A.dtype, device=A.device) - A, 2 * A).result
    return (1 + a).unsqueeze(2) * E * (1 + b).unsqueeze(1) + torch.diag_embed(a + b + a * b)


def restricted(way: Way, parameters: torch.Tensor, k: int, kept: torch.Tensor) -> torch.Tensor:
    """The parameters of some of the directions, without what they have to do with the others.

    Args:
        way, parameters, k: as for ``change_from``.
        kept: (N, k') int64, which directions, ascending.

    Returns:
        (N, numbers of k').
    """
    return parameters.gather(1, _places(way, k, kept))


def spread_out(way: Way, parameters: torch.Tensor, k: int, kept: torch.Tensor) -> torch.Tensor:
    """The parameters of all k directions, 0 for all but those of ``kept``: the inverse of ``restricted``."""
    whole = parameters.new_zeros(len(parameters), numbers_of_way(way, k))
    return whole.scatter(1, _places(way, k, kept), parameters)


def _places(way: Way, k: int, kept: torch.Tensor) -> torch.Tensor:
    """Where the parameters of directions are among those of all k."""
    if way == "scales":
        return kept
    if way == "core":
        return (kept.unsqueeze(2) * k + kept.unsqueeze(1)).flatten(1)
    rows, columns = torch.tril_indices(kept.shape[1], kept.shape[1], -1, device=kept.device)
    rows, columns = kept[:, rows], kept[:, columns]
    below = k * (k - 1) // 2
    return torch.cat([rows * (rows - 1) // 2 + columns, below + kept, below + k + kept], dim=1)


def weight_of_directions(way: Way, gradients: torch.Tensor, k: int) -> torch.Tensor:
    """How much each direction would change a loss: the norm of the gradients of all parameters that it has a part in.

    Args:
        way, k: as for ``change_from``.
        gradients: (N, numbers) of the parameters.

    Returns:
        (N, k), for scales ``|gradient|``, for a core the norm of a row and a column together.
    """
    if way == "scales":
        return gradients.abs()
    squares = gradients.double().square()
    if way == "core":
        square = squares.view(-1, k, k)
        return (square.sum(dim=1) + square.sum(dim=2) - square.diagonal(dim1=1, dim2=2)).sqrt()
    skew, a, b = torch.split(squares, [k * (k - 1) // 2, k, k], dim=1)
    rows, columns = torch.tril_indices(k, k, -1, device=gradients.device)
    return (a + b).index_add(1, rows, skew).index_add(1, columns, skew).sqrt()
