"""The output folder: refused where it must not be, checked for room, cleared of an earlier result and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import OutputError, SurgeryError
from surgery.format.files import reporting
from surgery.format.manifest import Manifest
from surgery.names import CONFIG_FILE, MANIFEST_FILE, OUR_FILES, SCALES_FILE, SURGERY_DIR

_PARTIAL = ".partial"


def prepare_output(out: Path, inputs: Iterable[Path], writes: Iterable[str], needed: int, *, overwrite: bool) -> None:
    """Make ``out`` a folder that the result can be written to.

    With ``overwrite`` the files of an earlier result are removed: those that its manifest names, those that the new
    result will write, and what an unfinished run leaves. Weights and files in ``surgery/`` that are neither are a
    reason to refuse, as they would mix with the result or are not ours; any other file is left alone.

    Args:
        out: created if missing.
        inputs: folders and files that are read; ``out`` may neither be one, nor lie in one, nor hold one.
        writes: files of the new result, relative.
        needed: bytes that it takes.
        overwrite: whether an earlier result may be replaced.

    Raises:
        OutputError: ``out`` is not empty, not ours, one of the inputs, too small, or not to be written.
    """
    _check_apart(out, inputs)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no folder", hint="choose another folder with -o")
    with reporting(out):
        top = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if top and not overwrite:
        unfinished = SURGERY_DIR in top and not (out / MANIFEST_FILE).exists()
        raise OutputError(
            f"{out} holds {'an unfinished run' if unfinished else 'files already'}",
            got=", ".join(top[:5]) + (" ..." if len(top) > 5 else ""),
            hint="--overwrite replaces an earlier result; -o chooses another folder",
        )
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if top else set()
    ours = _earlier_result(out) | set(writes)
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
    with reporting(out):
        out.mkdir(parents=True, exist_ok=True)
        # The manifest and the config go first: from then on no loader takes the folder.
        for name in sorted(stale, key=lambda name: (name not in (MANIFEST_FILE, CONFIG_FILE), name)):
            (out / name).unlink()


def _check_apart(out: Path, inputs: Iterable[Path]) -> None:
    real = out.resolve()
    for path in inputs:
        read = path.resolve()
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
    folder, _, _ = name.rpartition("/")
    return name.startswith(f"{SURGERY_DIR}/") or (not folder and name.endswith((".safetensors", ".safetensors.index.json")))


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


def loading_order(files: Iterable[str]) -> list[str]:
    """Files in the order they are put in place: ``config.json`` last, as no loader takes a folder without it."""
    return sorted(files, key=lambda name: (name == CONFIG_FILE, name))
