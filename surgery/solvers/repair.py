"""The next block of a Krylov basis where part of it is rounding error."""

from __future__ import annotations

from collections.abc import Callable

import torch

from surgery.solvers.dense import eigh
from surgery.solvers.operator import widened

#: A direction is noise if its part outside the basis is below this multiple of the norm of B times its image's length.
NOISE = 3e-7


def repaired(
    rows: torch.Tensor, noise: torch.Tensor, known: torch.Tensor, room: int, random: Callable[[int], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``room`` longest directions of ``rows`` (b, short), with random ones in place of noise.

    Args:
        rows: the products of the last block, nearly free of the basis.
        noise: float64 (b,), how long the rounding error of each is.
        known: (size, short), the basis.
        room: how many directions there are to be.
        random: of a number, as many random rows of unit length.

    Returns:
        (room, short) orthonormal rows and the float64 (b, room) coupling.
    """
    wide = widened(rows - (rows @ known.T) @ known)
    # In units of each row's noise, so that a row with much noise does not hide the others.
    unit = torch.where(noise > 0, noise, 1.0)
    wide = wide / unit[:, None]
    values, vectors = eigh(wide @ wide.T)
    lengths = values.clamp(min=0).sqrt()
    least = max(1.0 if noise.any() else 0.0, 1e-14 * lengths.max().item())
    kept = (lengths > least).nonzero().flatten().flip(0)[:room]
    coupling = unit[:, None] * (vectors[:, kept] * lengths[kept])
    block = ((vectors[:, kept] / lengths[kept]).T @ wide).to(rows.dtype).to(rows.device)
    if len(kept) < room:
        coupling = torch.nn.functional.pad(coupling, (0, room - len(kept)))
        block = torch.cat([block, random(room - len(kept)).to(block)])
    for _ in range(2):
        # Cholesky keeps the order of the rows and hardly changes the first ones, so the coupling stays valid.
        block = block - (block @ known.T) @ known
        wide = widened(block)
        block = (_inverse_root(wide @ wide.T) @ wide).to(rows.dtype).to(rows.device)
    return block, coupling


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """T with ``T gram T^T = I``, from Cholesky, or from eigenvectors where rounding has made gram indefinite."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0:
        eye = torch.eye(len(factor), dtype=torch.float64, device=gram.device)
        inverse: torch.Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    else:
        values, vectors = eigh(gram)
        inverse = (vectors / values.clamp(min=1e-14 * values[-1].item()).sqrt()).T
    return inverse
