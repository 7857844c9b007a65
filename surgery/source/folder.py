"""A model in a local folder, or a snapshot of one from the hub's cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.errors import SourceError, few
from surgery.escapes import quoted
from surgery.files.access import check_regular, read_errors
from surgery.files.hub_cache import cached_repo, hub_cache
from surgery.files.watch import Watch
from surgery.format.header import Header
from surgery.format.manifest_records import SourceRecord
from surgery.format.safetensors import ShardReader
from surgery.source.origin import FolderOrigin
from surgery.source.protocol import FilesInPlace, read_config, read_text
from surgery.source.select import Selection, select_plain_files


class FolderSource(FilesInPlace):
    """A model in a local folder, or in a snapshot of the hub's cache.

    Args:
        root: the folder of the model.
        name: what the user called it, for messages; ``root`` if None.
        record: its identity; that of a local folder if None.
        within: the folder of the pipeline that the model is a part of; links that lead inside it are followed, and it must
            not be written to. ``root`` if None.

    Raises:
        SourceError: it is no model that can be read, or a file to copy leads out of it by a link.
        FormatError: its index or a file's name is damaged.
        ReadError: the system does not let the folder be read.
    """

    def __init__(
        self, root: Path, *, name: str | None = None, record: SourceRecord | None = None, within: Path | None = None
    ) -> None:
        self.name = name or str(root)
        self.record = record or SourceRecord("folder", None, None)
        self._root = root
        self._within = within or root  # a pipeline's other models are not to be written to either
        self.watch = Watch()
        found = select_plain_files(self._names, self._text, where=self.name)
        self.selection = replace(found, notes=(*found.notes, *self._notes_of_newer(found)))
        for file in self.selection.others:
            check_regular(self._resolved_inside(file), f"{self.name}/{file}")
        for file in self.selection.shards:
            self._resolved(file)  # weights are only read: they may lie anywhere

    def _notes_of_newer(self, found: Selection) -> list[str]:
        """A note, if weight files of another save of the model are left out and are newer than those that are read."""
        if self.record.kind != "folder" or not found.rivals:
            return []
        last = max(self._mtime(file) for file in found.shards)
        newer = [file for file in found.rivals if self._mtime(file) > last]
        if not newer:
            return []
        read = found.index or found.shards[0]
        return [f"{newer[0]} is newer than {read}, which is read, as loaders read it; if the newer is meant, move {read} away"]

    def _mtime(self, file: str) -> float:
        path = self._root / file
        return path.stat().st_mtime if path.exists() else 0.0

    def note(self, text: str) -> None:
        """Add a note for the user about where the model comes from."""
        self.selection = replace(self.selection, notes=(*self.selection.notes, text))

    def _names(self, folder: str) -> list[str]:
        """The ``Listing`` of the model. Links to folders count as folders, unless they lead out of the model."""
        path = self._root / folder
        if folder:
            real = self._resolved_inside(folder)
            if real in {parent.resolve() for parent in path.parents}:
                raise SourceError(f"{self.name}/{folder} is a link to a folder that it lies in", got=str(real))
        with read_errors(path, f"{self.name}/{folder}"):
            return sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())

    def _text(self, file: str) -> str:
        self._resolved_inside(file)
        return read_text(self.fetch(file), f"{self.name}/{file}")

    def _resolved(self, file: str) -> Path:
        """Where a file is, whatever links lead to it."""
        try:
            return (self._root / file).resolve(strict=True)
        except (OSError, RuntimeError):  # links in a circle
            if (self._root / file).is_symlink():
                raise self._leads_nowhere(file) from None
            raise SourceError(
                f"{self.name}/{file} is not there any more",
                hint="put the file in its place; from the hub: fetch the model again",
            ) from None

    def _leads_nowhere(self, file: str) -> SourceError:
        """The error for a link to nothing. It names others in the same folder: the hub's cache may have lost all blobs."""
        folder = (self._root / file).parent.resolve()
        links = sorted(path for path in folder.iterdir() if path.is_symlink() and not path.exists())
        names = [path.name for path in links]
        target = Path(os.path.normpath(folder / (self._root / file).readlink()))
        cache = hub_cache(target)
        hint = "put the file in its place; from the hub: fetch the model again"
        if cache is not None and (repo_id := cached_repo(cache)) is not None:
            commit = next(
                (f" --revision {quoted(path.name)}" for path in (folder, *folder.parents) if path.parent.name == "snapshots"),
                "",
            )
            hint = f"the hub's cache has lost what they lead to; fetch it again: hf download {quoted(repo_id)}{commit}"
        return SourceError(
            f"{self.name}/{file} is a link that leads nowhere" + (f", one of {len(names)} here" if names[1:] else ""),
            got=str(target) if len(names) == 1 else few(names),
            expected="the files of the model",
            hint=hint,
        )

    def _resolved_inside(self, file: str) -> Path:
        """Where a file that is copied into the result is. It may be published, so it must not come from elsewhere by a link.

        Raises:
            SourceError: a link leads out of the model's folder, and not into the hub's cache.
        """
        real = self._resolved(file)
        within = self._within.resolve()
        if self.record.kind == "folder" and within not in (real, *real.parents) and hub_cache(real) is None:
            raise SourceError(
                f"{self.name}/{file} is a link that leaves the model's folder",
                got=str(real),
                hint="put a copy of the file in its place",
            )
        return real

    def size(self, file: str) -> int:
        path = self._root / file
        with read_errors(path, f"{self.name}/{file}"):
            return path.stat().st_size

    def config(self) -> dict[str, Any]:
        return read_config(self)

    def header(self, shard: str) -> Header:
        with ShardReader(self._root / shard, name=f"{self.name}/{shard}", watch=self.watch) as reader:
            return reader.header

    def fetch(self, file: str) -> Path:
        path = self._root / file
        self.watch.see(path, f"{self.name}/{file}")
        return path

    def folders(self) -> list[Path]:
        if self.record.kind != "folder":  # a snapshot: the whole repository in the hub's cache
            return [self._within.parent.parent]
        files = [self._resolved(file) for file in (*self.selection.shards, *self.selection.others)]
        return [self._within, *sorted({hub_cache(file) or file.parent for file in files} - {self._root.resolve()})]

    def stamps(self) -> dict[str, list[int]]:
        if self.record.kind != "folder":
            return {}
        return self._stamps((*self.selection.shards, *self.selection.others))

    def _stamps(self, files: Iterable[str]) -> dict[str, list[int]]:
        stamps = {file: self.watch.see(self._root / file, f"{self.name}/{file}") for file in files}
        # Unlike device and inode, these survive a restart of the machine and mounting the disk elsewhere.
        return {file: [stamp.size, stamp.mtime_ns] for file, stamp in stamps.items()}

    def bytes_to_fetch(self) -> int:
        return 0

    def room_to_fetch(self) -> dict[Path, int]:
        return {}

    def origin(self, files: Iterable[str]) -> FolderOrigin:
        # Each machine may have its own copy of a model in its hub's cache, with other times.
        return FolderOrigin(self._root.resolve(), self._stamps(files) if self.record.kind == "folder" else {})
