"""The output folder: refused where it must not be, checked for room, cleared of an earlier result and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from surgery.errors import FormatError, OutputError, SurgeryError
from surgery.format.files import FileRecord, check_file, reporting, sync_directory
from surgery.format.manifest import Manifest
from surgery.names import (
    CONFIG_FILE,
    FILES_FILE,
    JOURNAL_DIR,
    LOCK_FILE,
    MANIFEST_FILE,
    OUR_FILES,
    RUN_FILE,
    SCALES_FILE,
    SURGERY_DIR,
)
from surgery.operations.journal import Journal
from surgery.progress import Progress
from surgery.source.shards import is_index

_PARTIAL = ".partial"


@contextmanager
def locked(out: Path, inputs: Iterable[Path], progress: Progress) -> Iterator[None]:
    """Hold the output folder, created if missing, against other runs. The system lets go of a dead one's lock.

    Args:
        out: the folder.
        inputs: folders and files that are read; ``out`` may neither be one, nor lie in one, nor hold one.
        progress: told how to go on, if the run is interrupted.

    Raises:
        OutputError: another run holds it, it is one of the inputs or no folder, or it cannot be written to.
    """
    with reporting(out):
        _check_apart(out, inputs)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is no folder", hint="choose another folder with -o")
        made = not out.exists()
        (out / JOURNAL_DIR).mkdir(parents=True, exist_ok=True)
        if (out / JOURNAL_DIR).is_symlink():
            raise OutputError(f"{out / JOURNAL_DIR} is a link", hint="remove it, or choose another folder with -o")
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
            progress.note(f"stopped after {done} shard{'' if done == 1 else 's'}; the same command goes on from there")
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
    return not files_in(out) and journal <= {LOCK_FILE, RUN_FILE, FILES_FILE}


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
        if out.is_dir():
            raise OutputError(f"{out} is a folder", expected="a file to write, such as scales.safetensors", hint="-o FILE")
        if out.exists() and not overwrite:
            raise OutputError(f"{out} is there already", hint="--overwrite replaces it; -o chooses another file")
    except (RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise OutputError(f"{out}: no such file can be", got=error, hint="choose another file with -o") from None


def prepare_output(out: Path, journal: Journal, writes: Iterable[str], needed: int, *, overwrite: bool) -> None:
    """Make ``out`` a folder that the result can be written to, empty, or with what an earlier start of the run has done.

    With ``overwrite`` the files of an earlier result are removed: those that its manifest names, those that the new
    result will write, and what an unfinished run leaves. Weights and files in ``surgery/`` that are neither are a
    reason to refuse, as they would mix with the result or are not ours; any other file is left alone.

    Args:
        out: the folder, locked.
        journal: of the run, begun or gone on with when this returns.
        writes: files of the new result, relative.
        needed: bytes that it takes.
        overwrite: whether an earlier result may be replaced.

    Raises:
        OutputError: ``out`` is not empty, not ours, holds another unfinished run, is too small, or not to be written.
    """
    writes = set(writes)
    with reporting(out):
        top = sorted(path.name for path in out.iterdir() if path.name != JOURNAL_DIR)
    if Journal.is_there(out) and (not overwrite or journal.matches()):
        journal.check()
        _check_links(out)
        present = files_in(out)
        check_room(out, needed, freed=sum((out / name).lstat().st_size for name in present & writes))
        with reporting(out):
            for name in {name + _PARTIAL for name in writes} & present:
                (out / name).unlink()
        return
    if top and not overwrite:
        raise OutputError(
            f"{out} holds files already",
            got=", ".join(top[:5]) + (" ..." if len(top) > 5 else ""),
            hint="--overwrite replaces an earlier result; -o chooses another folder",
        )
    _check_links(out)
    present = files_in(out)
    ours = _earlier_result(out) | writes | Journal.files(out)
    ours |= {name + _PARTIAL for name in ours}
    stale = {name for name in present if name in ours or OUR_FILES.fullmatch(name)}
    foreign = sorted(name for name in present - stale if _would_mix(name))
    if foreign:
        raise OutputError(
            f"{out} holds files that no run of surgery has put there",
            got=", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else ""),
            hint="choose another folder with -o",
        )
    check_room(out, needed, freed=sum((out / name).lstat().st_size for name in stale))
    journal.claim(ours)
    with reporting(out):
        # The manifest and the config go first: from then on no loader takes the folder.
        for name in sorted(stale, key=lambda name: (name not in (MANIFEST_FILE, CONFIG_FILE), name)):
            (out / name).unlink()
            if name in (MANIFEST_FILE, CONFIG_FILE):
                sync_directory((out / name).parent)
    journal.begin()


def files_in(out: Path) -> set[str]:
    """All that is no folder, relative, but for the journal. Links are not followed."""
    paths = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(out).as_posix() for path in paths}
    return {name for name in names if not name.startswith(f"{JOURNAL_DIR}/")}


def _check_links(out: Path) -> None:
    """A folder in the output that is a link would lead what is written elsewhere."""
    for path in out.rglob("*"):
        if path.is_symlink() and path.is_dir():
            raise OutputError(f"{path} is a link to a folder", hint="remove it, or choose another folder with -o")


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
                hint="choose another folder with -o; what is read is never written to",
            )


def _earlier_result(out: Path) -> set[str]:
    """What a finished factorize run has written to ``out``."""
    if not (out / MANIFEST_FILE).is_file():
        return set()
    try:
        manifest = Manifest.read(out)
    except SurgeryError:
        return set()
    return {record.file for record in manifest.output_files()} | {MANIFEST_FILE, SCALES_FILE}


def _would_mix(name: str) -> bool:
    """Whether a file that stays in the output folder would be taken for part of the result."""
    return name.startswith(f"{SURGERY_DIR}/") or ("/" not in name and (name.endswith(".safetensors") or is_index(name)))


def check_room(folder: Path, needed: int, *, freed: int = 0) -> None:
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
            hint="free some space, or choose a folder on another disk",
        )


def is_as_recorded(out: Path, record: FileRecord) -> bool:
    """Whether a file is there with the size and the sha256 that were recorded."""
    try:
        check_file(out, record, "")
    except FormatError:
        return False
    return True


def loading_order(files: Iterable[str]) -> list[str]:
    """Files in the order they are put in place: ``config.json`` last, as no loader takes a folder without it."""
    return sorted(files, key=lambda name: (name == CONFIG_FILE, name))
