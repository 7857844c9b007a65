"""The job of one shard of ``spectra``: measure each of its matrices, alone or compared with that of a fine-tuned model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.walk import Piece, ShardWalk, TargetPiece
from surgery.errors import FormatError, WeightError
from surgery.files.access import read_errors
from surgery.files.file_records import file_sha256
from surgery.format.safetensors import spacing_of
from surgery.format.tensor_view import by_tensor
from surgery.planning.plan import Plan
from surgery.planning.targets import Target
from surgery.progress import listening
from surgery.quantized.recognize import Quantization
from surgery.report.schema import check_target
from surgery.reports import rounded_to
from surgery.run.resume import Recorded
from surgery.source.component import config_folder
from surgery.source.protocol import Source
from surgery.study.spectrum import DecomposedMatrix, compare, spectrum
from surgery.tuned.model import TunedModel
from surgery.tuned.search import Original, find_tuned
from surgery.weights.model import StudiedWeights

#: So that a window is one piece of a shard: matrices are measured one by one, and need not wait for others.
_WINDOW_BYTES = 1
#: Triplets computed beyond those that are told, for directions that have changed places: a quarter of these, or so many.
_BEYOND = 16
_DIGITS = 6


class Measure(Protocol):
    """Measures one matrix, alone or with the tuned one."""

    @property
    def triplets(self) -> int:
        """How many singular triplets are computed of each matrix, if it has as many."""

    def __call__(self, old: torch.Tensor, new: torch.Tensor | None, spacings: tuple[float, float]) -> dict[str, Any]:
        """The figures of a matrix.

        Args:
            old: the matrix (m, n), on the device where the arithmetic runs.
            new: the tuned one (m, n), on the same device; None without one.
            spacings: the machine epsilon of the dtype that each is stored in.
        """


@dataclass(frozen=True, slots=True)
class SpectraMeasure:
    """A ``Measure`` of what ``spectra`` tells.

    Attributes:
        top: singular values that are told.
        subspace: dimension of the leading subspaces that are compared.
        tolerance, seed: of the truncated SVD.
        compared: whether there is a tuned model.
    """

    top: int
    subspace: int
    tolerance: float
    seed: int
    compared: bool

    @property
    def triplets(self) -> int:
        """See ``Measure``."""
        return self.top + self._beyond

    @property
    def _beyond(self) -> int:
        return max(_BEYOND, self.top // 4) if self.compared else 0

    def __call__(self, old: torch.Tensor, new: torch.Tensor | None, spacings: tuple[float, float]) -> dict[str, Any]:
        """See ``Measure``: the figures as docs/study.md describes them."""
        top, seed, beyond = self.top, self.seed, self._beyond
        described, before = spectrum(old, top, beyond=beyond, tolerance=self.tolerance, seed=seed)
        figures = asdict(described)
        if new is not None:
            changed, after = spectrum(new, top, beyond=beyond, tolerance=self.tolerance, seed=seed)
            figures["tuned"] = asdict(changed)
            pair = DecomposedMatrix(old, before, spacings[0]), DecomposedMatrix(new, after, spacings[1])
            figures |= compare(*pair, top, self.subspace, seed=seed).figures()
        short: dict[str, Any] = rounded(figures)
        return short


def rounded(value: Any) -> Any:
    """A value of JSON with all floats rounded to six significant digits, which is as much as float32 weights can tell."""
    if isinstance(value, float):
        return rounded_to(value, _DIGITS)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class ShardSpectra:
    """The result of a job.

    Attributes:
        sha256: of the weight file, as it was read; None if the result is from the journal.
        targets: the figures of each matrix, in the order of the file, as docs/study.md describes them.
    """

    sha256: str | None
    targets: list[dict[str, Any]]


class SpectraJobs:
    """The jobs of a study, which are ``LocalJobs`` and ``RecordedJobs``: one for each shard with targets. A context manager.

    Args:
        source, plan: the model and its plan.
        other: the fine-tuned model; None without one.
        measure: measures one matrix.

    Attributes:
        shard_files: the weight file of each job.

    Raises:
        SourceError: the fine-tuned model lacks a tensor, or has it in another shape.
    """

    def __init__(self, source: Source, plan: Plan, other: Source | None, measure: Measure) -> None:
        self._shards = [shard for shard in plan.shards if shard.targets]
        self.shard_files = [shard.file for shard in self._shards]
        self._source = source
        self._other = other
        self._measure = measure
        self._progress = listening()
        self._hashes: dict[Path, str] = {}
        self._prefix = _common_prefix([_generic(target.tensor) for target in plan.targets])
        quantized = {target.tensor: target.quantized for target in plan.targets if target.quantized is not None}
        self._weights = StudiedWeights(source, lambda: Quantization(quantized))
        self._tuned: TunedModel | None = None
        if other is not None:
            shapes = {entry.name: entry.shape for shard in plan.shards for entry in shard.header.tensors}
            wanted: dict[str, tuple[str, ...]] = {target.tensor: () for target in plan.targets}
            self._tuned = find_tuned(other, Original(wanted, shapes, lambda: config_folder(source)))

    def __enter__(self) -> Self:
        if self._tuned is not None:
            self._tuned.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._weights.__exit__(kind, error, trace)
        finally:
            if self._tuned is not None:
                self._tuned.__exit__(kind, error, trace)

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """See ``LocalJobs``."""
        for index in which:
            self._source.acquire(self._shards[index].file)
            yield index

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object]) -> ShardSpectra:
        """See ``LocalJobs``."""
        shard = self._shards[index]
        inside = by_tensor(shard.targets)
        described: list[dict[str, Any]] = []

        def measure(window: Sequence[Piece]) -> list[dict[str, Any]]:
            pieces = (piece for piece in window if isinstance(piece, TargetPiece))
            return [found for piece in pieces for found in self._piece(piece, inside[piece.entry.name], lane.device)]

        def finish(window: Sequence[Piece], found: list[dict[str, Any]]) -> None:
            described.extend(found)
            for piece in window:
                if isinstance(piece, TargetPiece):
                    self._progress.item(piece.entry.name)
                self._progress.advance(len(piece))

        portions = {name: parts[0].at_a_time for name, parts in inside.items()}
        with (
            self._weights.opened(shard.file) as reader,
            ShardWalk(reader, portions, lane.buffers, lane.timing) as walk,
        ):
            lane.flow(walk, _WINDOW_BYTES, measure, finish, on_read)
        self._weights.check(shard.file, walk.sha256)
        return ShardSpectra(walk.sha256, described)

    def close(self) -> None:
        """See ``LocalJobs``."""
        self._source.close()

    def tell(self, index: int) -> None:
        """See ``RecordedJobs``."""
        shard = self._shards[index]
        self._progress.item(shard.file)
        self._progress.advance(shard.header.data_bytes)

    def _identities(self, index: int) -> list[dict[str, Any]]:
        """For each matrix of a shard, in the order of the file, the entries of its figures that say which one it is."""
        header, found = self._shards[index].header, []
        portions = {target.tensor: target.at_a_time for target in self._shards[index].targets}
        for entry in header.tensors:
            if entry.name in portions:
                parts = [target for target in self._shards[index].targets if target.tensor == entry.name]
                count = entry.shape[0] if parts[0].view.kind == "stack" else 1
                step = portions[entry.name] or count
                for first in range(0, count, step):
                    for target in parts:
                        some = range(first, min(first + step, count))
                        found += [self._identity(target, i if target.view.kind == "stack" else None) for i in some]
        return found

    def as_json(self, index: int, result: ShardSpectra) -> Any:
        """See ``RecordedJobs``: the figures, and the hashes of the local files that they were measured from."""
        if self._source.record.kind == "folder" and result.sha256 is not None:
            self._hashes[self._source.fetch(self._shards[index].file)] = result.sha256
        return {"files": self._files(index), "targets": result.targets}

    def recorded(self, index: int, value: Any) -> Recorded[ShardSpectra] | None:
        """See ``RecordedJobs``."""
        targets = value.get("targets") if isinstance(value, dict) else None
        identities = self._identities(index)
        if not isinstance(targets, list) or len(targets) != len(identities):
            return None
        for target, identity in zip(targets, identities, strict=True):
            try:
                check_target(target, compared=self._other is not None)
            except FormatError:
                return None
            if any(target.get(name, ...) != expected for name, expected in identity.items()):
                return None
        return Recorded(ShardSpectra(None, targets)) if value.get("files") == self._files(index) else None

    def _files(self, index: int) -> list[list[str]]:
        """Name and sha256 of each local file that a shard's figures are measured from. For a hub model its commit is enough."""
        shard = self._shards[index]
        models = [(self._source, [shard.file])]
        if self._other is not None and self._tuned is not None:
            models.append((self._other, self._tuned.shards_of(target.tensor for target in shard.targets)))
        return [
            [file, self._sha256(model.fetch(file))]
            for model, files in models
            if model.record.kind == "folder"
            for file in files
        ]

    def _sha256(self, path: Path) -> str:
        if path not in self._hashes:
            with read_errors(path):
                self._hashes[path] = file_sha256(path)
        return self._hashes[path]

    def _piece(self, piece: TargetPiece, targets: Sequence[Target], device: torch.device) -> list[dict[str, Any]]:
        weight = self._weights.exact_piece(piece, device)
        changed = None if self._tuned is None else self._tuned.weight(piece)
        stored = [targets[0].dtype] if self._tuned is None else [targets[0].dtype, self._tuned.dtype(piece.entry.name)]
        spacings = tuple(map(spacing_of, stored))
        described = []
        for target in targets:
            old = target.view.matrices(weight)
            new = None if changed is None else target.view.matrices(changed)
            for i, matrix in enumerate(old):
                index = piece.first + i if target.view.kind == "stack" else None
                try:
                    figures = self._figures((matrix, None if new is None else new[i]), (spacings[0], spacings[-1]), device)
                except WeightError as error:
                    raise WeightError(f"{target.shard}: {target.key!r}: {error.what}", hint="repair the model") from error
                described.append({**self._identity(target, index), **figures})
        return described

    def _figures(
        self, pair: tuple[torch.Tensor, torch.Tensor | None], spacings: tuple[float, float], device: torch.device
    ) -> dict[str, Any]:
        """The figures of a matrix on the CPU, measured on a device."""

        def on(pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]], where: torch.device) -> list[dict[str, Any]]:
            return [self._measure(old.to(where), None if new is None else new.to(where), spacings) for old, new in pairs]

        return as_memory_allows(on, [pair], device)[0]

    def _identity(self, target: Target, index: int | None) -> dict[str, Any]:
        # The first number in the name; one of more digits is no layer's.
        number = re.search(r"(?:^|\.)([0-9]{1,9})\.", target.tensor)
        part = target.view.slice.name if target.view.slice else None
        group = _generic(target.tensor).removeprefix(self._prefix).removesuffix(".weight").removesuffix("_weight")
        return {
            "tensor": target.tensor,
            "slice": part,
            "matrix": index,
            "key": target.key if index is None else f"{target.key}#{index}",
            "group": group if part is None else f"{group}[{part}]",
            "layer": int(number[1]) if number else None,
            "view": target.view.kind,
            "dtype": target.dtype,
            "shape": list(target.matrices[1:]),
        }


def _generic(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"(?:(?<=\.)|^)\d+\.", "", name)


def _common_prefix(names: Sequence[str]) -> str:
    """The longest common prefix of names in whole parts, such as ``model.layers.``."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for some in zip(*parts, strict=False):
        if len(set(some)) > 1:
            break
        common.append(some[0])
    # Two parts of each name must be left, such as ``self_attn.q_proj``.
    return "".join(f"{part}." for part in common[: max(0, min(map(len, parts)) - 1)])
