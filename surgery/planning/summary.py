"""The summary of a plan, which is its JSON: without the headers that it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.format.manifest_records import LeftOutRecord, SkippedRecord
from surgery.names import Train
from surgery.planning.targets import Target
from surgery.reports import Report


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """A weight that would be factorized, or a slice of one.

    Attributes:
        tensor: its name.
        slice: the part of it that is meant, such as ``q`` of a fused projection; None for all of it.
        shard: the weight file that it is in.
        dtype, shape: of the tensor, as stored.
        view: how it is seen: ``matrix``, ``stack`` or ``convolution``.
        matrices: B, m, n: how many matrices, and their shape.
        rank: directions to keep of each; the most, where an energy decides.
        energy: share of the squared Frobenius norm to keep; None: exactly ``rank`` directions.
        aliases: the tensors that hold the same parameter once more.
    """

    tensor: str
    slice: str | None
    shard: str
    dtype: str
    shape: tuple[int, ...]
    view: str
    matrices: tuple[int, int, int]
    rank: int
    energy: float | None
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, target: Target) -> PlannedTarget:
        return cls(
            tensor=target.tensor,
            slice=target.view.slice.name if target.view.slice else None,
            shard=target.shard,
            dtype=target.dtype,
            shape=target.shape,
            view=target.view.kind,
            matrices=target.matrices,
            rank=target.rank,
            energy=target.energy,
            aliases=tuple(alias.tensor for alias in target.aliases),
        )


@dataclass(frozen=True, slots=True)
class PlanSummary(Report):
    """A plan without the headers that it was made from.

    Attributes:
        layout: ``residual`` or ``overlay``.
        recipe: the name of the recipe that applies; None: the defaults for any model.
        targets: what would be factorized.
        skipped: every other tensor.
        notes: what the user should know before the run.
        files_along, bytes_along: what goes along as it is: config, tokenizer, code; how many files, and bytes.
        left_out: files and folders of the source that stay behind.
        prove: whether it would be proven of each matrix that no larger singular value was missed.
        train: what the trainable file would hold: ``scales``, or ``core`` for cores.
        trainable: how many numbers that makes; the most, where an energy decides.
        reached: share of the weights that would be targets, by number of entries, that are; less than 1 where some are passed
            over for the way they are stored, as ``skipped`` and a note tell.
        bytes_read: over the whole run.
        bytes_written: the same; an upper estimate.
        download_bytes: what a model from the hub still has to be fetched of.
        temporary_bytes: how much of that is on the disk at a time.
        workers: how many matrices are worked on at a time.
        peak_memory_bytes: of this machine's memory; an upper estimate.
        device_memory_bytes: of each GPU's memory; 0 without one.
    """

    layout: str
    recipe: str | None
    targets: tuple[PlannedTarget, ...]
    skipped: tuple[SkippedRecord, ...]
    notes: tuple[str, ...]
    files_along: int
    bytes_along: int
    left_out: tuple[LeftOutRecord, ...]
    prove: bool
    train: Train
    trainable: int
    reached: float
    bytes_read: int
    bytes_written: int
    download_bytes: int
    temporary_bytes: int
    workers: int
    peak_memory_bytes: int
    device_memory_bytes: int
