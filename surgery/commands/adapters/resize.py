"""The verb ``resize``: an adapter of another rank, without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from surgery.device import on_its_own_terms
from surgery.errors import OptionError, OutputError
from surgery.names import ADAPTER_FILES, DTYPES, Dtype
from surgery.progress import Progress
from surgery.reports import Report
from surgery.run.journal import Journal
from surgery.run.output_paths import check_no_model, check_output_path
from surgery.run.run import Run
from surgery.solvers.limits import check_energy
from surgery.source.adapter import local_adapter
from surgery.updates.adapters.reading import diffusion_file
from surgery.updates.reranked import WantedRank
from surgery.updates.resizing import ResizedAdapter, ResizedModule, ResizeOptions, resized_adapter
from surgery.version import __version__


@dataclass(frozen=True, slots=True)
class ResizeReport(Report):
    """What a resize wrote, or would write.

    Attributes:
        out: the folder or file.
        modules: the modules with an update.
        rank_before: the largest rank of any module before.
        rank: the largest rank of any module now.
        kept: share of the squared norm of all updates that is in the kept directions; None if all updates are zero.
        kept_least: the smallest such share of any module.
        kept_least_in: the name of that module.
        error: norm of the difference between new and old updates, rounding included, relative to the old updates, in
            Frobenius norms; None if all updates are zero.
        bytes_before: size of the file of weights before.
        bytes_written: size of the new file of weights.
    """

    out: Path
    modules: tuple[ResizedModule, ...]
    rank_before: int
    rank: int
    kept: float | None
    kept_least: float | None
    kept_least_in: str | None
    error: float | None
    bytes_before: int
    bytes_written: int


@on_its_own_terms
def resize(
    adapter: str | Path,
    out: str | Path = "resized",
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    uniform: bool = False,
    dtype: Dtype | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ResizeReport:
    """Write a LoRA adapter with another rank, in its own layout and with its own names. No model is needed.

    The update ``scaling B A`` of each module is replaced by its best approximation of the new rank in the Frobenius
    norm. The approximation is computed in float64 and rounded once, and its scaling is 1. All other tensors keep their
    bytes, and all other entries of the config stay. The adapter's matrices are held in memory as float32.

    Args:
        adapter: as PEFT saves it, or in the layouts of diffusers and kohya: folder, file or repo id.
        out: folder to write. For an adapter in a single file it may also be a file, if its name ends in
            ``.safetensors``.
        rank: how many directions to keep of each update. An update with fewer directions keeps its own rank, and a note
            says so.
        energy: use this in place of a rank: keep the fewest directions that hold this share of each update's squared
            norm, above 0 and at most 1.
        max_rank: with an energy, the most directions.
        uniform: give all modules the largest rank of any module, padded with zeros, for loaders that do not support
            ranks by module.
        dtype: dtype of the new matrices; by default each keeps its own.
        dry_run: compute everything, and write nothing.
        overwrite: replace an earlier adapter in ``out``.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        What was written, and how much of the updates is kept.

    Raises:
        OptionError: an option is not valid, or the adapter is of another kind or has no low-rank updates.
        SourceError: there is no adapter, or it has a format that surgery does not read.
        ReadError, FormatError: a file cannot be read, is damaged, or holds NaN.
        OutputError: ``out`` holds an adapter already, or is (or lies inside) what is read; or the disk is full or
            fails.
        SurgeryError: any of these. The adapter is written completely, or not at all.
    """
    options = ResizeOptions(_wanted(rank, energy, max_rank), uniform, None if dtype is None else DTYPES[dtype])
    path, out = local_adapter(adapter), Path(out)
    if dry_run:
        return _report(out, resized_adapter(path, options))
    file = diffusion_file(path, of_any_name=True)
    if out.suffix == ".safetensors":
        if file is None:
            raise OutputError(f"{out} is to be a folder", got="the name of a file", hint="PEFT's adapters are folders: -o NAME")
        check_output_path(out, [path], overwrite=overwrite)
        resized = resized_adapter(path, options)
        resized.write_weights(out)
        return _report(out, resized)
    check_no_model(out)
    with Run(out) as run, run.locked([path]):
        for name in ADAPTER_FILES if file is None else [file.name]:
            check_output_path(out / name, [path], overwrite=overwrite or Journal.is_there(out))
        resized = resized_adapter(path, options)
        run.identify({"command": "resize", "tool": f"surgery {__version__}"})
        with run.files_together(resized.names, overwrite=overwrite) as place:
            resized.write(place)
    return _report(out, resized)


def _wanted(rank: int | None, energy: float | None, max_rank: int | None) -> WantedRank:
    if (rank is None) == (energy is None):
        raise OptionError(
            "a rank or an energy says how much is kept of each update",
            got="none" if rank is None else "both",
            expected="one of them",
            hint="--rank 16, or --energy 0.95",
        )
    if energy is None:
        if max_rank is not None:
            raise OptionError(
                "a largest rank goes with an energy", got=f"max-rank {max_rank} without one", hint="--energy 0.95"
            )
        if rank is not None and rank < 1:
            raise OptionError("the rank must be at least 1", got=rank)
        return WantedRank(rank, None)
    check_energy(energy, 1 if max_rank is None else max_rank)
    return WantedRank(max_rank, energy)


def _report(out: Path, resized: ResizedAdapter) -> ResizeReport:
    least = min((one.kept, one.module) for one in resized.modules if one.kept is not None) if resized.norm else (None, None)
    return ResizeReport(
        out=out,
        modules=resized.modules,
        rank_before=max(one.rank_before for one in resized.modules),
        rank=max(one.rank for one in resized.modules),
        kept=resized.kept / resized.norm if resized.norm else None,
        kept_least=least[0],
        kept_least_in=least[1],
        error=math.sqrt(resized.error / resized.norm) if resized.norm else None,
        bytes_before=resized.weights.stat().st_size,
        bytes_written=resized.size,
    )
