"""The folder that a result is written to, and how a whole result takes the place of an earlier one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from surgery.errors import OTHER_OUT, OVERWRITE, OptionError, OutputError, ScalesError, SurgeryError, WeightError, few
from surgery.files.access import all_below, check_replaceable, write_errors
from surgery.files.file_writer import sync_directory
from surgery.format.manifest import Manifest
from surgery.names import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    EXTRACTION_FILE,
    JOURNAL_DIR,
    MANIFEST_FILE,
    OUR_FILES,
    REPLACED_FILE,
    RESULT_DIR,
    SCALES_FILE,
    SPECTRA_FILE,
    SURGERY_DIR,
    is_litter,
)
from surgery.progress import note
from surgery.run.contents import files_in, loading_key, total_size
from surgery.run.disk_room import ROOM_HINT, DiskNeed, check_room
from surgery.run.journal import Journal
from surgery.source.file_names import is_read_by_loaders
from surgery.source.weight_files import is_index

_PARTIAL = ".partial"
#: Files by which loaders and readers recognize a result: they are removed first, and put in place last.
_DECIDING = (MANIFEST_FILE, CONFIG_FILE, SPECTRA_FILE, EXTRACTION_FILE, ADAPTER_CONFIG)


@dataclass(frozen=True, slots=True)
class ResultFiles:
    """What a new result consists of.

    Attributes:
        names: its files, relative to its folder.
        size: bytes that they take, about.
        earlier: files in the output folder that are known to belong to an earlier result, beyond what manifest and names tell.
    """

    names: frozenset[str]
    size: int
    earlier: frozenset[str] = frozenset()


@contextmanager
def result_folder(
    out: Path, journal: Journal, result: ResultFiles, beside: Sequence[DiskNeed], *, overwrite: bool
) -> Iterator[Path]:
    """The folder to write a result to: ``out``, empty, or with what an earlier start of the same run has written.

    With ``overwrite``, where there is an earlier result, it is a folder inside of ``out``. When the context is left without an
    error, the new result is whole and takes the place of the earlier one, of which nothing stays: the files that its manifest
    names, those with names of the new result, those that loaders look for beside a model's weights, and those of an unfinished
    run. Other weights, and other files in ``surgery/``, are refused at the beginning, as they would mix with the result. Any
    other file stays, and a note says so.

    Args:
        out: the folder, locked.
        journal: of the run, which is over when the context is left without an error.
        result: what will be written.
        beside: disk room that the run needs besides, perhaps on the same disk.
        overwrite: whether an earlier result may be replaced.

    Raises:
        OutputError: ``out`` is not empty, holds files of another origin or another unfinished run, has too little room, or
            cannot be written to.
    """
    place = _prepared(out, journal, result, beside, overwrite=overwrite)
    try:
        yield place
    except (OptionError, ScalesError, WeightError):
        if place != out:  # the same command would fail again: the earlier result stays, without an unfinished run beside it
            Journal.forget(out)
        raise
    new = files_in(place) if place != out else set(result.names)
    if place != out:
        Journal.replace(out, _stale(out, Journal.files(out)) - new)
        _take_place(out)
    kept = files_in(out) - new
    taken = {name for name in kept if is_read_by_loaders(name)}
    for names, what in (
        (kept - taken, "files that are no part of a model"),
        (taken, "files that loaders may take for a part of the model"),
    ):
        if names:
            note(f"{out} keeps {what}: {few(sorted(names))}")
    Journal.forget(out)


@contextmanager
def files_together(out: Path, journal: Journal, writes: Iterable[str], *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder in ``out`` to write a few files to, which take their places together when the context is left.

    Unlike with ``result_folder``, other files in ``out`` do not matter. Earlier files of these names are removed, also where
    there is no new one.

    Args:
        out: the folder, locked.
        journal: of the run, which is over when the context is left without an error.
        writes: names of the files.
        overwrite: whether earlier ones may be replaced.

    Raises:
        OutputError: one is there already; or ``out`` holds another unfinished run.
    """
    names, place = set(writes), out / RESULT_DIR
    goes_on = Journal.is_there(out) and (not overwrite or journal.matches())
    if goes_on:
        journal.check()
    elif Journal.is_replacing(out):  # another run has been stopped there, and its result is whole
        _take_place(out)
    if not Journal.is_there(out):
        Journal.forget(out)  # a finished run may have been stopped before it removed all of its journal
    with write_errors(out):
        present = {name for name in names if os.path.lexists(out / name)}
    for name in sorted(present - Journal.files(out)):
        check_replaceable(out / name)
        if not overwrite:
            raise OutputError(f"{out / name} is there already", hint=f"{OVERWRITE} replaces it; {OTHER_OUT} folder")
    if not goes_on:
        journal.claim(present)
        journal.drop()
        journal.begin()
    with write_errors(out):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    try:
        yield place
    except (OptionError, WeightError):  # the same command would fail again
        Journal.forget(out)
        raise
    new = files_in(place)
    journal.claim(names)
    Journal.replace(out, names - new)
    _take_place(out)
    Journal.forget(out)


def _prepared(out: Path, journal: Journal, result: ResultFiles, beside: Sequence[DiskNeed], *, overwrite: bool) -> Path:
    """Prepare the folder that ``result_folder`` yields; when this returns the journal says that the run has begun."""
    with write_errors(out):
        top = sorted(path.name for path in out.iterdir() if path.name != JOURNAL_DIR and not is_litter(path.name))
    _check_links(out)
    if Journal.is_there(out) and (not overwrite or journal.matches()):
        journal.check()
        if Journal.is_replacing(out):
            _take_place(out)
        place = out / RESULT_DIR if (out / RESULT_DIR).is_dir() else out
        present = files_in(place)
        check_room(DiskNeed(out, result.size, "the result", total_size(place, present & result.names)), *beside)
        with write_errors(place):
            for name in {name + _PARTIAL for name in result.names} & present:
                (place / name).unlink()
        return place
    if top and not overwrite:
        raise OutputError(
            f"{out} holds files already",
            got=few(top),
            hint=f"{OVERWRITE} replaces an earlier result; {OTHER_OUT} folder",
        )
    present = files_in(out)
    ours = _earlier_result(out, present) | result.earlier | result.names | Journal.files(out) | Journal.replaced(out)
    ours |= {name + _PARTIAL for name in ours}
    stale = _stale(out, ours)
    foreign = sorted(name for name in present - stale if _would_mix(name))
    if foreign:
        raise OutputError(
            f"{out} holds files that no run of surgery has written",
            got=few(foreign),
            hint="choose another folder with -o",
        )
    is_whole = bool(stale) and _may_be_whole(out, present)
    if is_whole:
        _check_way(out, result.names, present - stale)
    freed = total_size(out / RESULT_DIR, files_in(out / RESULT_DIR)) + (0 if is_whole else total_size(out, stale))
    hint = "remove the earlier result, which stays until then" if is_whole else ROOM_HINT
    check_room(DiskNeed(out, result.size, "the result", freed, hint), *beside)
    journal.claim(ours)
    journal.drop()
    with write_errors(out):
        shutil.rmtree(out / RESULT_DIR, ignore_errors=True)
        if is_whole:
            (out / RESULT_DIR).mkdir()
        else:
            _remove(out, stale)
    journal.begin()
    return out / RESULT_DIR if is_whole else out


def _may_be_whole(out: Path, present: set[str]) -> bool:
    """Whether ``out`` may hold a finished result, which must stay until the new one is whole."""
    if not Journal.is_there(out) or not {MANIFEST_FILE, CONFIG_FILE, EXTRACTION_FILE}.isdisjoint(present):
        return True
    return (out / RESULT_DIR).is_dir() and not Journal.is_replacing(out)


def _stale(out: Path, ours: set[str]) -> set[str]:
    """The files that have to be removed from the output folder: those in ``ours``, and those whose names only surgery gives."""
    return {name for name in files_in(out) if name in ours or OUR_FILES.fullmatch(name)}


def _take_place(out: Path) -> None:
    """Move a whole result from its folder inside of ``out`` to the place of the earlier one.

    Called again after a run was killed in it, it goes on where that stopped.
    """
    result = out / RESULT_DIR
    new, gone = files_in(result), Journal.replaced(out) & files_in(out)
    with write_errors(out):
        # Also the old files by which a loader recognizes a result, as the earlier one is not whole from here on.
        _remove(out, gone | (set(_DECIDING) & new & files_in(out)))
        for name in sorted(new, key=loading_key):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (result / name).replace(out / name)
            sync_directory((out / name).parent)
        shutil.rmtree(result, ignore_errors=True)
        (out / REPLACED_FILE).unlink()


def _remove(out: Path, files: set[str]) -> None:
    """Remove files of an earlier result, and folders that are empty then."""
    # The first to go are those without which no loader takes the folder for a model.
    for name in sorted(files, key=loading_key, reverse=True):
        (out / name).unlink()
        if name in _DECIDING:
            sync_directory((out / name).parent)
    for folder in sorted({parent for name in files for parent in PurePosixPath(name).parents[:-1]}, reverse=True):
        with suppress(OSError):  # other files are in it
            (out / folder).rmdir()


def _check_way(out: Path, writes: Iterable[str], kept: set[str]) -> None:
    """Refuse if a folder or file that stays has the name of one that the result will need."""
    for name in sorted(writes):
        above = {str(parent) for parent in PurePosixPath(name).parents}
        if (out / name).is_dir() or not kept.isdisjoint(above):
            raise OutputError(f"{out}: something is in the way of {name}", hint="remove it, or choose another folder with -o")


def _check_links(out: Path) -> None:
    """Refuse links to folders in the output: files would be written to the place that they lead to."""
    for path in all_below(out):
        if path.is_symlink() and path.is_dir():
            raise OutputError(f"{path} is a link to a folder", hint="remove it, or choose another folder with -o")


def _earlier_result(out: Path, present: set[str]) -> set[str]:
    """The files of an earlier result, by its manifest; without one, as after a fold, the files beside a model's weights."""
    is_model = CONFIG_FILE in present and any(map(_would_mix, present))
    beside = {name for name in present if is_model and is_read_by_loaders(name) and not _would_mix(name)}
    if not (out / MANIFEST_FILE).is_file():
        return beside
    try:
        manifest = Manifest.read(out)
    except SurgeryError as error:
        if isinstance(error.__cause__, OSError):  # it cannot be read, so nothing is known of its contents
            raise
        return beside
    return beside | {record.file for record in manifest.output_files()} | {MANIFEST_FILE, SCALES_FILE}


def _would_mix(name: str) -> bool:
    """Whether a file, if it stayed in the output folder, would be taken for part of the result."""
    return name.startswith(f"{SURGERY_DIR}/") or ("/" not in name and (name.endswith(".safetensors") or is_index(name)))
