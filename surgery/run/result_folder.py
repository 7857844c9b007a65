"""The folder that a result is written to, and how a whole result takes the place of an earlier one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from surgery.errors import OptionError, OutputError, ScalesError, SurgeryError, WeightError, few
from surgery.files.access import all_below, check_replaceable, write_errors
from surgery.files.file_writer import sync_directory
from surgery.format.manifest import Manifest
from surgery.names import (
    CONFIG_FILE,
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
#: Those by which a loader or a reader takes a folder for a result: the first to go, and the last to come.
_DECIDING = (MANIFEST_FILE, CONFIG_FILE, SPECTRA_FILE)


@dataclass(frozen=True, slots=True)
class ResultFiles:
    """What a new result consists of.

    Attributes:
        names: its files, relative to its folder.
        size: bytes that they take, about.
        earlier: files in the output folder that belong to an earlier result, beside those that can be told from others by name.
    """

    names: frozenset[str]
    size: int
    earlier: frozenset[str] = frozenset()


@contextmanager
def result_folder(
    out: Path, journal: Journal, result: ResultFiles, beside: Sequence[DiskNeed], *, overwrite: bool
) -> Iterator[Path]:
    """The folder to write a result to: ``out``, empty, or with what an earlier start of the run has done.

    With ``overwrite``, where there is an earlier result, it is a folder inside of ``out``. When the context is left without an
    error the new result is whole, and takes the place of the earlier one: of what that consists of nothing stays. That
    is what its manifest names, what the new result has under the same names, what loaders look for beside a model's weights,
    and what an unfinished run leaves. Other weights and files in ``surgery/`` are a reason to refuse, as they would mix with
    the result or are not ours; any other file is left alone, with a note.

    Args:
        out: the folder, locked.
        journal: of the run, which is over when the context is left without an error.
        result: what will be written.
        beside: room that the run needs besides, maybe on the same disk.
        overwrite: whether an earlier result may be replaced.

    Raises:
        OutputError: ``out`` is not empty, not ours, holds another unfinished run, is too small, or not to be written.
    """
    place = _prepared(out, journal, result, beside, overwrite=overwrite)
    try:
        yield place
    except (OptionError, ScalesError, WeightError):
        if place != out:  # the same command would meet it again: nothing is left of it beside what it would have replaced
            Journal.forget(out)
        raise
    new = files_in(place) if place != out else set(result.names)
    if place != out:
        Journal.replace(out, _stale(out, Journal.files(out)) - new)
        _take_place(out)
    kept = files_in(out) - new
    taken = {name for name in kept if is_read_by_loaders(name)}
    for names, what in ((kept - taken, "what is no part of a model"), (taken, "what may be taken for part of it")):
        if names:
            note(f"{out} keeps {what}: {few(sorted(names))}")
    Journal.forget(out)


@contextmanager
def files_together(out: Path, journal: Journal, writes: Iterable[str], *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder in ``out`` to write a few files to, which take their places together when the context is left.

    Other than with ``result_folder`` whatever else is in ``out`` is nobody's business. Of earlier files of these names
    nothing stays then, also where there is no new one.

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
    elif Journal.is_replacing(out):  # of another run, whose result is whole
        _take_place(out)
    if not Journal.is_there(out):
        Journal.forget(out)  # what is left of a run that has come to its end
    with write_errors(out):
        present = {name for name in names if os.path.lexists(out / name)}
    for name in sorted(present - Journal.files(out)):
        check_replaceable(out / name)
        if not overwrite:
            raise OutputError(f"{out / name} is there already", hint="--overwrite replaces it; -o chooses another folder")
    if not goes_on:
        journal.claim(present)
        journal.drop()
        journal.begin()
    with write_errors(out):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    try:
        yield place
    except (OptionError, WeightError):  # the same command would meet it again
        Journal.forget(out)
        raise
    new = files_in(place)
    journal.claim(names)
    Journal.replace(out, names - new)
    _take_place(out)
    Journal.forget(out)


def _prepared(out: Path, journal: Journal, result: ResultFiles, beside: Sequence[DiskNeed], *, overwrite: bool) -> Path:
    """See ``result_folder``. The run has begun, or is gone on with, when this returns."""
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
            hint="--overwrite replaces an earlier result; -o chooses another folder",
        )
    present = files_in(out)
    ours = _earlier_result(out, present) | result.earlier | result.names | Journal.files(out) | Journal.replaced(out)
    ours |= {name + _PARTIAL for name in ours}
    stale = _stale(out, ours)
    foreign = sorted(name for name in present - stale if _would_mix(name))
    if foreign:
        raise OutputError(
            f"{out} holds files that no run of surgery has put there",
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
    """Whether what is there of earlier runs may be a finished result, which must not be lost before there is another."""
    if not Journal.is_there(out) or not {MANIFEST_FILE, CONFIG_FILE}.isdisjoint(present):
        return True
    return (out / RESULT_DIR).is_dir() and not Journal.is_replacing(out)


def _stale(out: Path, ours: set[str]) -> set[str]:
    """What has to go from the output folder, given what is ours by name."""
    return {name for name in files_in(out) if name in ours or OUR_FILES.fullmatch(name)}


def _take_place(out: Path) -> None:
    """The result, which is whole, to the place of the earlier one; gone on with where a run was killed meanwhile."""
    result = out / RESULT_DIR
    new, gone = files_in(result), Journal.replaced(out) & files_in(out)
    with write_errors(out):
        # Those by which a loader would take the folder for the earlier result, which is not whole from then on.
        _remove(out, gone | (set(_DECIDING) & new & files_in(out)))
        for name in sorted(new, key=loading_key):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (result / name).replace(out / name)
            sync_directory((out / name).parent)
        shutil.rmtree(result, ignore_errors=True)
        (out / REPLACED_FILE).unlink()


def _remove(out: Path, files: set[str]) -> None:
    """Files of an earlier result, and the folders that are empty then."""
    # From the first of them on no loader takes the folder.
    for name in sorted(files, key=loading_key, reverse=True):
        (out / name).unlink()
        if name in _DECIDING:
            sync_directory((out / name).parent)
    for folder in sorted({parent for name in files for parent in PurePosixPath(name).parents[:-1]}, reverse=True):
        with suppress(OSError):  # something else is in it
            (out / folder).rmdir()


def _check_way(out: Path, writes: Iterable[str], kept: set[str]) -> None:
    """Refuse where something that stays would be in the way of the result when it takes its place."""
    for name in sorted(writes):
        above = {str(parent) for parent in PurePosixPath(name).parents}
        if (out / name).is_dir() or not kept.isdisjoint(above):
            raise OutputError(f"{out}: something is in the way of {name}", hint="remove it, or choose another folder with -o")


def _check_links(out: Path) -> None:
    """A folder in the output that is a link would lead what is written elsewhere."""
    for path in all_below(out):
        if path.is_symlink() and path.is_dir():
            raise OutputError(f"{path} is a link to a folder", hint="remove it, or choose another folder with -o")


def _earlier_result(out: Path, present: set[str]) -> set[str]:
    """What a finished run has put into ``out``: by its manifest; as a fold keeps none, what a model has beside its weights."""
    is_model = CONFIG_FILE in present and any(map(_would_mix, present))
    beside = {name for name in present if is_model and is_read_by_loaders(name) and not _would_mix(name)}
    if not (out / MANIFEST_FILE).is_file():
        return beside
    try:
        manifest = Manifest.read(out)
    except SurgeryError as error:
        if isinstance(error.__cause__, OSError):  # which says nothing of what is in there
            raise
        return beside
    return beside | {record.file for record in manifest.output_files()} | {MANIFEST_FILE, SCALES_FILE}


def _would_mix(name: str) -> bool:
    """Whether a file that stays in the output folder would be taken for part of the result."""
    return name.startswith(f"{SURGERY_DIR}/") or ("/" not in name and (name.endswith(".safetensors") or is_index(name)))
