"""A model as the rest of the program sees it: weight files with headers, and files that go along."""

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
    """Where weight files are: those of a model, of a factorized folder, or what another process was sent to.

    Attributes:
        watch: sees to it that those which are here stay as they are while they are in use.
    """

    watch: Watch

    def size(self, file: str) -> int:
        """Bytes of a file."""

    def header(self, shard: str) -> Header:
        """The header of a weight file, without its weights where that can be had."""

    def fetch(self, file: str) -> Path:
        """A local path of a file, downloaded if need be; of one from the hub with the contents that the hub says."""

    def unchecked(self, file: str) -> Path:
        """``fetch`` for a weight file whose contents whoever reads all of it compares: with ``sha256``, or what is recorded."""

    def acquire(self, file: str) -> Path:
        """``unchecked`` for one that is needed until as many calls of ``release`` say that it is not, or until ``close``."""

    def release(self, file: str) -> bool:
        """See ``acquire``. Whether it is gone now."""

    def wait_for_room(self) -> None:
        """Returns when the next weight file may be acquired, or after ``close``."""

    def close(self) -> None:
        """Nothing more is wanted."""

    def sha256(self, file: str) -> str | None:
        """Of a weight file that has been fetched, if somebody else than the file itself says so."""

    def again(self, file: str) -> str | None:
        """The command that fetches a file once more, if it comes from the hub."""

    def origin(self, files: Iterable[str]) -> Origin:
        """Where some of the weight files are, for others to take them from."""

    def folders(self) -> list[Path]:
        """What must not be written to: the folders that the files are in, also by links, or the hub's cache."""

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of each file of a local model; empty where a commit or a manifest pins them."""

    def room_to_fetch(self) -> dict[Path, int]:
        """Where a download will go, and how much more of it will be there at a time; nowhere for what is local."""


class Source(WeightFiles, Protocol):
    """A model in a folder or on the hub.

    Attributes:
        name: what the user called it, for messages.
        record: its identity, for the manifest.
        selection: its files.
    """

    name: str
    record: SourceRecord
    selection: Selection

    def config(self) -> dict[str, Any]:
        """Its ``config.json``; empty if it has none."""

    def bytes_to_fetch(self) -> int:
        """How much is still to be downloaded."""


class FilesInPlace:
    """What ``WeightFiles`` that stay where they are have to say of coming and going."""

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
    """What a user should know of an index that says something else than the shards; loaders believe the shards.

    Raises:
        FormatError: it is the index of another model.
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
    with read_errors(path, where):
        check_size(path, where)
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8 text") from None
