"""The output folder: refused where it must not be, checked for room, and an earlier result in it replaced by a whole one."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from surgery.errors import FormatError, OptionError, OutputError, ReadError, ScalesError, SurgeryError, WeightError, few
from surgery.format.files import FileRecord, check_file, check_replaceable, reporting, sync_directory
from surgery.format.manifest import Manifest
from surgery.names import (
    CONFIG_FILE,
    FILES_FILE,
    JOURNAL_DIR,
    LOCK_FILE,
    MANIFEST_FILE,
    OUR_FILES,
    REPLACED_FILE,
    RESULT_DIR,
    RUN_FILE,
    SCALES_FILE,
    SPECTRA_FILE,
    SURGERY_DIR,
    is_litter,
)
from surgery.operations.journal import Journal
from surgery.progress import listening, note, phase
from surgery.source.select import is_read_by_loaders
from surgery.source.shards import is_index

_PARTIAL = ".partial"
#: Those by which a loader or a reader takes a folder for a result: the first to go, and the last to come.
_DECIDING = (MANIFEST_FILE, CONFIG_FILE, SPECTRA_FILE)
_ROOM_HINT = "free some space, or choose a folder on another disk"


@contextmanager
def locked(out: Path, inputs: Iterable[Path]) -> Iterator[None]:
    """Hold the output folder, created if missing, against other runs. The system lets go of a dead one's lock.

    If the run is interrupted, a note says how to go on.

    Args:
        out: the folder.
        inputs: folders and files that are read; ``out`` may neither be one, nor lie in one, nor hold one.

    Raises:
        OutputError: another run holds it, it is one of the inputs or no folder, or it cannot be written to.
    """
    with reporting(out):
        _check_apart(out, inputs)
        _check_leads_somewhere(out)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is no folder", hint="choose another folder with -o")
        made = not out.exists()
        (out / JOURNAL_DIR).mkdir(parents=True, exist_ok=True)
        for path in (out / JOURNAL_DIR, out / LOCK_FILE):
            if path.is_symlink():
                raise OutputError(f"{path} is a link", hint="remove it, or choose another folder with -o")
        lock = FileLock(out / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"another run is writing to {out}", hint="wait until it is finished, or choose another folder with -o"
            ) from None
    try:
        yield
    except KeyboardInterrupt:
        if Journal.is_there(out):
            done = Journal.count(out)
            note(f"stopped after {done} shard{'' if done == 1 else 's'}; the same command goes on from there")
        raise
    finally:
        # The lock's file is removed only while it is held, and with nothing left to go on with.
        unfinished = Journal.is_there(out) or (out / FILES_FILE).is_file()
        if not unfinished or _nothing_done(out):
            with reporting(out):
                shutil.rmtree(out / JOURNAL_DIR, ignore_errors=True)
                if not files_in(out):
                    for path in (out / SURGERY_DIR, *([out] if made else [])):
                        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                            path.rmdir()
        lock.release()


def _nothing_done(out: Path) -> bool:
    """Whether a run has been begun, and has neither finished a shard nor left anything else."""
    journal = {f"{JOURNAL_DIR}/{path.name}" for path in (out / JOURNAL_DIR).iterdir()}
    place = out / RESULT_DIR if RESULT_DIR in journal else out
    return not files_in(place) and journal <= {LOCK_FILE, RUN_FILE, FILES_FILE, RESULT_DIR}


def check_output_file(out: Path, inputs: Iterable[Path], *, overwrite: bool, but: Path | None = None) -> None:
    """Refuse to write a file where it would replace something that it must not.

    Args:
        out: the file.
        inputs: files and folders that are read; ``out`` may neither be one nor lie in one.
        overwrite: whether a file may be replaced.
        but: a file in one of the folders that may be replaced all the same.

    Raises:
        OutputError: it is one of the inputs or in one, is no file, or is there already.
    """
    try:
        real = out.resolve()
        for path in inputs:
            read = path.resolve()
            if real == read or (read in real.parents and (but is None or real != but.resolve())):
                raise OutputError(
                    f"the output {out} is one of the inputs, or lies in one: {path}",
                    hint="choose another file with -o; what is read is never written to",
                )
        _check_leads_somewhere(out)
        check_replaceable(out)
        if out.exists() and not overwrite:
            raise OutputError(f"{out} is there already", hint="--overwrite replaces it; -o chooses another file")
        folder = next(path for path in out.absolute().parents if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "may not be written to" if folder.is_dir() else "is no folder"
            raise OutputError(f"{out} cannot be written: {folder} {what}", hint="choose another file with -o")
    except (RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise OutputError(f"{out}: no such file can be", got=error, hint="choose another file with -o") from None


@contextmanager
def result_folder(
    out: Path,
    journal: Journal,
    writes: Iterable[str],
    needed: int,
    *,
    overwrite: bool,
    earlier: Iterable[str] = (),
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
        writes: files of the new result, relative.
        needed: bytes that it takes.
        overwrite: whether an earlier result may be replaced.
        earlier: files that belong to an earlier result as well.

    Raises:
        OutputError: ``out`` is not empty, not ours, holds another unfinished run, is too small, or not to be written.
    """
    written = set(writes)
    place = _prepared(out, journal, written, needed, set(earlier), overwrite=overwrite)
    try:
        yield place
    except (OptionError, ScalesError, WeightError):
        if place != out:  # the same command would meet it again: nothing is left of it beside what it would have replaced
            Journal.forget(out)
        raise
    new = files_in(place) if place != out else written
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
    with reporting(out):
        present = {name for name in names if os.path.lexists(out / name)}
    for name in sorted(present - Journal.files(out)):
        check_replaceable(out / name)
        if not overwrite:
            raise OutputError(f"{out / name} is there already", hint="--overwrite replaces it; -o chooses another folder")
    if not goes_on:
        journal.claim(present)
        journal.drop()
        journal.begin()
    with reporting(out):
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


def _prepared(out: Path, journal: Journal, writes: set[str], needed: int, earlier: set[str], *, overwrite: bool) -> Path:
    """See ``result_folder``. The run has begun, or is gone on with, when this returns."""
    with reporting(out):
        top = sorted(path.name for path in out.iterdir() if path.name != JOURNAL_DIR and not is_litter(path.name))
    _check_links(out)
    if Journal.is_there(out) and (not overwrite or journal.matches()):
        journal.check()
        if Journal.is_replacing(out):
            _take_place(out)
        place = out / RESULT_DIR if (out / RESULT_DIR).is_dir() else out
        present = files_in(place)
        check_room(out, needed, freed=_size(place, present & writes))
        with reporting(place):
            for name in {name + _PARTIAL for name in writes} & present:
                (place / name).unlink()
        return place
    if top and not overwrite:
        raise OutputError(
            f"{out} holds files already",
            got=few(top),
            hint="--overwrite replaces an earlier result; -o chooses another folder",
        )
    present = files_in(out)
    ours = earlier | _earlier_result(out, present) | writes | Journal.files(out) | Journal.replaced(out)
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
        _check_way(out, writes, present - stale)
    freed = _size(out / RESULT_DIR, files_in(out / RESULT_DIR)) + (0 if is_whole else _size(out, stale))
    check_room(out, needed, freed=freed, hint="remove the earlier result, which stays until then" if is_whole else _ROOM_HINT)
    journal.claim(ours)
    journal.drop()
    with reporting(out):
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
    with reporting(out):
        # Those by which a loader would take the folder for the earlier result, which is not whole from then on.
        _remove(out, gone | (set(_DECIDING) & new & files_in(out)))
        for name in sorted(new, key=_how_late):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (result / name).replace(out / name)
            sync_directory((out / name).parent)
        shutil.rmtree(result, ignore_errors=True)
        (out / REPLACED_FILE).unlink()


def _remove(out: Path, files: set[str]) -> None:
    """Files of an earlier result, and the folders that are empty then."""
    # From the first of them on no loader takes the folder.
    for name in sorted(files, key=_how_late, reverse=True):
        (out / name).unlink()
        if name in _DECIDING:
            sync_directory((out / name).parent)
    for folder in sorted({parent for name in files for parent in PurePosixPath(name).parents[:-1]}, reverse=True):
        with suppress(OSError):  # something else is in it
            (out / folder).rmdir()


def _check_way(out: Path, writes: set[str], kept: set[str]) -> None:
    """Refuse where something that stays would be in the way of the result when it takes its place."""
    for name in sorted(writes):
        above = {str(parent) for parent in PurePosixPath(name).parents}
        if (out / name).is_dir() or not kept.isdisjoint(above):
            raise OutputError(f"{out}: something is in the way of {name}", hint="remove it, or choose another folder with -o")


def _size(folder: Path, names: set[str]) -> int:
    return sum((folder / name).lstat().st_size for name in names)


def files_in(out: Path) -> set[str]:
    """All that is no folder, relative, but for the journal and what file managers leave. Links are not followed."""
    paths = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(out).as_posix() for path in paths}
    return {name for name in names if not name.startswith(f"{JOURNAL_DIR}/") and not is_litter(name)}


def _check_links(out: Path) -> None:
    """A folder in the output that is a link would lead what is written elsewhere."""
    for path in out.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise OutputError(f"{path} is a link to a folder", hint="remove it, or choose another folder with -o")


def _check_leads_somewhere(out: Path) -> None:
    """Refuse an output at or below a link to what is not there: nothing is made where a link leads."""
    for path in (out, *out.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"{path} is a link that leads nowhere",
                got=path.readlink(),
                hint="remove the link or make what it leads to, or choose another output with -o",
            )


def _beside(out: Path, read: Path) -> str:
    """How to say that an output is to lie beside the folder that it was to lie in."""
    if not read.is_dir() or read == read.parent:
        return "choose another folder with -o"
    return f"-o {shlex.quote(os.path.relpath(read.parent / f'{read.name}-{out.name}'))}"


def _check_apart(out: Path, inputs: Iterable[Path]) -> None:
    try:
        real = out.resolve()
        resolved = [(path, path.resolve()) for path in inputs]
    except RuntimeError as error:  # links in a circle
        raise OutputError(f"{out}: no such folder can be", got=error, hint="choose another folder with -o") from None
    for path, read in resolved:
        if real == read or read in real.parents or real in read.parents:
            raise OutputError(
                f"the output {out} and the input {path} lie in one another",
                hint=(_beside(out, read) if read in real.parents else "choose another folder with -o")
                + "; what is read is never written to",
            )


def _earlier_result(out: Path, present: set[str]) -> set[str]:
    """What a finished run has put into ``out``: by its manifest; as a fold keeps none, what a model has beside its weights."""
    is_model = CONFIG_FILE in present and any(map(_would_mix, present))
    beside = {name for name in present if is_model and is_read_by_loaders(name) and not _would_mix(name)}
    if not (out / MANIFEST_FILE).is_file():
        return beside
    try:
        manifest = Manifest.read(out)
    except SurgeryError:
        return beside
    return beside | {record.file for record in manifest.output_files()} | {MANIFEST_FILE, SCALES_FILE}


def _would_mix(name: str) -> bool:
    """Whether a file that stays in the output folder would be taken for part of the result."""
    return name.startswith(f"{SURGERY_DIR}/") or ("/" not in name and (name.endswith(".safetensors") or is_index(name)))


def check_room(folder: Path, needed: int, *, freed: int = 0, hint: str = _ROOM_HINT) -> None:
    """Refuse to start on a disk that cannot hold ``needed`` bytes once ``freed`` ones are gone.

    Raises:
        OutputError: with the figures.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free + freed
    if free < needed:
        raise OutputError(
            f"the disk under {folder} is too small",
            got=f"{free / 1e9:.3f} GB free",
            expected=f"about {needed / 1e9:.3f} GB",
            hint=hint,
        )


def is_as_recorded(out: Path, record: FileRecord) -> bool:
    """Whether a file is there with the size and the sha256 that were recorded."""
    try:
        check_file(out, record, "")
    except (FormatError, ReadError):
        return False
    return True


def not_as_recorded(out: Path, records: Iterable[FileRecord]) -> list[str]:
    """The files that are not there with the size and the sha256 that were recorded."""
    known, lost, progress = list(records), [], listening()
    with phase(progress, "hashing", sum(record.size for record in known)):
        for record in known:
            progress.item(record.file)
            if not is_as_recorded(out, record):
                lost.append(record.file)
            progress.advance(record.size)
    return lost


def loading_order(files: Iterable[str]) -> list[str]:
    """Files in the order they are put in place: ``config.json`` last, as no loader takes a folder without it."""
    return sorted(files, key=_how_late)


def _how_late(name: str) -> tuple[bool, bool, str]:
    return name == MANIFEST_FILE, name == CONFIG_FILE, name
