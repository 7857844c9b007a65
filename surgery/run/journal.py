"""The journal of a run: what it has done so far, so that the same command goes on where an earlier one stopped.

It is a hidden folder in the output folder, which no loader looks into and which is removed when the run is finished.
``run.json`` holds the identity of the run. One file for each finished shard holds the shard's result, and is written when all
of the shard's files are in place. It names its run and shard and has its own hash: a record of another one is not used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import OTHER_OUT, OVERWRITE, FormatError, OutputError, ReadError, few
from surgery.files.access import write_errors
from surgery.files.file_writer import write_file
from surgery.files.json_files import MAX_OWN_JSON_BYTES, read_json_object
from surgery.files.sealed import read_sealed, sealed
from surgery.names import FILES_FILE, JOURNAL_DIR, PARTS_DIR, REPLACED_FILE, RUN_FILE

#: The key of an identity under which the hash of all targets is.
_TARGETS = "targets"
#: In the path of a file's size and time.
_FILES = ".files."
_SHA256 = re.compile("[0-9a-f]{64}")


class Journal:
    """The journal of a run. The static methods ask about whatever run the folder holds, the others are about this run.

    Args:
        out: the output folder.
        identity: all that the result depends on, as JSON. Runs of the same identity give the same bytes.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self._out = out
        self._folder = out / JOURNAL_DIR
        self._identity = json.loads(json.dumps(identity))
        self._run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def is_there(out: Path) -> bool:
        """Whether ``out`` holds a run that was begun and not finished."""
        return (out / RUN_FILE).is_file()

    @staticmethod
    def forget(out: Path) -> None:
        """Remove the marks of an unfinished run, as its result is complete or of no use: first the one that it has begun."""
        with write_errors(out):
            (out / RUN_FILE).unlink(missing_ok=True)
            (out / FILES_FILE).unlink(missing_ok=True)

    @staticmethod
    def is_replacing(out: Path) -> bool:
        """Whether the run in ``out`` was stopped while its whole result took the place of an earlier one."""
        return (out / REPLACED_FILE).is_file()

    def matches(self) -> bool:
        """Whether the unfinished run in ``out`` has the identity of this one."""
        try:
            return not self._differences()
        except (FormatError, ReadError):
            return False

    def _differences(self) -> list[str]:
        return differing_runs(read_json_object(self._out / RUN_FILE, str(self._out / RUN_FILE)), self._identity)

    @staticmethod
    def files(out: Path) -> set[str]:
        """The files that the unfinished run in ``out`` may remove: its own, and those of an earlier result."""
        return _listed(out / FILES_FILE)

    def claim(self, files: set[str]) -> None:
        """Record which files may be removed, before the first of them is."""
        _list(self._out / FILES_FILE, files)

    @staticmethod
    def replaced(out: Path) -> set[str]:
        """The files of an earlier result that are to be removed before the new one takes its place; see ``replace``."""
        return _listed(out / REPLACED_FILE)

    @staticmethod
    def replace(out: Path, files: set[str]) -> None:
        """Record that the new result is whole, and which files are to be removed before it takes their place."""
        _list(out / REPLACED_FILE, files)

    def check(self) -> None:
        """Refuse to go on with an unfinished run of another identity.

        Raises:
            OutputError: says what differs.
        """
        try:
            differences = self._differences()
        except (FormatError, ReadError) as error:
            raise OutputError(
                f"{self._out} holds an unfinished run whose journal is damaged",
                got=error.what,
                hint=f"{OVERWRITE} starts again",
            ) from error
        if differences:
            raise OutputError(
                f"{self._out} holds an unfinished run of another kind",
                got=few(differences, between="; "),
                expected="the same command on the same model, which continues it",
                hint=f"repeat the earlier command; or {OVERWRITE} starts again; {OTHER_OUT} folder",
            )

    def drop(self) -> None:
        """Remove the records of an unfinished run, with which this one does not go on, and then what its jobs have left."""
        with write_errors(self._folder):
            records = self._folder.glob("[0-9]*.json*")
            for path in (self._out / RUN_FILE, self._out / REPLACED_FILE, *records, self._out / PARTS_DIR):
                clear_away(path)

    def begin(self) -> None:
        """Record that the run has begun, and its identity."""
        _write(self._out / RUN_FILE, json.dumps(self._identity, indent=1).encode())

    @staticmethod
    def count(out: Path) -> int:
        """How many shards the run in ``out`` has finished."""
        return len(list((out / JOURNAL_DIR).glob("[0-9]*.json")))

    def record(self, index: int, file: str, value: Any) -> None:
        """Record that a shard is finished.

        Args:
            index: of the shard, from 0.
            file: its name in the source.
            value: its result, as JSON.
        """
        _write(self._record(index), sealed({**self._whose(index, file), "value": value}))

    def recorded(self, index: int, file: str) -> Any:
        """The value that ``record`` was given for a shard; None if there is no record, or it is damaged or another run's."""
        path = self._record(index)
        if not path.is_file() or path.is_symlink():
            return None
        try:
            found = read_sealed(path, "")
        except (FormatError, ReadError):
            return None
        value = found.pop("value", None)
        return value if found == self._whose(index, file) else None

    def _record(self, index: int) -> Path:
        return self._folder / f"{index + 1:05d}.json"

    def _whose(self, index: int, file: str) -> dict[str, Any]:
        """The part of a record that says which run and which shard it belongs to."""
        return {"run": self._run, "shard": index, "file": file}


def clear_away(path: Path) -> None:
    """Remove whatever is at a path that a file of the journal needs: a file, a link, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with write_errors(path):
        if not path.is_file():
            clear_away(path)
    write_file(path, data)


def _list(path: Path, files: set[str]) -> None:
    _write(path, json.dumps({"files": sorted(files)}).encode())


def _listed(path: Path) -> set[str]:
    """The files that ``_list`` has written; empty if there is no such list, or a damaged one.

    Raises:
        ReadError: the system does not let it be read.
    """
    try:
        listed = read_json_object(path, str(path), most=MAX_OWN_JSON_BYTES).get("files") if path.is_file() else []
    except FormatError:
        return set()
    return {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


def differing_runs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where the identities of two runs differ, as ``differing`` tells it.

    Other options or another model mostly mean other targets too. So that these differ is told only where nothing else does.
    """
    differences = differing(before, now)
    return [line for line in differences if not line.startswith(f"{_TARGETS}: ")] or differences


def differing(before: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ: a text for each place, with its path, the value before, and the one now.

    Hashes, and the sizes and times of files, say nothing to a reader and are left out.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in differing(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    if before == now:
        return []
    of_file = _FILES in where and isinstance(before, list) and isinstance(now, list)
    if of_file or all(isinstance(value, str) and _SHA256.fullmatch(value) for value in (before, now)):
        return [f"{where}: changed"]
    return [f"{where}: {json.dumps(before)[:80]} then, {json.dumps(now)[:80]} now"]
