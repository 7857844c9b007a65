"""Checks of output paths: an output is refused where it would replace, or mix with, files that must not be lost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from surgery.errors import OTHER_OUT, OVERWRITE, OutputError, few
from surgery.escapes import quoted
from surgery.files.access import check_replaceable, read_errors
from surgery.files.file_records import file_sha256
from surgery.format.manifest import Manifest, source_stamp
from surgery.names import ADAPTER_FILES, CONFIG_FILE, DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS


def check_not_the_source(out: Path, manifest: Manifest) -> None:
    """Refuse to replace the model that a checkpoint was made from, also if it has been moved.

    A weight file is taken for the source's own if size, time of change and sha256 are the recorded ones. One that a fold has
    written may have the same bytes, but has another time.

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
                expected="a folder in which no model would be lost",
                hint="choose another output with -o; if this is a copy that you do not need, remove it first",
            )


def check_output_path(out: Path, inputs: Iterable[Path], *, overwrite: bool, but: Path | None = None) -> None:
    """Refuse to write a file where it would replace something that it must not.

    Args:
        out: the file.
        inputs: files and folders that are read; ``out`` may neither be one nor lie in one.
        overwrite: whether a file may be replaced.
        but: a file in one of these folders that may be replaced all the same.

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
        check_leads_somewhere(out)
        check_replaceable(out)
        if out.exists() and not overwrite:
            raise OutputError(f"{out} is there already", hint=f"{OVERWRITE} replaces it; {OTHER_OUT} name")
        folder = next(path for path in out.absolute().parents if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "may not be written to" if folder.is_dir() else "is no folder"
            raise OutputError(f"{out} cannot be written: {folder} {what}", hint="choose another file with -o")
    except (RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise OutputError(f"{out}: no file can have this path", got=error, hint="choose another file with -o") from None


def check_no_model(out: Path) -> None:
    """Refuse a folder with a model as the place of an adapter: transformers would load both together, without a word.

    Raises:
        OutputError: there is one, or it is no folder.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no folder", hint="-o chooses another one")
    if (out / CONFIG_FILE).exists():
        raise OutputError(
            f"there is a model in {out}, and an adapter must not be written beside it", hint="-o chooses another folder"
        )


def check_no_other_adapter(out: Path, files: Iterable[str]) -> None:
    """Refuse a folder with an adapter in another layout as the place of one: loaders and users would take either.

    Args:
        out: the folder.
        files: the names of those of the adapter.

    Raises:
        OutputError: there is one.
    """
    others = sorted({*ADAPTER_FILES, DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS}.difference(files))
    if found := [name for name in others if (out / name).exists()]:
        raise OutputError(
            f"{out} holds an adapter in another layout",
            got=few(found),
            expected=" and ".join(files),
            hint="-o chooses another folder; if you do not need the adapter that is there, remove it first",
        )


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    try:
        real = out.resolve()
        resolved = [(path, path.resolve()) for path in inputs]
    except RuntimeError as error:  # links in a circle
        raise OutputError(f"{out}: no folder can have this path", got=error, hint="choose another folder with -o") from None
    for path, read in resolved:
        if _is_in(real, read) or _is_in(read, real):
            raise OutputError(
                f"the output {out} and the input {path} are the same, or one lies in the other",
                hint=(_beside(out, read) if read in real.parents else "choose another folder with -o")
                + "; what is read is never written to",
            )


def check_leads_somewhere(out: Path) -> None:
    """Refuse an output at or below a dangling link: nothing is created at the place that a link names."""
    for path in (out, *out.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"{path} is a link that leads nowhere",
                got=path.readlink(),
                hint="remove the link or create what it leads to, or choose another output with -o",
            )


def _beside(out: Path, read: Path) -> str:
    """A hint for an output that would lie in a folder that is read: where to put it instead."""
    if not read.is_dir() or read == read.parent:
        return "choose another folder with -o"
    return f"-o {quoted(os.path.relpath(read.parent / f'{read.name}-{out.name}'))}"


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, also if the folder is reached by another name, such as a second mount.

    Args:
        path, folder: resolved, without links in them.
    """
    if path == folder or folder in path.parents:
        return True
    with suppress(OSError):
        there = folder.stat()
        existing = (above for above in (path, *path.parents) if above.exists())
        return there.st_ino != 0 and any(os.path.samestat(above.stat(), there) for above in existing)
    return False
