"""``Source`` and ``WeightFiles``: a model as the rest of the program sees it, wherever its files are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import FormatError
from surgery.files.access import read_errors
from surgery.files.json_files import check_size, read_json_object
from surgery.files.watch import Watch
from surgery.format.header import Header
from surgery.format.manifest_records import SourceRecord
from surgery.names import CONFIG_FILE
from surgery.source.origin import Origin
from surgery.source.select import Selection
from surgery.source.weight_files import index_entries


class WeightFiles(Protocol):
    """Access to weight files: those of a model, of a factorized checkpoint, or of an origin in another process.

    Attributes:
        watch: notices if local files change while they are in use.
    """

    watch: Watch

    def size(self, file: str) -> int:
        """The size of a file in bytes."""

    def header(self, shard: str) -> Header:
        """The header of a weight file; on the hub only the header is fetched."""

    def fetch(self, file: str) -> Path:
        """The local path of a file, which is downloaded if it is not there. A file of the hub is checked by its hash."""

    def unchecked(self, file: str) -> Path:
        """``fetch`` without checking the hash: for callers that read the whole weight file, and compare its hash then."""

    def acquire(self, file: str) -> Path:
        """``unchecked`` for a weight file that is needed for a while. Each call has to be matched by one of ``release``."""

    def release(self, file: str) -> bool:
        """Give up a weight file of ``acquire``. A streamed file is deleted by the last release; returns whether it is."""

    def wait_for_room(self) -> None:
        """Wait until the next weight file may be acquired, or until ``close``."""

    def close(self) -> None:
        """End downloads and waits that are under way."""

    def sha256(self, file: str) -> str | None:
        """The sha256 of a weight file by the hub or a manifest; None where only the file itself tells it."""

    def again(self, file: str) -> str | None:
        """The shell command that fetches a file again, if it comes from the hub."""

    def origin(self, files: Iterable[str]) -> Origin:
        """Where other processes take these weight files from."""

    def folders(self) -> list[Path]:
        """Folders that must not be written to: those that the files are in, also by links, or the hub's cache."""

    def stamps(self) -> dict[str, list[int]]:
        """File -> [size in bytes, time of change in ns] for a local model; empty where a commit or a manifest pins them."""

    def room_to_fetch(self) -> dict[Path, int]:
        """Folder -> bytes that downloads will still add to it at most at a time; empty for a local model."""


class Source(WeightFiles, Protocol):
    """A model in a folder or on the hub: its weight files, and the files that are copied into a result.

    Attributes:
        name: what the user called it, for messages.
        record: its identity, for the manifest.
        selection: which files are its weights, which are copied, and which are left out.
    """

    name: str
    record: SourceRecord
    selection: Selection

    def config(self) -> dict[str, Any]:
        """Its ``config.json``; empty if it has none."""

    def bytes_to_fetch(self) -> int:
        """Bytes of all its files that are still to be downloaded."""


class FilesInPlace:
    """Default methods of ``WeightFiles`` for files that stay where they are; subclasses have to define ``fetch``."""

    def fetch(self, file: str) -> Path:
        raise NotImplementedError

    def unchecked(self, file: str) -> Path:
        return self.fetch(file)

    def acquire(self, file: str) -> Path:
        return self.unchecked(file)

    def release(self, file: str) -> bool:
        return False

    def wait_for_room(self) -> None: ...

    def close(self) -> None: ...

    def sha256(self, file: str) -> str | None:
        return None

    def again(self, file: str) -> str | None:
        return None

    def folders(self) -> list[Path]:
        return []

    def stamps(self) -> dict[str, list[int]]:
        return {}

    def room_to_fetch(self) -> dict[Path, int]:
        return {}


def read_config(source: Source) -> dict[str, Any]:
    """The ``config.json`` among a source's files; empty if there is none."""
    if CONFIG_FILE not in source.selection.others:
        return {}
    return read_json_object(source.fetch(CONFIG_FILE), f"{source.name}/{CONFIG_FILE}")


def check_index(source: Source, headers: dict[str, Header]) -> list[str]:
    """Compare a model's index with the headers of its shards. Returns notes on differences: loaders follow the shards.

    Args:
        source: the model.
        headers: of its shards, by name.

    Raises:
        FormatError: the index has no tensor of the shards, so it belongs to another model.
    """
    index = source.selection.index
    if index is None:
        return []
    where = f"{source.name}/{index}"
    entries = index_entries(read_text(source.fetch(index), where), where)
    names = {shard: {entry.name for entry in header.tensors} for shard, header in headers.items()}
    there = set[str]().union(*names.values())
    if not there & entries.keys():
        raise FormatError(
            f"{where} names none of the tensors that its shards hold",
            got=repr(next(iter(entries))),
            hint="index and shards are from different models: fetch them again",
        )
    absent = [tensor for tensor in entries if tensor not in there]
    moved = [tensor for tensor, shard in entries.items() if tensor in there and tensor not in names[shard]]
    return [
        f"{index} {what}: {len(tensors)}, the first {tensors[0]}"
        for what, tensors in (
            ("names tensors that no shard holds", absent),
            ("names another shard than the tensor is in", moved),
        )
        if tensors
    ]


def read_text(path: Path, where: str) -> str:
    """The text of a small UTF-8 file; ``where`` is its name in messages.

    Raises:
        ReadError: it cannot be read.
        FormatError: it is too large, or not UTF-8.
    """
    with read_errors(path, where):
        check_size(path, where)
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8 text") from None
