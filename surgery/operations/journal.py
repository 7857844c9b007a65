"""What an unfinished run has done so far, so that the same command goes on where it stopped.

In a hidden folder of the output, which no loader looks into and which is gone when the run is finished: ``run.json`` says
what the run is, and one file for each finished shard what became of it, written when all of the shard's files are in place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, OutputError, ReadError, few
from surgery.format.files import MAX_OWN_JSON_BYTES, read_json_object, reporting, write_file
from surgery.names import FILES_FILE, JOURNAL_DIR, REPLACED_FILE, RUN_FILE


class Journal:
    """The diary of the run that writes to ``out``.

    Args:
        out: the output folder.
        identity: all that the result depends on, as JSON: runs with the same give the same bytes.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self._out = out
        self._folder = out / JOURNAL_DIR
        self._identity = json.loads(json.dumps(identity))

    @staticmethod
    def is_there(out: Path) -> bool:
        """Whether ``out`` holds a run that was begun and not finished."""
        return (out / RUN_FILE).is_file()

    @staticmethod
    def forget(out: Path) -> None:
        """The result in ``out`` is complete: the run is over. The first thing to go is what says that it has begun."""
        with reporting(out):
            (out / RUN_FILE).unlink(missing_ok=True)
            (out / FILES_FILE).unlink(missing_ok=True)

    @staticmethod
    def is_replacing(out: Path) -> bool:
        """Whether the result of the run that was begun is whole, and was about to take the place of the earlier one."""
        return (out / REPLACED_FILE).is_file()

    def matches(self) -> bool:
        """Whether the run that was begun is this one."""
        try:
            return not self._differences()
        except (FormatError, ReadError):
            return False

    def _differences(self) -> list[str]:
        return differing(read_json_object(self._out / RUN_FILE, str(self._out / RUN_FILE)), self._identity)

    @staticmethod
    def files(out: Path) -> set[str]:
        """What the run that was begun would write, and what it found of an earlier result: all that may be removed."""
        return _listed(out / FILES_FILE)

    def claim(self, files: set[str]) -> None:
        """Say which files may be removed, before the first of them is."""
        _list(self._out / FILES_FILE, files)

    @staticmethod
    def replaced(out: Path) -> set[str]:
        """What is to go before the result takes its place."""
        return _listed(out / REPLACED_FILE)

    @staticmethod
    def replace(out: Path, files: set[str]) -> None:
        """Say that the result is whole, and which files are to go before it takes their place."""
        _list(out / REPLACED_FILE, files)

    def check(self) -> None:
        """Refuse to go on with a run that is not this one.

        Raises:
            OutputError: says what differs.
        """
        try:
            differences = self._differences()
        except (FormatError, ReadError) as error:
            raise OutputError(
                f"{self._out} holds an unfinished run whose journal is damaged", got=error.what, hint="--overwrite starts anew"
            ) from error
        if differences:
            raise OutputError(
                f"{self._out} holds an unfinished run of another kind",
                got=few(differences, between="; "),
                expected="the same command on the same model, to go on with it",
                hint="repeat the earlier command, start anew with --overwrite, or choose another folder with -o",
            )

    def drop(self) -> None:
        """Any other run that was begun is not gone on with."""
        with reporting(self._folder):
            (self._out / RUN_FILE).unlink(missing_ok=True)
            (self._out / REPLACED_FILE).unlink(missing_ok=True)
            for path in self._folder.glob("[0-9]*.json*"):
                path.unlink()

    def begin(self) -> None:
        """Say that the run has begun."""
        write_file(self._out / RUN_FILE, json.dumps(self._identity, indent=1).encode())

    @staticmethod
    def count(out: Path) -> int:
        """How many shards are finished."""
        return len(list((out / JOURNAL_DIR).glob("[0-9]*.json")))

    def record(self, index: int, value: Any) -> None:
        """Say that a shard is finished."""
        sealed = {"value": value, "sha256": _seal(value)}
        write_file(self._folder / f"{index + 1:05d}.json", json.dumps(sealed).encode())

    def recorded(self, index: int) -> Any:
        """What ``record`` was given for a shard; None if it is not finished, or if the record is damaged."""
        path = self._folder / f"{index + 1:05d}.json"
        if not path.is_file():
            return None
        try:
            sealed = read_json_object(path, str(path), most=MAX_OWN_JSON_BYTES)
        except (FormatError, ReadError):
            return None
        value = sealed.get("value")
        return value if sealed.get("sha256") == _seal(value) else None


def _list(path: Path, files: set[str]) -> None:
    write_file(path, json.dumps({"files": sorted(files)}).encode())


def _listed(path: Path) -> set[str]:
    """
    Raises:
        ReadError: the system does not let it be read.
    """
    try:
        listed = read_json_object(path, str(path), most=MAX_OWN_JSON_BYTES).get("files") if path.is_file() else []
    except FormatError:
        return set()
    return {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differing(before: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, each as ``path: before, now``."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in differing(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    if before == now:
        return []
    return [f"{where}: {json.dumps(before)[:80]} then, {json.dumps(now)[:80]} now"]
