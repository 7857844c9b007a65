"""``extraction.json``: the report of an extraction beside its adapter, which tells a complete result, and of which run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import OTHER_OUT, OVERWRITE, FormatError, OutputError, few
from surgery.extraction.told import ExtractedTarget, ExtractReport, OtherTensor
from surgery.files.file_records import FileRecord
from surgery.files.file_writer import write_file
from surgery.files.sealed import read_sealed, sealed
from surgery.format.decoding import decode
from surgery.names import EXTRACTION_FILE
from surgery.run.contents import not_as_recorded
from surgery.run.journal import differing_runs


def write_result(place: Path, report: ExtractReport, identity: Mapping[str, Any]) -> None:
    """Write the file, as the last one of a result: its report, and the identity of the run."""
    content = {name: value for name, value in report.as_json().items() if name != "out"}
    write_file(place / EXTRACTION_FILE, sealed({**content, "run": identity}))


def earlier_result(out: Path) -> dict[str, Any] | None:
    """What ``extraction.json`` in a folder says; None if there is none.

    Raises:
        FormatError: it is damaged.
        ReadError: it cannot be read.
    """
    path = out / EXTRACTION_FILE
    return read_sealed(path, f"{OVERWRITE} makes the adapter again") if path.is_file() else None


def replaced_result(out: Path) -> list[str]:
    """The files of the earlier result in a folder, as far as ``extraction.json`` tells: none if it is damaged."""
    try:
        earlier = earlier_result(out)
    except FormatError:
        return []
    return [] if earlier is None else [*(record["file"] for record in earlier["files"]), EXTRACTION_FILE]


def finished_result(place: Path, identity: Mapping[str, Any]) -> ExtractReport | None:
    """The report of the complete result of this run in the folder that it writes to; None without one."""
    try:
        earlier = earlier_result(place)
        return None if earlier is None else complete_result(place, earlier, identity)
    except (FormatError, OutputError):
        return None


def complete_result(out: Path, earlier: dict[str, Any], identity: Mapping[str, Any]) -> ExtractReport:
    """The report of the complete result in a folder.

    Raises:
        OutputError: it is that of another run, or has lost files since.
    """
    if differences := differing_runs(earlier.pop("run"), json.loads(json.dumps(identity))):
        raise OutputError(
            f"{out} holds the complete result of another run",
            got=few(differences, between="; "),
            hint=f"{OVERWRITE} replaces it; {OTHER_OUT} folder",
        )
    del earlier["schema_version"]
    kinds: Mapping[str, Any] = {"files": FileRecord, "targets": ExtractedTarget, "others": OtherTensor}
    for name, kind in kinds.items():
        earlier[name] = tuple(decode(kind, one, f"{out / EXTRACTION_FILE}: {name}") for one in earlier[name])
    report = ExtractReport(out=out, **{**earlier, "further": tuple(earlier["further"])})
    if lost := not_as_recorded(out, report.files):
        raise OutputError(
            f"{out} holds a complete result, but some of its files are missing or have changed since",
            got=few(lost),
            hint=f"{OVERWRITE} makes it again",
        )
    return report
