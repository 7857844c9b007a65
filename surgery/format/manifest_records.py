"""What a manifest records of weight files, targets and the rest of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from surgery.files.file_records import FileRecord
from surgery.format.tensor_view import TensorView
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


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """See ``surgery.linalg.svd.Certificate``. Lists have one entry per direction, three significant digits."""

    method: str
    passes: int
    converged: bool
    residual: list[float]
    gap: list[float]


@dataclass(frozen=True, slots=True)
class Alias:
    """Another tensor that holds a target's parameter once more: the same bytes, and the model ties the two."""

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
        slice: the part of each matrix that is meant, None for all of it.
        rank: directions kept of each matrix.
        energy: share of the squared Frobenius norm in the kept part.
        s_first, s_last: largest and smallest kept singular value.
        sample_sha256: of a sample of the original entries, see ``surgery.format.sample``.
        residual_sample_sha256: of that of the residuals; None in the overlay layout.
        inexact: share of the entries that residual and factors alone do not give back; None in the overlay layout.
        factors_sha256: of the bytes of U, s and V, in this order, of the matrices one after the other.
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
        """Its tensor and the aliases of it."""
        return [self.tensor, *(alias.tensor for alias in self.aliases)]

    @property
    def seen_as(self) -> View:
        """How it is seen as matrices."""
        return _view(self.view, self.slice)

    @property
    def converged(self) -> bool:
        return all(certificate.converged for certificate in self.certificates)


# Asked for several times of each of thousands of targets, nearly all of which are seen alike.
@lru_cache(maxsize=256)
def _view(kind: str, part: Slice | None) -> View:
    return View(kind, part)  # type: ignore[arg-type]  # checked when the manifest is read


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """A tensor that was passed over.

    Attributes:
        tensor: its name.
        shard: the weight file that it is in.
        reason: why.
    """

    tensor: str
    shard: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """Where the weights came from.

    Attributes:
        kind: ``hub`` or ``folder``.
        repo_id, commit: on the hub; None for a local folder, whose path is private.
        subfolder: where the model is in there; None at the top.
    """

    kind: str
    repo_id: str | None
    commit: str | None
    subfolder: str | None = None


@dataclass(frozen=True, slots=True)
class LeftOutRecord:
    """A file of the source that is not taken over.

    Attributes:
        file: its path.
        reason: why.
    """

    file: str
    reason: str
