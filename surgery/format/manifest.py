"""``surgery/manifest.json``, which describes a factorized checkpoint. It is written last: a checkpoint with it is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.arguments import as_path
from surgery.errors import FormatError, SourceError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord
from surgery.files.file_writer import write_file
from surgery.files.json_files import MAX_OWN_JSON_BYTES
from surgery.files.paths import check_relative_path
from surgery.files.sealed import read_sealed, sealed
from surgery.format.decoding import decode
from surgery.format.manifest_records import LeftOutRecord, ShardRecord, SkippedRecord, SourceRecord, TargetRecord
from surgery.format.options import Options
from surgery.format.tensor_view import by_tensor
from surgery.format.views import KINDS
from surgery.names import (
    FACTORIZABLE_DTYPES,
    FORMAT_VERSION,
    FP8,
    FP8_WIDE,
    MANIFEST_FILE,
    PACKED_BITS,
    RUN_FILE,
    SURGERY_DIR,
    is_reserved,
)

_DAMAGED_HINT = "restore it, from a copy or by downloading it again, or factorize again with --overwrite"


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The result of factorizing one shard, as the journal of an unfinished run keeps it."""

    shard: ShardRecord
    targets: list[TargetRecord]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> ShardResult:
        """Decode and check what ``as_json`` gave. Raises FormatError if it makes no sense."""
        result = decode(cls, value, where)
        for target in result.targets:
            _check_target(target, where, overlay=result.shard.residual is None)
        return result


@dataclass(frozen=True)
class Manifest:
    """The whole manifest of a factorized checkpoint.

    ``fingerprint`` identifies the factors; scales files record it too. ``source_stamps`` identify the weight files of a
    local source, in the order of ``shards``. The list is empty for a model from the hub. ``options`` are the options
    that were asked for, with the name of the recipe that applied.
    """

    format_version: int
    tool: str
    torch: str
    device: str
    layout: str
    source: SourceRecord
    options: Options
    fingerprint: str
    source_stamps: list[str]
    shards: list[ShardRecord]
    files: list[FileRecord]
    left_out: list[LeftOutRecord]
    targets: list[TargetRecord]
    skipped: list[SkippedRecord]

    def as_bytes(self) -> bytes:
        """The bytes of the manifest's file. Their last entry is the manifest's own hash."""
        return sealed(self)

    def write(self, folder: str | Path) -> None:
        """Write the manifest to its file, atomically.

        Args:
            folder: the factorized checkpoint.

        Raises:
            FormatError: the entries contradict each other, or the manifest is too large to be read again. Nothing is
                written.
            OutputError: the disk is full or fails.
        """
        folder = as_path(folder, "folder")
        where = str(folder / MANIFEST_FILE)
        self._check(where)
        data = self.as_bytes()
        if len(data) > MAX_OWN_JSON_BYTES:
            raise FormatError(f"{where}: too large to be read again", got=f"{len(data)} bytes", expected=MAX_OWN_JSON_BYTES)
        write_file(folder / MANIFEST_FILE, data)

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a factorized checkpoint.

        Args:
            folder: a folder that ``factorize`` has written.

        Raises:
            OptionError: ``folder`` is not a path.
            SourceError: the folder is not a factorized checkpoint, or is an unfinished one.
            ReadError: the manifest cannot be read.
            FormatError: the manifest has been changed since it was written, contradicts itself, or has another version.
        """
        folder = as_path(folder, "folder")
        path = folder / MANIFEST_FILE
        with read_errors(folder):
            is_folder, is_file = folder.is_dir(), folder.is_file()
            there, begun = path.is_file(), (folder / RUN_FILE).is_file()
            unfinished = begun or (folder / SURGERY_DIR).is_dir()
        if not is_folder:
            raise SourceError(
                f"{folder} is a file" if is_file else f"there is no folder {folder}",
                expected="a folder written by surgery factorize",
            )
        if not there:
            hint = "give the folder that surgery factorize wrote"
            if begun:
                hint = "repeat the command that writes it: it continues where it stopped"
            elif unfinished:
                hint = "run surgery factorize again with --overwrite"
            raise SourceError(
                f"{folder} is {'an unfinished' if unfinished else 'no'} factorized checkpoint: it has no {MANIFEST_FILE}",
                hint=hint,
            )
        return cls._from_json(read_sealed(path, _DAMAGED_HINT), str(path))

    @classmethod
    def _from_json(cls, parsed: dict[str, Any], where: str) -> Manifest:
        if parsed.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{where}: another format version",
                got=parsed.get("format_version"),
                expected=FORMAT_VERSION,
                hint="use the version of surgery that wrote it, or factorize again",
            )
        manifest = decode(cls, parsed, where)
        manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        """Raises: FormatError: its entries contradict each other."""
        for record in self.output_files():
            check_relative_path(record.file, where)
        for shard in self.shards:
            check_relative_path(shard.source.file, where)
        if len(self.source_stamps) not in (0, len(self.shards)):
            raise FormatError(
                f"{where}: not one stamp for each weight file", got=len(self.source_stamps), expected=len(self.shards)
            )
        _check_names(self, where)
        for target in self.targets:
            _check_target(target, where, overlay=self.layout == "overlay")
        key, count = next(iter(Counter(target.key for target in self.targets).most_common(1)), ("", 0))
        if count > 1:
            raise FormatError(f"{where}: {key!r} is there twice")
        _check_shards(self, where)
        _check_slices(self.targets, where)
        _check_aliases(self, where)

    @property
    def lossless(self) -> bool:
        """Whether a fold with untouched scales gives the source back, bit for bit."""
        return self.layout == "overlay" or self.options.correction

    def output_files(self) -> list[FileRecord]:
        """All files of the checkpoint except the manifest and the scales file, which a trainer may replace."""
        written = [record for shard in self.shards for record in shard.written]
        return written + self.files

    def targets_of(self, shard: str) -> list[TargetRecord]:
        """The targets in one weight file of the source.

        Args:
            shard: path of the weight file in the source, such as ``model.safetensors``.
        """
        return self._by_shard.get(shard, [])

    def edited_in(self, shard: str) -> dict[str, TargetRecord]:
        """The tensors in one weight file of the source that a fold changes, each with its target.

        These are the tensors of targets and their aliases. If several slices of a tensor are targets, the tensor comes
        with one of them.

        Args:
            shard: path of the weight file in the source.
        """
        return self._edited.get(shard, {})

    def part(self, files: Iterable[str]) -> Manifest:
        """A smaller manifest for some weight files of the source.

        It has only the targets that concern these files, and the shards of these targets.

        Args:
            files: paths of the weight files in the source; unknown paths are ignored.
        """
        edited = {target.key: target for file in files for target in (*self.targets_of(file), *self.edited_in(file).values())}
        wanted = {*files, *(target.shard for target in edited.values())}
        shards = [self._shards[file] for file in sorted(wanted) if file in self._shards]
        none: list[Any] = []
        return dataclasses.replace(
            self,
            source_stamps=none,
            shards=shards,
            files=none,
            left_out=none,
            targets=list(edited.values()),
            skipped=none,
        )

    # Indexes: they are looked up for each of thousands of shards, and scanning all targets each time would be quadratic.
    @cached_property
    def _shards(self) -> dict[str, ShardRecord]:
        return {shard.source.file: shard for shard in self.shards}

    @cached_property
    def _by_shard(self) -> dict[str, list[TargetRecord]]:
        found: dict[str, list[TargetRecord]] = {}
        for target in self.targets:
            found.setdefault(target.shard, []).append(target)
        return found

    @cached_property
    def _edited(self) -> dict[str, dict[str, TargetRecord]]:
        found: dict[str, dict[str, TargetRecord]] = {}
        for target in self.targets:
            found.setdefault(target.shard, {})[target.tensor] = target
            for alias in target.aliases:
                found.setdefault(alias.shard, {})[alias.tensor] = target
        return found


def _check_target(target: TargetRecord, where: str, *, overlay: bool) -> None:
    """Check that the entries of a target fit its view, dtype and rank."""
    dtypes = (*FACTORIZABLE_DTYPES, FP8, FP8_WIDE, *PACKED_BITS) if overlay else FACTORIZABLE_DTYPES
    try:
        if target.view not in KINDS or target.dtype not in dtypes:
            raise ValueError(f"{target.view!r} of {target.dtype}")
        count, m, n = target.matrices
    except ValueError as error:
        raise FormatError(f"{where}: the view of {target.tensor!r} makes no sense", got=error) from None
    lengths = {len(numbers) for certificate in target.certificates for numbers in (certificate.residual, certificate.gap)}
    if not 1 <= target.rank <= min(m, n) or len(target.certificates) != count or lengths != {target.rank}:
        raise FormatError(f"{where}: the entries of {target.key!r} contradict each other")
    if odd := next((record for record in target.top_k if not record.makes_sense), None):
        raise FormatError(f"{where}: the top_k of {target.key!r} makes no sense", got=odd)


def _check_shards(manifest: Manifest, where: str) -> None:
    """Check that every target is in a listed shard, that shards with targets have factors, and residuals fit the layout."""
    owners = {target.shard for target in manifest.targets}
    for shard in manifest.shards:
        name = shard.source.file
        if (shard.residual is not None) != (manifest.layout == "residual"):
            raise FormatError(f"{where}: the layout {manifest.layout!r} and the entries of {name!r} contradict each other")
        if shard.factors is None and name in owners:
            raise FormatError(f"{where}: {name!r} has targets and no factors")
    if missing := sorted(owners - {shard.source.file for shard in manifest.shards}):
        raise FormatError(f"{where}: there are targets in a weight file that is not listed", got=missing[0])


def _check_names(manifest: Manifest, where: str) -> None:
    """Check that no two files have the same name, and that none has a name reserved for our own files."""
    names = [shard.source.file for shard in manifest.shards] + [record.file for record in manifest.files]
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise FormatError(f"{where}: the file {name!r} is there twice")
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        if is_reserved(name) or name in folders:
            raise FormatError(f"{where}: a file of the model cannot be called {name!r}")
    for shard in manifest.shards:
        if shard.residual is not None and shard.residual.file != shard.source.file:
            raise FormatError(f"{where}: the residual of {shard.source.file!r} has another name", got=shard.residual.file)


def _check_slices(targets: list[TargetRecord], where: str) -> None:
    """Check that targets of the same tensor are slices that do not overlap."""
    for tensor, parts in by_tensor(targets).items():
        slices = [part.slice for part in parts if part.slice is not None]
        alike = {(part.shard, part.dtype, tuple(part.shape), part.view) for part in parts}
        alike_cut = {(part.axis, part.period) for part in slices}
        ranges = sorted((part.start, part.stop) for part in slices)
        overlap = any(stop > start for (_, stop), (start, _) in pairwise(ranges))
        if len(parts) > 1 and (len(slices) < len(parts) or len(alike) > 1 or len(alike_cut) > 1 or overlap):
            raise FormatError(f"{where}: the targets of {tensor!r} contradict each other")


def _check_aliases(manifest: Manifest, where: str) -> None:
    """Check that no tensor is edited for two targets, and that all slices of a tensor have the same aliases."""
    shards = {shard.source.file for shard in manifest.shards}
    owners: dict[str, TargetRecord] = {}
    for target in manifest.targets:
        for tensor in target.tensors:
            owner = owners.setdefault(tensor, target)
            if (owner.tensor, owner.aliases) != (target.tensor, target.aliases):
                raise FormatError(f"{where}: {tensor!r} belongs to two targets", got=f"{owner.key} and {target.key}")
        if len(set(target.tensors)) < len(target.tensors) or any(alias.shard not in shards for alias in target.aliases):
            raise FormatError(f"{where}: the aliases of {target.key!r} make no sense")
    if passed := sorted({skipped.tensor for skipped in manifest.skipped} & owners.keys()):
        raise FormatError(f"{where}: {passed[0]!r} is both a target and passed over")


def source_stamp(record: FileRecord, mtime_ns: int) -> str:
    """A hash that tells a weight file of the source from another file with the same bytes, by the time of its last change.

    It is a hash, so that no time of the user's machine is in the manifest.

    Args:
        record: of the file.
        mtime_ns: when its contents last changed, in nanoseconds. This stays the same after a restart, where the disk is
            mounted elsewhere, and when the file is moved, or copied with its times.
    """
    return hashlib.sha256(f"{record.sha256} {mtime_ns}".encode()).hexdigest()


def fingerprint_of(targets: list[TargetRecord]) -> str:
    """The fingerprint of the factors: sha256 over the keys and the factors' hashes of all targets, sorted by key."""
    pairs = sorted((target.key, target.factors_sha256) for target in targets)
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()
