"""Where the weight files of a factorized checkpoint lie: in its own folder, or in the model it was made from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from surgery.errors import FormatError, OptionError, SourceError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, file_sha256, not_as_described
from surgery.files.json_files import read_json_object
from surgery.files.watch import Watch
from surgery.format.header import Header, TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, TargetRecord
from surgery.format.safetensors import ShardReader
from surgery.names import CONFIG_FILE
from surgery.progress import listening, phase
from surgery.source.address import address_of
from surgery.source.open import open_part, open_source
from surgery.source.origin import FolderOrigin, Origin
from surgery.source.protocol import Source
from surgery.weights.quantization import FP8, Scaled, quantization_of, read_quantization

BASE_HINT = "give the model that was factorized with --base"


class Weights(Protocol):
    """Where the weight files are that a fold begins with.

    Attributes:
        watch: sees to it that they do not change meanwhile.
    """

    @property
    def watch(self) -> Watch: ...

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        """Where a shard's weights are, and what that file must be."""


class OwnWeights:
    """The residual layout: weights lie in the factorized folder itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.watch = Watch()

    def folders(self) -> list[Path]:
        return []  # the factorized folder is an input anyway

    def stamps(self) -> dict[str, list[int]]:
        return {}  # the manifest has the hashes of its files

    def room_to_fetch(self) -> dict[Path, int]:
        return {}

    def acquire(self, shard: str) -> None: ...

    def release(self, shard: str) -> bool:
        return False

    def wait_for_room(self) -> None: ...

    def close(self) -> None: ...

    def origin(self, files: Iterable[str]) -> Origin:
        return FolderOrigin(self._folder.resolve(), {})  # whose files have hashes in the manifest

    def check(self, shards: Iterable[ShardRecord]) -> None: ...

    def header(self, shard: ShardRecord) -> Header:
        with ShardReader(self.file(shard)[0], watch=self.watch) as reader:
            return reader.header

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        """See ``Weights``."""
        if shard.residual is None:
            raise FormatError(
                f"{self._folder}: the manifest of a residual checkpoint lacks a weight file", got=shard.source.file
            )
        return self._folder / shard.residual.file, shard.residual


class BaseWeights:
    """The overlay layout: weights lie in the model that was factorized."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._there = frozenset(source.selection.shards)

    @property
    def watch(self) -> Watch:
        """See ``Source``."""
        return self._source.watch

    def folders(self) -> list[Path]:
        return self._source.folders()

    def stamps(self) -> dict[str, list[int]]:
        """See ``Source.stamps``."""
        return self._source.stamps()

    def room_to_fetch(self) -> dict[Path, int]:
        """See ``Source.room_to_fetch``."""
        return self._source.room_to_fetch()

    def acquire(self, shard: str) -> None:
        """See ``Source.acquire``."""
        self._source.acquire(shard)

    def release(self, shard: str) -> bool:
        """See ``Source.acquire``."""
        return self._source.release(shard)

    def wait_for_room(self) -> None:
        """See ``Source.wait_for_room``."""
        self._source.wait_for_room()

    def close(self) -> None:
        """See ``Source.close``."""
        self._source.close()

    def origin(self, files: Iterable[str]) -> Origin:
        """See ``Source.origin``."""
        return self._source.origin(files)

    def check(self, shards: Iterable[ShardRecord]) -> None:
        """Refuse what is seen not to be the base before a weight of it is read.

        Raises:
            SourceError: it lacks a weight file.
            FormatError: one has another size.
        """
        for shard in shards:
            self._check_there(shard)
            if (size := self._source.size(shard.source.file)) != shard.source.size:
                path = Path(self._source.name) / shard.source.file
                raise not_as_described(path, f"of {size} bytes", shard.source, BASE_HINT)

    def _check_there(self, shard: ShardRecord) -> None:
        if shard.source.file not in self._there:
            raise SourceError(f"{self._source.name} is not the base of this overlay: it has no {shard.source.file}")

    def header(self, shard: ShardRecord) -> Header:
        """Of a weight file, without its weights where that can be had."""
        return self._source.header(shard.source.file)

    def quantized(self, factorized: Path, manifest: Manifest) -> dict[str, Scaled]:
        """Its FP8 weights and where their scales are, by the config of the checkpoint that was factorized.

        Raises:
            FormatError: that config has been edited since, and speaks of another quantization than the base.
        """
        config, is_edited = _own_config(factorized, manifest)
        if is_edited and quantization_of(config) != quantization_of(self._source.config()):
            raise FormatError(
                f"{factorized / CONFIG_FILE} has been edited, and speaks of another quantization than the model",
                got=quantization_of(config),
                expected=quantization_of(self._source.config()),
                hint="restore that part of it from the source model",
            )
        with phase(listening(), "reading headers"):
            headers = {shard: self._source.header(shard) for shard in self._source.selection.shards}
        return read_quantization(config, headers, self._source.name)

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        """See ``Weights``."""
        self._check_there(shard)
        return self._source.unchecked(shard.source.file), shard.source


class SentWeights:
    """The same of either kind, in a process that was sent there. A context manager.

    Args:
        origin: where the files come from.
        layout: of the checkpoint.
    """

    def __init__(self, origin: Origin, layout: str) -> None:
        self.watch = Watch(pinned=origin.pinned)
        self._origin = origin
        self._layout = layout
        self._here: dict[str, Path] = {}
        self._open = ExitStack()
        self._one = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def file(self, shard: ShardRecord) -> tuple[Path, FileRecord]:
        """See ``Weights``."""
        record = shard.residual if self._layout == "residual" else shard.source
        if record is None:
            raise FormatError("the manifest of a residual checkpoint lacks a weight file", got=shard.source.file)
        with self._one:
            if record.file not in self._here:
                self._here[record.file] = self._open.enter_context(self._origin.file(record.file))
            return self._here[record.file], record


def quantized_weights(
    manifest: Manifest, factorized: Path, weights: OwnWeights | BaseWeights, *, all_of_them: bool
) -> Mapping[str, Scaled]:
    """The FP8 weights of a checkpoint and where their scales are, if it has FP8 targets or if all are wanted.

    Raises:
        SourceError: a target is not FP8 in the base.
    """
    targets = [target.tensor for target in manifest.targets if target.dtype == FP8]
    if not isinstance(weights, BaseWeights) or not (all_of_them or targets):
        return {}
    quantized = weights.quantized(factorized, manifest)
    if lost := [tensor for tensor in targets if tensor not in quantized]:
        raise SourceError(f"the base is not that of this overlay: {lost[0]!r} is not FP8 there")
    return quantized


def shard_path(weights: Weights, shards: Mapping[str, ShardRecord], name: str) -> Path:
    """Where a weight file of the source is.

    Raises:
        SourceError: the manifest knows no such file.
    """
    if name not in shards:
        raise SourceError(f"the base is not that of this overlay: it has another weight file, {name}")
    return weights.file(shards[name])[0]


def open_base(base: str | Path, manifest: Manifest) -> Source:
    """The model that a user says a checkpoint was made from, maybe by the pipeline that it is a part of.

    The repository that the manifest names is opened at the commit that it names, unless the user gives a revision.
    """
    record, address = manifest.source, address_of(base)
    is_named = address.folder is None and address.repo_id == record.repo_id and address.subfolder in (None, record.subfolder)
    if is_named and address.revision is None and record.repo_id is not None:
        return open_source(record.repo_id, revision=record.commit, subfolder=record.subfolder)
    return open_part(base, record.subfolder)


def weight_source(
    factorized: Path, manifest: Manifest, base: str | Path | None, stream: tuple[Path, int] | None = None
) -> OwnWeights | BaseWeights:
    """Where the weights of a factorized checkpoint are: with itself, or in the model that it was made from.

    Args:
        factorized, manifest: of the checkpoint.
        base: the model, if not the one that the manifest names.
        stream: where its weight files pass through, and how many at a time; None: they stay in the hub's cache.

    Raises:
        OptionError: a base, or a stream, for a checkpoint that holds its own weights.
        SourceError: an overlay on a local model, and no base; or one to be streamed.
    """
    if manifest.layout == "residual":
        if base is not None:
            raise OptionError("--base is for overlays; this checkpoint holds its own weights", hint="leave --base out")
        if stream is not None:
            raise OptionError("--stream is for overlays; this checkpoint holds its own weights", hint="leave --stream out")
        return OwnWeights(factorized)
    record = manifest.source
    if base is not None:
        source = open_base(base, manifest)
    elif record.repo_id is not None:
        source = open_source(record.repo_id, revision=record.commit, subfolder=record.subfolder)
    else:
        raise SourceError(
            f"{factorized} is an overlay on a local model, and does not say where that is",
            hint="--base FOLDER, the model it was factorized from",
        )
    if stream is not None:
        from surgery.source.stream import streamed  # the hub client is slow to import

        source = streamed(source, *stream)
    return BaseWeights(source)


def _own_config(factorized: Path, manifest: Manifest) -> tuple[dict[str, Any], bool]:
    """The ``config.json`` of a factorized checkpoint, empty if there was none, and whether it is another than in the source."""
    record = next((record for record in manifest.files if record.file == CONFIG_FILE), None)
    if record is None:
        return {}, False
    path = factorized / CONFIG_FILE
    with read_errors(path):
        is_edited = file_sha256(path) != record.sha256
    return read_json_object(path, str(path)), is_edited


def check_entry(entry: TensorEntry, target: TargetRecord) -> None:
    """Refuse a tensor that is not what the manifest says.

    Raises:
        FormatError: another dtype or shape.
    """
    if entry.dtype != target.dtype or list(entry.shape) != target.shape:
        raise FormatError(
            f"{target.shard}: {target.tensor!r} is not as the manifest describes it",
            got=f"{entry.dtype} {list(entry.shape)}",
            expected=f"{target.dtype} {target.shape}",
        )
