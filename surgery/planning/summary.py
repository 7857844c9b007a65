"""The summary of a plan, which is its JSON: without the headers that it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.format.manifest_records import LeftOutRecord, SkippedRecord
from surgery.names import Train
from surgery.planning.targets import Target
from surgery.reports import Report


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """A weight, or a slice of a weight, that would be factorized.

    Attributes:
        tensor: its name.
        slice: the slice of the tensor that is the target, such as ``q`` of a fused projection; None if the whole tensor
            is.
        shard: the weight file that it is in.
        dtype: the dtype of the tensor, as stored.
        shape: the shape of the tensor, as stored.
        view: how the tensor is seen: ``matrix``, ``stack`` or ``convolution``.
        matrices: B, m, n: the number of matrices and their shape (m, n).
        rank: directions to keep of each matrix; with an energy, the largest number possible.
        energy: share of the squared Frobenius norm to keep; None: exactly ``rank`` directions are kept.
        aliases: the other tensors that hold the same parameter.
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
    """The plan of a factorization, as JSON has it.

    Attributes:
        layout: ``residual`` or ``overlay``.
        recipe: the name of the recipe that applies; None: the default rules for any model.
        targets: what would be factorized.
        skipped: every other tensor.
        notes: what the user should know before the run.
        files_along: number of other files that would be copied, such as config, tokenizer and code.
        bytes_along: the size of these files.
        left_out: files and folders of the source that would not be copied.
        prove: whether surgery would prove for each matrix that no larger singular value was missed.
        train: what the trainable file would hold: ``scales``, or ``core`` for cores.
        trainable: number of trainable scales, or of numbers in cores. With an energy it is the largest number possible.
        reached: share of the weights that should be targets and are targets, by number of entries. It is less than 1 if
            surgery passes over some of them because of the way they are stored; ``skipped`` and a note name these.
        bytes_read: bytes that the whole run would read.
        bytes_written: bytes that the whole run would write; an upper estimate.
        download_bytes: bytes of a hub model that still have to be downloaded.
        temporary_bytes: how much of the download is on the disk at one time.
        workers: how many matrices are processed at the same time.
        peak_memory_bytes: memory that the run needs on this machine; an upper estimate.
        device_memory_bytes: memory that the run needs on each GPU; 0 without a GPU.
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
