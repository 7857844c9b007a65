"""A model as the rest of the program sees it: weight files with headers, and files that go along."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import FormatError, SourceError
from surgery.format.files import Watch, check_relative_path, check_size, read_json_object, reading
from surgery.format.manifest import SourceRecord
from surgery.format.safetensors import Header, ShardReader
from surgery.names import CONFIG_FILE
from surgery.source.origin import FolderOrigin, Origin
from surgery.source.select import Selection, index_entries, select_files

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Source(Protocol):
    """A model in a folder or on the hub.

    Attributes:
        name: what the user called it, for messages.
        record: its identity, for the manifest.
        selection: its files.
        watch: sees to it that those which are here stay as they are while they are in use.
    """

    name: str
    record: SourceRecord
    selection: Selection
    watch: Watch

    def size(self, file: str) -> int:
        """Bytes of one of its files."""

    def config(self) -> dict[str, Any]:
        """Its ``config.json``; empty if it has none."""

    def header(self, shard: str) -> Header:
        """The header of a weight file, without its weights where that can be had."""

    def fetch(self, file: str) -> Path:
        """A local path of one of its files, downloaded if need be."""

    def acquire(self, file: str) -> Path:
        """``fetch`` for a weight file that is needed until as many calls of ``release`` say that it is not."""

    def release(self, file: str) -> bool:
        """See ``acquire``. Whether it is gone now."""

    def wait_for_room(self) -> None:
        """Returns when the next weight file may be acquired, or after ``close``."""

    def close(self) -> None:
        """Nothing more is wanted."""

    def sha256(self, file: str) -> str | None:
        """Of a weight file that has been fetched, if somebody else than the file itself says so."""

    def origin(self, files: Iterable[str]) -> Origin:
        """Where some of its weight files are, for others to take them from."""

    def folder(self) -> Path | None:
        """What must not be written to: the folder it is in, or the hub's cache."""

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of each file of a local model; empty where a commit pins them."""

    def bytes_to_fetch(self) -> int:
        """How much is still to be downloaded."""

    def room_to_fetch(self) -> tuple[Path, int] | None:
        """Where a download will go and how much of it is there at a time; None for a local model."""


class Stays:
    """A source whose weight files stay where they are."""

    def fetch(self, file: str) -> Path:
        raise NotImplementedError

    def acquire(self, file: str) -> Path:
        return self.fetch(file)

    def release(self, file: str) -> bool:
        return False

    def wait_for_room(self) -> None: ...

    def close(self) -> None: ...

    def sha256(self, file: str) -> str | None:
        return None


class FolderSource(Stays):
    """A model in a local folder, or a snapshot of one from the hub's cache."""

    def __init__(
        self, root: Path, *, name: str | None = None, record: SourceRecord | None = None, within: Path | None = None
    ) -> None:
        self.name = name or str(root)
        self.record = record or SourceRecord("folder", None, None)
        self._root = root
        self._within = within or root  # a pipeline's other models are not to be written to either
        self.watch = Watch()
        with reading(root, self.name):
            names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        if self.record.kind == "folder":
            self._check_links(names)
        self.selection = select_files(names, lambda file: read_text(self.fetch(file), f"{self.name}/{file}"), where=self.name)

    def _check_links(self, names: list[str]) -> None:
        """Refuse links out of the folder: what they lead to would be copied into the result."""
        allowed = [self._within.resolve()]
        if self._within.absolute().parent.name == "snapshots":  # the hub's cache: a snapshot consists of links to blobs
            allowed.append((self._within.absolute().parent.parent / "blobs").resolve())
        for name in names:
            path = self._root / name
            real = path.resolve()
            if not any(folder in real.parents for folder in allowed):
                raise SourceError(
                    f"{self.name}/{name} is a link that leaves the model's folder",
                    got=str(real),
                    hint="put a copy of the file in its place",
                )

    def size(self, file: str) -> int:
        return (self._root / file).stat().st_size

    def config(self) -> dict[str, Any]:
        return read_config(self)

    def header(self, shard: str) -> Header:
        with ShardReader(self._root / shard, name=f"{self.name}/{shard}", watch=self.watch) as reader:
            return reader.header

    def fetch(self, file: str) -> Path:
        path = self._root / file
        self.watch.see(path, f"{self.name}/{file}")
        return path

    def folder(self) -> Path | None:
        # Of a snapshot in the hub's cache the whole repository.
        return self._within if self.record.kind == "folder" else self._within.parent.parent

    def stamps(self) -> dict[str, list[int]]:
        if self.record.kind != "folder":
            return {}
        return self._stamps((*self.selection.shards, *self.selection.others))

    def _stamps(self, files: Iterable[str]) -> dict[str, list[int]]:
        stamps = {file: self.watch.see(self._root / file, f"{self.name}/{file}") for file in files}
        # What a restart of the machine, or another place to mount a disk, leaves as it is.
        return {file: [stamp.size, stamp.mtime_ns] for file, stamp in stamps.items()}

    def bytes_to_fetch(self) -> int:
        return 0

    def room_to_fetch(self) -> tuple[Path, int] | None:
        return None

    def origin(self, files: Iterable[str]) -> FolderOrigin:
        # Of a model from the hub's cache each machine may have a copy of its own.
        return FolderOrigin(self._root.resolve(), self._stamps(files) if self.record.kind == "folder" else {})


def open_source(model: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Source:
    """The model that a user means: a local folder if there is one of that name, else a hub id.

    Args:
        model: path or ``owner/name``.
        revision: branch, tag or commit of a hub model; pinned to a commit at once.
        subfolder: of a folder or repository that holds several models, such as a diffusion pipeline.

    Raises:
        SourceError: not there, not reachable, or no model.
        FormatError: its index is damaged.
    """
    try:
        path = Path(model).expanduser()
        is_folder, is_file = bool(str(model)) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a null byte
        raise SourceError(f"there is no folder {str(model)[:100]!r}", got=str(error)[:200]) from None
    if is_folder:
        if revision is not None:
            raise SourceError(f"{model} is a local folder: it has no revisions", hint="leave --revision out")
        return _open_folder(path, str(model), subfolder)
    if is_file:
        raise SourceError(
            f"{model} is a file", expected="the folder that holds it, with its config.json", hint=f"give {path.parent}"
        )
    if not _REPO_ID.fullmatch(str(model)):
        raise SourceError(
            f"there is no folder {str(model)!r}", expected="a local folder or a Hugging Face repo id such as owner/name"
        )
    from surgery.source.hub import open_hub  # the hub client is slow to import and not needed for folders

    return open_hub(str(model), revision, subfolder)


def _open_folder(path: Path, name: str, subfolder: str | None) -> FolderSource:
    if subfolder is None:
        return FolderSource(path, name=name)
    inside = path / check_subfolder(subfolder)
    if not inside.is_dir():
        models = sorted({file.parent.relative_to(path).as_posix() for file in path.rglob("*.safetensors")} - {"."})
        raise SourceError(
            f"{name} has no subfolder {subfolder!r}",
            expected=", ".join(models) or "a model without subfolders",
            hint="--subfolder",
        )
    return FolderSource(inside, name=f"{name}/{subfolder}", record=SourceRecord("folder", None, None, subfolder), within=path)


def check_subfolder(subfolder: str) -> str:
    """``subfolder`` without slashes around it, if it stays inside."""
    return check_relative_path(subfolder.strip("/"), "--subfolder")


def read_config(source: Source) -> dict[str, Any]:
    """The ``config.json`` among a source's files; empty if there is none."""
    if CONFIG_FILE not in source.selection.others:
        return {}
    return read_json_object(source.fetch(CONFIG_FILE), f"{source.name}/{CONFIG_FILE}")


def check_index(source: Source, headers: dict[str, Header]) -> None:
    """Refuse an index that maps a tensor to a shard without it.

    Raises:
        FormatError: naming the tensor and the shard.
    """
    index = source.selection.index
    if index is None:
        return
    where = f"{source.name}/{index}"
    names = {shard: {entry.name for entry in header.tensors} for shard, header in headers.items()}
    for tensor, shard in index_entries(read_text(source.fetch(index), where), where).items():
        if tensor not in names[shard]:
            raise FormatError(
                f"{where}: {tensor!r} is not in the shard it is mapped to",
                got=shard,
                hint="index and shards are from different versions of the model: fetch it again",
            )


def read_text(path: Path, where: str) -> str:
    try:
        check_size(path, where)
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FormatError(f"{where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not UTF-8 text") from None
