"""The verb ``scales new``: an untouched scales file of a factorized checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.device import on_its_own_terms
from surgery.format.manifest import Manifest
from surgery.format.scales.writing import write_untouched
from surgery.names import SCALES_FILE, Train
from surgery.progress import Progress
from surgery.reports import Report
from surgery.run.output_paths import check_output_path


@dataclass(frozen=True, slots=True)
class NewScales(Report):
    """An untouched scales file that was written.

    Attributes:
        out: the file.
        train: what it holds: ``scales``, or ``core`` for cores.
        targets: how many targets there are.
        trainable: how many numbers the file holds.
        fingerprint: the fingerprint of the factors that they belong to.
    """

    out: Path
    train: Train
    targets: int
    trainable: int
    fingerprint: str


@on_its_own_terms
def new_scales(
    factorized: str | Path,
    out: str | Path,
    *,
    train: Train = "scales",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> NewScales:
    """Write an untouched scales file of a factorized checkpoint: scales that are all 1, or cores that are the identity.

    Only the manifest of the checkpoint is read.

    Args:
        factorized: a folder that ``factorize`` has written.
        out: the file to write; may be ``surgery/scales.safetensors`` in the folder.
        train: ``scales``: for each target g, float32 (k,), or (B, k) for a stack. ``core``: for each target C, float32
            (k, k), or (B, k, k) for a stack.
        overwrite: replace ``out`` if it exists.
        progress: receives the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        What was written.

    Raises:
        OptionError: ``train`` is neither of the two.
        OutputError: ``out`` exists already, lies elsewhere in the folder, or cannot be written.
        SurgeryError: the folder is not a factorized checkpoint; see ``Manifest.read``.
    """
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    check_output_path(out, [factorized], overwrite=overwrite, but=factorized / SCALES_FILE)
    write_untouched(out, manifest.targets, manifest.fingerprint, train)
    numbers = sum(target.numbers_of(train) for target in manifest.targets)
    return NewScales(out, train, len(manifest.targets), numbers, manifest.fingerprint)
