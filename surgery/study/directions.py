"""How far a matrix determines its singular directions, and what became of them in another matrix.

A scale that changes the order of singular values turns no direction, so directions are not compared by their place in the
order: each is compared with the one that it is assigned to (``surgery.study.matching``). Directions that a matrix
determines only together, as values are equal or nearly so, may be turned among themselves; they are taken such that they
match best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.linalg.svd import TruncatedSVD
from surgery.precision import full_precision
from surgery.study.matching import Floats, Indices, assignment, in_common, turned_onto

Flags = NDArray[np.bool_]

#: A direction is taken as determined by the matrix where the sine of its angle to the true one is bounded by this.
IDENTIFIED_ANGLE = 0.1
#: Values below this share of the largest are the rounding of float32.
NOISE = 1e-6
#: With more than this in common a direction is mostly another one, and no other is.
_MOSTLY = 1 / 2
#: A left vector with a smaller cosine than this with every one of the first matrix is new: epsilon in the definition of an
#: intruder dimension (Shuttleworth et al., arXiv 2410.21228, algorithm 1).
NEW = 1 / 2
#: A direction that is mapped to itself but for this share of its value has not turned, whatever its value is now.
_LEAK = 0.1
#: Of the distance at which noise may mix two directions, that at which it may change their order: three times the noise.
_ORDER = 0.3
#: Root mean square of the rounding of a number over its size, in spacings next to 1, if numbers are spread evenly on a log
#: scale: ``sqrt(3 / (8 log 2) / 12)``.
_ROUNDING = 0.2123


@dataclass(frozen=True, slots=True)
class Became:
    """What became of the k leading directions (u_i, v_i) of a matrix. Entries without a meaning are None.

    Attributes:
        place: place, from 1, of the direction of the other matrix that is mostly this one; None where none is.
        left_cosine, right_cosine: of the vectors of the direction that it is assigned to; None where one of the two is not
            determined, or the direction is gone.
        in_place: ``u_i^T W' v_i / s_i`` of the other matrix W'; None where s_i is no more than rounding, or u_i not
            determined.
        order_changes: pairs, with one of the first r at least, whose order in the other matrix is the other way round.
        gone: those of the first r, from 1, that W' still maps to themselves, with a value below all that was computed.
        new: places of those of the first r of W' whose left vectors have a cosine below 1/2 with each of the first matrix that
            was computed.
        new_certain: those of them that cannot be a left vector that was not computed either: too little of them lies outside
            of what those computed span, or there are no others.
    """

    place: list[int | None]
    left_cosine: list[float | None]
    right_cosine: list[float | None]
    in_place: list[float | None]
    order_changes: int
    gone: list[int]
    new: list[int]
    new_certain: list[int]


def known_values(svd: TruncatedSVD) -> torch.Tensor:
    """bool (k,), on the CPU: values that are more than the rounding of the matrix."""
    s = svd.s.double().cpu()
    return s > svd.certificate.residual.clamp(min=NOISE) * s[0]


def identified(svd: TruncatedSVD) -> torch.Tensor:
    """bool (k,), on the CPU: see ``IDENTIFIED_ANGLE``. A residual of 0 has still the rounding of its vectors."""
    certificate = svd.certificate
    rounding = torch.finfo(torch.float32).eps
    angles = certificate.residual.clamp(min=rounding) / certificate.gap.clamp(min=1e-300)
    return (angles < IDENTIFIED_ANGLE) & known_values(svd)


def storage_noise(before: TruncatedSVD, after: TruncatedSVD, spacings: tuple[float, float]) -> float:
    """Root mean square of what rounding to the stored dtypes takes from an entry of the difference of two matrices.

    Args:
        spacings: of the numbers next to 1 in the two dtypes.

    What is noise of this size in each entry turns two directions by about its ratio to the distance of their values.
    """
    entries = before.U.shape[0] * before.V.shape[0]
    sizes = [spacing * svd.norm.item() for spacing, svd in zip(spacings, (before, after), strict=True)]
    return _ROUNDING * math.hypot(*sizes) / math.sqrt(entries)


@dataclass(frozen=True, slots=True)
class DifferenceImages:
    """What the difference D (m, n) of two matrices makes of the K leading vectors of the first one.

    Attributes:
        left: (m, K), ``D V``.
        right: (n, K), ``D^T U``.
    """

    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True, slots=True)
class Matched:
    """The K leading directions of two matrices W and W' (m, n), each assigned to one of the other.

    Attributes:
        before, after: the SVDs.
        noise: of the entries of the difference, see ``storage_noise``.
        left, right: (K, K), products of vectors of W (rows) and W' (columns). Directions that a matrix determines only together
            have been turned to match best.
        match: (K,), for each of W the direction of W'.
        groups, groups_after: (K,), the first of those that W, or W', determines only together with it, itself if it is alone;
            -1 where these may go on beyond what was computed, or where values are no more than rounding.
        in_place: (K,), ``u_i^T W' v_i``.
        aside: (K,), the norm of what W' makes of u_i or v_i besides that, the larger of the two sides.
        followed: bool (K,), whether W determines ``u_i`` and ``v_i``, if it is known exactly.
    """

    before: TruncatedSVD
    after: TruncatedSVD
    noise: float
    left: Floats
    right: Floats
    match: Indices
    groups: Indices
    groups_after: Indices
    in_place: Floats
    aside: Floats
    followed: Flags

    @property
    def complete(self) -> bool:
        """Whether all directions were computed."""
        return len(self.match) == min(self.before.U.shape[0], self.before.V.shape[0])

    @property
    def sure(self) -> Flags:
        """bool (K,): whether both matrices determine the direction of W and the one that it is assigned to."""
        flags: Flags = (self.groups >= 0) & (self.groups_after[self.match] >= 0)
        return flags


def matched(before: TruncatedSVD, after: TruncatedSVD, images: DifferenceImages, noise: float) -> Matched:
    """Assign the directions of two matrices to one another.

    Args:
        before, after: SVDs of two matrices (m, n), both with the same number K of triplets.
        images: of all K vectors of the first one under the difference D.
        noise: of the entries of D, see ``storage_noise``.
    """
    with full_precision(before.U.device):
        left, right = ((a.T @ b).double().cpu().numpy() for a, b in ((before.U, after.U), (before.V, after.V)))
    match = _in_order(assignment(in_common(left, right)), before, after, noise)
    exact = _groups(before)
    U, V, to_left, to_right = before.U, before.V, images.left, images.right
    for group in _several(exact):
        turn = turn_rows(left, right, group, match[group])
        U, V, to_left, to_right = (_turned(vectors, group, turn) for vectors in (U, V, to_left, to_right))
    in_place, aside = _in_place(before, U, V, to_left, to_right)

    # From here on directions count as one group where the rounding of the stored numbers may have mixed them.
    old, new = _groups(before, noise), _groups(after, noise)
    for group in _several(old):
        turn_rows(left, right, group, match[group])
    owner = np.argsort(match)
    for group in _several(new):
        turn_rows(left.T, right.T, group, owner[group])
    followed = known_values(before).numpy() & (_first_ones(exact) >= 0)
    return Matched(before, after, noise, left, right, match, _first_ones(old), _first_ones(new), in_place, aside, followed)


def became(found: Matched, k: int, r: int) -> Became:
    """What became of the k leading directions.

    Args:
        found: K >= k directions of two matrices.
        k: as many are told.
        r: as many count as the top.
    """
    match, left, right = found.match, found.left, found.right
    rows, sure = np.arange(len(match)), found.sure
    mostly = sure & (in_common(left, right)[rows, match] > _MOSTLY)
    s, values = (svd.s.double().cpu().numpy() for svd in (found.before, found.after))
    least = NOISE * values[0] if found.complete else max(values[-1], NOISE * values[0])
    real = found.followed
    gone = real & ~mostly & (found.aside <= _LEAK * s) & (np.abs(found.in_place) - found.aside <= least)
    told = sure & ~gone
    new = _new(found, r)
    return Became(
        place=[int(j) + 1 if yes else None for j, yes in zip(match[:k], mostly[:k], strict=True)],
        left_cosine=_listed(np.minimum(np.abs(left[rows, match]), 1.0), told, k),
        right_cosine=_listed(np.minimum(np.abs(right[rows, match]), 1.0), told, k),
        in_place=_listed(found.in_place / np.where(real, s, 1.0), real, k),
        order_changes=_order_changes(np.where(mostly, match, -1), r),
        gone=[int(i) + 1 for i in np.flatnonzero(gone[:r])],
        new=[int(j) + 1 for j in np.flatnonzero(new)],
        new_certain=[int(j) + 1 for j in np.flatnonzero(new & ~_may_be_beyond(found, r))],
    )


def _new(found: Matched, r: int) -> Flags:
    """bool (r,): which of the first r of W' have no left vector of W beside them, of those computed that are no rounding."""
    cosines = np.abs(found.left[known_values(found.before).numpy(), :r])
    flags: Flags = (found.groups_after[:r] >= 0) & (cosines.max(axis=0, initial=0.0) < NEW)
    return flags


def _may_be_beyond(found: Matched, r: int) -> Flags:
    """bool (r,): whether enough of a left vector of W' lies outside of those of W that are known for one unknown to be it."""
    if found.complete:
        return np.zeros(min(r, len(found.match)), dtype=bool)
    flags: Flags = 1 - np.square(found.left[found.groups >= 0, :r]).sum(axis=0) >= NEW**2
    return flags


def _in_order(match: Indices, before: TruncatedSVD, after: TruncatedSVD, noise: float) -> Indices:
    """The matching with directions kept in order wherever values of either matrix are too close to be ordered."""
    match = match.copy()
    for group in _several(_groups(before, _ORDER * noise)):
        match[group] = np.sort(match[group])
    owner = np.argsort(match)
    for group in _several(_groups(after, _ORDER * noise)):
        owner[group] = np.sort(owner[group])
    return np.argsort(owner)


def turn_rows(left: Floats, right: Floats, group: Indices, others: Indices) -> Floats:
    """Rotate a group of rows of both matrices of products to match ``others`` best, and return the rotation."""
    turn = turned_onto(*(cosines[np.ix_(group, others)] for cosines in (left, right)))
    for cosines in (left, right):
        cosines[group] = turn.T @ cosines[group]
    return turn


def _groups(svd: TruncatedSVD, noise: float = 0.0) -> list[Indices | None]:
    """For each direction those that the matrix determines only together, itself among them; None where these may go on
    beyond what was computed, or where values are no more than rounding."""
    s, certificate = svd.s.double().cpu().numpy(), svd.certificate
    floor = np.maximum(certificate.residual.numpy(), torch.finfo(torch.float32).eps) * s[0]
    width = np.maximum(floor, noise) / IDENTIFIED_ANGLE
    ended = len(s) == min(svd.U.shape[0], svd.V.shape[0]) or certificate.gap[-1].item() * s[0] > width[-1]
    bounds = np.flatnonzero(s[:-1] - s[1:] > np.maximum(width[:-1], width[1:])) + 1
    known = known_values(svd).numpy()
    found: list[Indices | None] = []
    for group in np.split(np.arange(len(s)), bounds):
        members = group if known[group].all() and (ended or group[-1] < len(s) - 1) else None
        found += [members] * len(group)
    return found


def _first_ones(groups: list[Indices | None]) -> Indices:
    """(K,): for each direction the first one of its group; -1 where it has none."""
    return np.array([-1 if group is None else group[0] for group in groups], dtype=np.int64)


def _several(groups: list[Indices | None]) -> list[Indices]:
    """The groups with more than one direction, each once."""
    return [group for i, group in enumerate(groups) if group is not None and len(group) > 1 and group[0] == i]


def _turned(vectors: torch.Tensor, group: Indices, turn: Floats) -> torch.Tensor:
    """The columns with those of a group rotated among themselves."""
    turned, columns = vectors.clone(), torch.from_numpy(group).to(vectors.device)
    turned[:, columns] = vectors[:, columns] @ torch.from_numpy(turn).to(vectors)
    return turned


def _in_place(
    before: TruncatedSVD, U: torch.Tensor, V: torch.Tensor, to_left: torch.Tensor, to_right: torch.Tensor
) -> tuple[Floats, Floats]:
    """``u_i^T W' v_i``, and the norm of what W' makes of u_i or v_i besides that, the larger of the two sides."""
    components = (U * to_left).sum(dim=0, dtype=torch.float64).cpu().numpy()
    sizes = [torch.linalg.vector_norm(part, dim=0, dtype=torch.float64).cpu().numpy() for part in (to_left, to_right)]
    aside = [np.sqrt(np.maximum(size**2 - components**2, 0.0)) for size in sizes]
    return before.s.double().cpu().numpy() + components, np.maximum(*aside)


def _listed(values: Floats, known: Flags, k: int) -> list[float | None]:
    return [float(value) if sure else None for value, sure in zip(values[:k], known[:k], strict=True)]


def _order_changes(match: Indices, r: int) -> int:
    """Pairs of directions, one of the first r among them, with another order after than before; -1 is followed nowhere."""
    followed = np.flatnonzero(match >= 0)
    earlier = np.less.outer(followed, followed) & (followed < r)[:, None]
    return int((earlier & np.greater.outer(match[followed], match[followed])).sum())
