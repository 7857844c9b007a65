"""The records in a manifest: of shards, targets, skipped tensors, the source, and files that were left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from surgery.files.file_records import FileRecord
from surgery.files.json_files import NOT_IN_EARLIER
from surgery.format.tensor_view import TensorView
from surgery.format.top_k_records import NOT_ON_RECORD, TopKRecord, TopKSummary
from surgery.format.views import Slice, View


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One weight file of the source and what became of it.

    Attributes:
        source: the file of the source.
        residual: the file of this checkpoint in its place; None in the overlay layout.
        factors: the factors of its targets; None where it has none.
    """

    source: FileRecord
    residual: FileRecord | None
    factors: FileRecord | None

    @property
    def written(self) -> list[FileRecord]:
        """The files of this checkpoint: residual and factors, as far as there are any."""
        return [record for record in (self.residual, self.factors) if record is not None]


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """The certificate of a truncated SVD (``surgery.linalg.svd.Certificate``).

    The lists have one entry for each direction, with three significant digits. Earlier versions wrote no ``top_k``.
    """

    method: str
    passes: int
    converged: bool
    residual: list[float]
    gap: list[float]
    top_k: TopKRecord | None = field(default=None, metadata=NOT_IN_EARLIER)


@dataclass(frozen=True, slots=True)
class Alias:
    """A second tensor of the same parameter as a target's: it has the same bytes, and the model ties the two.

    Attributes:
        tensor: its name.
        shard: the weight file that it is in.
    """

    tensor: str
    shard: str


@dataclass(frozen=True, slots=True)
class TargetRecord(TensorView):
    """A factorized tensor, or a slice of one, seen as a batch of matrices.

    Attributes:
        tensor: its name in the checkpoint.
        shard: the file it is in.
        dtype, shape: of the tensor, as in the source.
        view: how it is seen: ``matrix``, ``stack`` or ``convolution`` (``surgery.format.views``).
        slice: the rows or columns of each matrix that are factorized; None for the whole matrix.
        rank: directions kept of each matrix.
        energy: share of the squared Frobenius norm in the kept part.
        s_first, s_last: largest and smallest kept singular value.
        sample_sha256: of a sample of the original's entries, see ``surgery.format.sample``.
        residual_sample_sha256: of the same sample of the residual; None in the overlay layout.
        inexact: share of the entries that residual and factors alone do not give back; None in the overlay layout.
        factors_sha256: of the bytes of U, s and V, in this order, of each matrix in turn.
        certificates: of the SVD of each matrix.
        aliases: the tensors that are edited together with it.
    """

    tensor: str
    shard: str
    dtype: str
    shape: list[int]
    view: str
    slice: Slice | None
    rank: int
    energy: float
    s_first: float
    s_last: float
    sample_sha256: str
    residual_sample_sha256: str | None
    inexact: float | None
    factors_sha256: str
    certificates: list[CertificateRecord]
    aliases: list[Alias] = field(default_factory=list)

    @property
    def tensors(self) -> list[str]:
        """The names of its tensor and of the aliases of that."""
        return [self.tensor, *(alias.tensor for alias in self.aliases)]

    @property
    def seen_as(self) -> View:
        """The view: how it is seen as matrices."""
        return _view(self.view, self.slice)

    @property
    def converged(self) -> bool:
        return all(certificate.converged for certificate in self.certificates)

    @property
    def top_k(self) -> list[TopKRecord]:
        """Of each matrix, whether its kept values are known to be the largest."""
        return [certificate.top_k or NOT_ON_RECORD for certificate in self.certificates]

    @property
    def worst_top_k(self) -> TopKRecord:
        """What is known of the matrix of which least is known."""
        return max(self.top_k, key=lambda record: record.rank)


def summary_of(targets: Iterable[TargetRecord]) -> TopKSummary:
    """Of how many matrices of these targets it is known that no larger singular value was missed."""
    return TopKSummary.of((target.key, record) for target in targets for record in target.top_k)


# Called several times for each of thousands of targets, nearly all of which have the same view.
@lru_cache(maxsize=256)
def _view(kind: str, part: Slice | None) -> View:
    return View(kind, part)  # type: ignore[arg-type]  # checked when the manifest is read


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """A tensor that is not a target.

    Attributes:
        tensor: its name.
        shard: the weight file that it is in.
        reason: why it is not a target.
    """

    tensor: str
    shard: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """The model that was factorized.

    Attributes:
        kind: ``hub`` or ``folder``.
        repo_id: id of the repository on the hub; None for a local folder, whose path is private.
        commit: the commit on the hub; None for a local folder.
        subfolder: the folder inside the repository, or inside the local folder, that holds the model; None if the model
            is at the top.
    """

    kind: str
    repo_id: str | None
    commit: str | None
    subfolder: str | None = None


@dataclass(frozen=True, slots=True)
class LeftOutRecord:
    """A file of the source that is not copied into the checkpoint.

    Attributes:
        file: its path.
        reason: why it is not copied.
    """

    file: str
    reason: str
