"""The output folder: refused where it must not be, cleared of an earlier result, checked for room."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import OutputError
from surgery.names import CONFIG_FILE, MANIFEST_FILE, SURGERY_DIR


def prepare_output(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Make ``out`` an empty folder, or one whose weights are gone.

    With ``overwrite`` only what would mix with the new result is removed: the ``surgery`` subfolder and the
    safetensors and index files at the top. Files of other kinds stay unless the new result replaces them.

    Args:
        out: created if missing.
        inputs: folders that are read; ``out`` may neither be one, nor lie in one, nor hold one.
        overwrite: whether an earlier result may be replaced.

    Raises:
        OutputError: not empty, one of the inputs, or not to be written.
    """
    real = out.resolve()
    for folder in inputs:
        read = folder.resolve()
        if real == read or read in real.parents or real in read.parents:
            raise OutputError(
                f"the output {out} and the input {folder} lie in one another",
                hint="choose another folder with -o; what is read is never written to",
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise OutputError(
            f"{out}: no folder that can be written ({error.strerror})", hint="choose another folder with -o"
        ) from error
    if not present:
        return
    if not overwrite:
        unfinished = SURGERY_DIR in present and not (out / MANIFEST_FILE).exists()
        raise OutputError(
            f"{out} holds {'an unfinished run' if unfinished else 'files already'}",
            got=", ".join(present[:5]) + (" ..." if len(present) > 5 else ""),
            hint="--overwrite replaces an earlier result; -o chooses another folder",
        )
    (out / MANIFEST_FILE).unlink(missing_ok=True)  # first: from here on it is unfinished
    (out / CONFIG_FILE).unlink(missing_ok=True)
    if (out / SURGERY_DIR).is_symlink():
        (out / SURGERY_DIR).unlink()
    elif (out / SURGERY_DIR).is_dir():
        shutil.rmtree(out / SURGERY_DIR)
    for pattern in ("*.safetensors", "*.safetensors.partial", "*.safetensors.index.json"):
        for path in out.glob(pattern):
            path.unlink()


def check_room(out: Path, needed: int) -> None:
    """Refuse to start on a disk that cannot hold the result.

    Raises:
        OutputError: with the figures.
    """
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(
            f"the disk under {out} is too small",
            got=f"{free / 1e9:.2f} GB free",
            expected=f"about {needed / 1e9:.2f} GB",
            hint="free some space, choose another folder with -o, or use --layout overlay",
        )


def loading_order(files: Iterable[str]) -> list[str]:
    """Files in the order they are put in place: ``config.json`` last, as no loader takes a folder without it."""
    return sorted(files, key=lambda name: (name == CONFIG_FILE, name))
