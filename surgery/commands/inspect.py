"""The verb ``inspect``: what a factorized checkpoint holds, from its manifest and the header of its scales file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from surgery.device import on_its_own_terms
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import SkippedRecord, SourceRecord, TargetRecord, summary_of
from surgery.format.scales.reading import train_in
from surgery.format.top_k_records import TopKSummary
from surgery.names import SCALES_FILE, Train
from surgery.reports import NOT_IN_JSON, Report


@dataclass(frozen=True, slots=True)
class InspectedTarget:
    """A target of a factorized checkpoint, with the accuracy of its SVD.

    Attributes:
        key: its key among factors and scales.
        tensor: the name of its tensor in the checkpoint.
        slice: the slice of the tensor that is the target, such as ``q`` of a fused projection; None if the whole tensor
            is.
        shard: the weight file that it is in.
        shape: the shape of the tensor in the source.
        dtype: the dtype of the tensor in the source.
        view: how the tensor is seen: ``matrix``, ``stack`` or ``convolution``.
        matrices: B, m, n: the number of matrices and their shape (m, n).
        rank: how many directions are kept of each matrix.
        energy: share of the squared Frobenius norm in the kept part.
        s_first: the largest kept singular value.
        s_last: the smallest kept singular value.
        s_last_error: an upper bound on the relative error of ``s_last``.
        inexact: share of the entries that residual and factors alone do not give back exactly; None in the overlay
            layout.
        converged: whether the SVD reached the tolerance.
        method: method of the SVD; several if the matrices of a stack differ in it.
        passes: number of passes over the matrix; for a stack, the sum over its matrices.
        max_residual: the largest residual of a kept direction, over s_1.
        undetermined: how many kept directions the matrix does not determine: the gap to the next singular value is too
            small or not known.
        top_k: whether the kept values are the largest: ``proven``, ``likely`` or ``unknown``. For a stack, the worst of
            its matrices.
        margin: how far above ``s_last`` a singular value that was missed may lie, over s_1; None if ``top_k`` is
            ``unknown``. For a stack, the worst of its matrices.
        chance: an upper bound on the probability that this is wrong: 0 if ``top_k`` is ``proven``, 1 if it is
            ``unknown``.
        aliases: the other tensors that hold the same parameter and are changed together with it.
    """

    key: str
    tensor: str
    slice: str | None
    shard: str
    shape: tuple[int, ...]
    dtype: str
    view: str
    matrices: tuple[int, int, int]
    rank: int
    energy: float
    s_first: float
    s_last: float
    s_last_error: float
    inexact: float | None
    converged: bool
    method: str
    passes: int
    max_residual: float
    undetermined: int
    top_k: str
    margin: float | None
    chance: float
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, target: TargetRecord) -> InspectedTarget:
        known = target.worst_top_k
        return cls(
            key=target.key,
            tensor=target.tensor,
            slice=target.slice.name if target.slice else None,
            shard=target.shard,
            shape=tuple(target.shape),
            dtype=target.dtype,
            view=target.view,
            matrices=target.matrices,
            rank=target.rank,
            energy=target.energy,
            s_first=target.s_first,
            s_last=target.s_last,
            s_last_error=last_value_error(target),
            inexact=target.inexact,
            converged=target.converged,
            method=methods(target),
            passes=sum(certificate.passes for certificate in target.certificates),
            max_residual=largest_residual(target),
            undetermined=undetermined(target),
            top_k=known.verdict,
            margin=known.margin,
            chance=known.chance,
            aliases=tuple(alias.tensor for alias in target.aliases),
        )


@dataclass(frozen=True, slots=True)
class InspectReport(Report):
    """The contents of a factorized checkpoint.

    Attributes:
        layout: ``residual`` or ``overlay``.
        lossless: whether a fold with untouched scales gives the source back, bit for bit.
        source: the model that was factorized.
        fingerprint: the fingerprint of the factors, which scales files record.
        train: what the scales file holds: ``scales``, or ``core`` for cores; None if there is no file that can be read.
        trainable: how many numbers there are to train; without a scales file, the number of scales.
        top_k: for how many matrices it is known that no larger singular value was missed.
        targets: what has been factorized.
        skipped: the tensors that were passed over.
        manifest: the whole manifest.
    """

    layout: str
    lossless: bool
    source: SourceRecord
    fingerprint: str
    train: Train | None
    trainable: int
    top_k: TopKSummary
    targets: tuple[InspectedTarget, ...]
    skipped: tuple[SkippedRecord, ...]
    manifest: Manifest = field(repr=False, metadata=NOT_IN_JSON)


@on_its_own_terms
def inspect(factorized: str | Path) -> InspectReport:
    """What a factorized checkpoint holds, from its manifest and the header of its scales file.

    No other file of the checkpoint is read.

    Args:
        factorized: a folder that ``factorize`` has written.

    Returns:
        What the manifest says. Its entries have been checked against each other, but not against the files.

    Raises:
        SurgeryError: see ``Manifest.read``.
    """
    manifest = Manifest.read(factorized)
    train = train_in(Path(factorized) / SCALES_FILE, manifest)
    return InspectReport(
        layout=manifest.layout,
        lossless=manifest.lossless,
        source=manifest.source,
        fingerprint=manifest.fingerprint,
        train=train,
        trainable=sum(target.numbers_of(train or "scales") for target in manifest.targets),
        top_k=summary_of(manifest.targets),
        targets=tuple(map(InspectedTarget.of, manifest.targets)),
        skipped=tuple(manifest.skipped),
        manifest=manifest,
    )


def undetermined(target: TargetRecord) -> int:
    """How many kept directions are not determined: their residual is no smaller than their gap, or no gap is known."""
    return sum(
        residual >= gap
        for certificate in target.certificates
        for residual, gap in zip(certificate.residual, certificate.gap, strict=True)
    )


def largest_residual(target: TargetRecord) -> float:
    """The largest residual of any kept direction of a target, over the s_1 of its matrix."""
    return max(max(certificate.residual) for certificate in target.certificates)


def last_value_error(target: TargetRecord) -> float:
    """An upper bound of the relative error of s_k, the last kept value; 1 where it may be anything. The worst of all matrices.

    A residual bounds the error of a value, over the s_1 of its matrix. Of a stack the manifest has only the largest and the
    smallest value of all matrices; the s_k of one of them is at least as large as its gap.
    """
    share = target.s_last / target.s_first if target.s_first else 0.0

    def of(residual: float, least: float) -> float:
        return min(1.0, residual / least) if least else float(residual > 0)

    return max(of(certificate.residual[-1], max(share, certificate.gap[-1])) for certificate in target.certificates)


def methods(target: TargetRecord) -> str:
    """The methods that the matrices of a target were solved by, in words."""
    return ", ".join(sorted({certificate.method for certificate in target.certificates}))
