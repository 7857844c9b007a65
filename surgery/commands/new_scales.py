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
        targets: how many there are.
        trainable: how many numbers.
        fingerprint: of the factors that they belong to.
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

    Of the checkpoint only the manifest is read.

    Args:
        factorized: a folder written by ``factorize``.
        out: the file to write; may be ``surgery/scales.safetensors`` in the folder.
        train: ``scales``: for each target g, float32 (k,), or (B, k) for a stack; ``core``: C, (k, k), or (B, k, k).
        overwrite: replace ``out`` if it is there.
        progress: told what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        What was written.

    Raises:
        OptionError: there is nothing of that name to train.
        OutputError: ``out`` is there already, lies in the folder, or cannot be written.
        SurgeryError: the folder is no factorized checkpoint; see ``Manifest.read``.
    """
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    check_output_path(out, [factorized], overwrite=overwrite, but=factorized / SCALES_FILE)
    write_untouched(out, manifest.targets, manifest.fingerprint, train)
    numbers = sum(target.numbers_of(train) for target in manifest.targets)
    return NewScales(out, train, len(manifest.targets), numbers, manifest.fingerprint)
