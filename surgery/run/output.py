"""The output folder: refused where it must not be, checked for room, and an earlier result in it replaced by a whole one."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from filelock import BaseFileLock, FileLock, Timeout

from surgery.errors import FormatError, OptionError, OutputError, ReadError, ScalesError, SurgeryError, WeightError, few
from surgery.escapes import quoted
from surgery.files.access import all_below, check_replaceable, read_errors, write_errors
from surgery.files.file_records import FileRecord, check_file, file_sha256
from surgery.files.file_writer import sync_directory
from surgery.format.manifest import Manifest, source_stamp
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
    STREAM_DIR,
    SURGERY_DIR,
    is_litter,
)
from surgery.progress import listening, note, phase
from surgery.run.journal import Journal, clear_away
from surgery.source.file_names import is_read_by_loaders
from surgery.source.weight_files import is_index

if TYPE_CHECKING:
    from surgery.publish.upload import Upload

_PARTIAL = ".partial"
#: How often a lock is tried for that others take away meanwhile.
_ATTEMPTS = 1000
#: Those by which a loader or a reader takes a folder for a result: the first to go, and the last to come.
_DECIDING = (MANIFEST_FILE, CONFIG_FILE, SPECTRA_FILE)
_ROOM_HINT = "free some space, or choose a folder on another disk"
_DOWNLOAD_HINT = "--stream, where the command has it, to hold a few of its files at a time, or HF_HOME on another disk"


class Interruptible:
    """Around all that a run does, from its planning on: if it is interrupted, a note says how to go on.

    That is said where there is something to go on with, and nowhere else. A context manager.

    Args:
        out: the output folder.

    Attributes:
        journal: of the run, once it is known.
        upload: of its result, once there is one.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self.journal: Journal | None = None
        self.upload: Upload | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            return
        # With its manifest in place a result is whole, and all that is left is to forget the run.
        is_whole = (self._out / MANIFEST_FILE).is_file() and not (self._out / RESULT_DIR).is_dir()
        if Journal.is_there(self._out) and not is_whole:
            done = Journal.count(self._out)
            after = f"after {done} shard{'' if done == 1 else 's'}"
            if self.journal is not None and self.journal.matches():
                note(f"stopped {after}; the same command goes on from there")
            else:
                note(f"{self._out} holds a run that was stopped {after}; the command that began it goes on from there")
        elif self.upload is not None and self.upload.unfinished:
            note(f"stopped before the upload to {self.upload.repo_id} was complete; the same command goes on from there")


@contextmanager
def locked(out: Path, inputs: Iterable[Path]) -> Iterator[None]:
    """Hold the output folder, created if missing, against other runs. The system lets go of a dead one's lock.

    Args:
        out: the folder.
        inputs: folders and files that are read; ``out`` may neither be one, nor lie in one, nor hold one.

    Raises:
        OutputError: another run holds it, it is one of the inputs or no folder, or it cannot be written to.
    """
    with write_errors(out):
        _check_apart(out, inputs)
        _check_leads_somewhere(out)
        lock, made = _taken(out)
    try:
        yield
    finally:
        try:
            unfinished = Journal.is_there(out) or (out / FILES_FILE).is_file()
            over = not unfinished or _nothing_done(out)
            if over:
                _clear(out)
        finally:
            with suppress(OSError):  # of a system that cannot unlock: it does when the process ends
                lock.release()
        # A folder goes only if it is empty: another run may have come into it already.
        for path in (out / JOURNAL_DIR, *([out] if made else [])) if over else ():
            with suppress(OSError):
                path.rmdir()


def _taken(out: Path) -> tuple[BaseFileLock, bool]:
    """The lock of an output folder, held, and whether the folder was made for it.

    Another run that lets go takes its lock's file away, and then the folders around it, at any moment. What is gone is made
    again, and a lock whose file is not in its place any more is none.
    """
    made, path = False, out / LOCK_FILE
    for left in reversed(range(_ATTEMPTS)):
        try:
            if not stat.S_ISDIR(out.stat().st_mode):
                raise OutputError(f"{out} is no folder", hint="choose another folder with -o")
        except FileNotFoundError:
            made = True
        try:
            (out / JOURNAL_DIR).mkdir(parents=True, exist_ok=True)
            for ours in (out / JOURNAL_DIR, path):
                if ours.is_symlink():
                    raise OutputError(f"{ours} is a link", hint="remove it, or choose another folder with -o")
            if (lock := _lock_in_place(path)) is not None:
                return lock, made
        except Timeout:
            raise OutputError(
                f"another run is writing to {out}", hint="wait until it is finished, or choose another folder with -o"
            ) from None
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
    raise OutputError(f"{out} cannot be locked: its lock is taken away again and again", hint="choose another folder with -o")


def _lock_in_place(path: Path) -> BaseFileLock | None:
    """The lock, held; None if its file has been taken away, or another put in its place, while it was acquired.

    Raises:
        Timeout: somebody else holds it.
        FileNotFoundError: the file or its folder has been taken away.
    """
    lock = FileLock(path, timeout=0)
    # Open until the end: while it is, no other file has its number.
    before = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        lock.acquire()
        try:
            if os.path.samestat(os.fstat(before), path.lstat()):
                return lock
        except FileNotFoundError:
            pass
        lock.release()
        return None
    finally:
        os.close(before)


def _clear(out: Path) -> None:
    """Nothing stays of a run that is over or has done nothing: its lock's file goes last, while it is held."""
    with write_errors(out):
        for path in set((out / JOURNAL_DIR).iterdir()) - {out / LOCK_FILE}:
            with suppress(OSError):
                clear_away(path)
        if (out / SURGERY_DIR).is_dir() and not files_in(out):
            with suppress(OSError):  # there are folders in it, or it is a link
                (out / SURGERY_DIR).rmdir()
        with suppress(OSError):  # Windows keeps what is open
            (out / LOCK_FILE).unlink()


def check_not_the_source(out: Path, manifest: Manifest) -> None:
    """Refuse to replace a model that a checkpoint was made from, wherever it lies by now.

    A weight file is the source's own if it has the size, the time of change and the bytes of it. What a fold has written has
    another time.

    Args:
        out: the folder, or the file, that is to be replaced.
        manifest: of the checkpoint.

    Raises:
        OutputError: it holds a weight file of the source, or is one.
    """
    for shard, stamp in zip(manifest.shards, manifest.source_stamps, strict=False):
        record = shard.source
        path = out / record.file if out.is_dir() else out
        try:
            found = path.stat()
        except OSError:  # nothing is there that could be lost
            continue
        if (found.st_size, source_stamp(record, found.st_mtime_ns)) != (record.size, stamp):
            continue
        with read_errors(path):
            is_the_same = file_sha256(path) == record.sha256
        if is_the_same:
            raise OutputError(
                f"{out} is the model that the checkpoint was made from, or a copy of it",
                got=f"{path}, with the bytes and the time of change of the source's {record.file}",
                expected="a place where no model is lost",
                hint="choose another output with -o; a copy that may go is yours to remove",
            )


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
            if (_is_in(real, read) if read.is_dir() else real == read) and (but is None or real != but.resolve()):
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
    beside: Sequence[Need] = (),
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
        beside: room that the run needs beside it, maybe on the same disk.

    Raises:
        OutputError: ``out`` is not empty, not ours, holds another unfinished run, is too small, or not to be written.
    """
    written = set(writes)
    place = _prepared(out, journal, written, needed, set(earlier), beside, overwrite=overwrite)
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


def _prepared(
    out: Path,
    journal: Journal,
    writes: set[str],
    needed: int,
    earlier: set[str],
    beside: Sequence[Need],
    *,
    overwrite: bool,
) -> Path:
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
        check_room(Need(out, needed, "the result", _size(place, present & writes)), *beside)
        with write_errors(place):
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
    hint = "remove the earlier result, which stays until then" if is_whole else _ROOM_HINT
    check_room(Need(out, needed, "the result", freed, hint), *beside)
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
    paths = (path for path in all_below(out) if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(out).as_posix() for path in paths}
    return {name for name in names if not name.startswith(f"{JOURNAL_DIR}/") and not is_litter(name)}


def _check_links(out: Path) -> None:
    """A folder in the output that is a link would lead what is written elsewhere."""
    for path in all_below(out):
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
    return f"-o {quoted(os.path.relpath(read.parent / f'{read.name}-{out.name}'))}"


def _check_apart(out: Path, inputs: Iterable[Path]) -> None:
    try:
        real = out.resolve()
        resolved = [(path, path.resolve()) for path in inputs]
    except RuntimeError as error:  # links in a circle
        raise OutputError(f"{out}: no such folder can be", got=error, hint="choose another folder with -o") from None
    for path, read in resolved:
        if _is_in(real, read) or _is_in(read, real):
            raise OutputError(
                f"the output {out} and the input {path} lie in one another",
                hint=(_beside(out, read) if read in real.parents else "choose another folder with -o")
                + "; what is read is never written to",
            )


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, also by another name of that, such as a second mount of it.

    Args:
        path, folder: without links.
    """
    if path == folder or folder in path.parents:
        return True
    with suppress(OSError):
        there = folder.stat()
        existing = (above for above in (path, *path.parents) if above.exists())
        return there.st_ino != 0 and any(os.path.samestat(above.stat(), there) for above in existing)
    return False


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


@dataclass(frozen=True, slots=True)
class Need:
    """Room that a run needs.

    Attributes:
        folder: where.
        size: bytes.
        what: for messages: ``the result``.
        freed: bytes there that will be gone by then.
        hint: what to do without it.
    """

    folder: Path
    size: int
    what: str
    freed: int = 0
    hint: str = _ROOM_HINT


def download_needs(*sources: _Fetching) -> list[Need]:
    """The room that models from the hub need for what is still to be fetched of them."""
    rooms = [room for source in sources for room in source.room_to_fetch().items() if room[1]]
    return [
        Need(folder, size, "weight files that pass through")
        if folder.match(STREAM_DIR)
        else Need(folder, size, "the download", hint=_DOWNLOAD_HINT)
        for folder, size in rooms
    ]


class _Fetching(Protocol):
    def room_to_fetch(self) -> dict[Path, int]: ...


def check_room(*needs: Need) -> None:
    """Refuse to start on disks that cannot hold what is needed on each, in sum.

    Raises:
        OutputError: with the figures.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for together in disks.values():
        free = shutil.disk_usage(_existing(together[0].folder)).free
        needed = sum(need.size - need.freed for need in together)
        if free < needed:
            folders = dict.fromkeys(str(need.folder) for need in together)
            each = [f"{need.size / 1e9:.3f} GB for {need.what}" for need in together]
            raise OutputError(
                f"the disk under {' and '.join(folders)} is too small",
                got=f"{(free + sum(need.freed for need in together)) / 1e9:.3f} GB free",
                expected=f"about {sum(need.size for need in together) / 1e9:.3f} GB"
                + (f": {', '.join(each)}" if each[1:] else ""),
                hint="; or ".join(dict.fromkeys(need.hint for need in together)),
            )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


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
