"""Write trained scales or cores as a LoRA adapter for the original model: ``U diag(s (g - 1)) V^T`` is an update of rank k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import on_its_own_terms
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import check_scales, read_scales, train_of_values
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from surgery.progress import Progress, listening
from surgery.publish.results import publish_adapter
from surgery.publish.told import ExportedUpdate
from surgery.reports import Report
from surgery.run.output_paths import check_no_model, check_output_path
from surgery.run.run import Run
from surgery.updates.peft_adapter import ADAPTER_FILES, PeftAdapter
from surgery.updates.protocol import ScalesUpdate
from surgery.updates.writing.single_experts import note_older_peft


@dataclass(frozen=True, slots=True)
class ExportReport(Report):
    """What an export wrote.

    Attributes:
        out: the folder.
        format: of the adapter: ``peft``.
        modules: how many modules have an update.
        rank: of all of them.
        bytes_written: of the adapter's weights.
    """

    out: Path
    format: str
    modules: int
    rank: int
    bytes_written: int


@on_its_own_terms
def export(
    factorized: str | Path,
    scales: str | Path | Mapping[str, torch.Tensor],
    out: str | Path,
    *,
    push_to_hub: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write scales or cores as a LoRA adapter against the original model, in the format of PEFT.

    ``A = V^T`` and ``B = U diag(s (g - 1))``, or for cores ``B = U diag(sqrt s) (C - I) diag(sqrt s)``, padded with zeros to
    one rank for all modules, with alpha equal to it: loaders that ignore patterns of ranks take it as well. Only one module is
    held in memory.

    Args:
        factorized: a folder written by ``factorize``.
        scales: a scales file or a folder that holds one, or for the key of each target ``g``, or its core ``C``.
        out: folder to write; ``adapter_config.json`` comes last. The same adapter that is there already is left as it is.
        push_to_hub: repo id that the adapter is uploaded to as well. An earlier result of surgery there is replaced.
        private: whether a repository that is created for it is private.
        overwrite: write in any case, in place of whatever adapter is in ``out``.
        progress: told how far it is, and what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        What was written, or is there already.

    Raises:
        OptionError: a target that an adapter cannot change, or that PEFT is known to load wrongly.
        OutputError: another adapter is there.
        MissingExtra: a transformers model, and transformers is not installed.
        SurgeryError: the factorized folder or the scales are damaged, or do not belong together.

    Warns:
        SurgeryWarning: see ``surgery.format.scales.reading.read_scales``.
    """
    progress = listening()
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    values = check_scales(scales, manifest) if isinstance(scales, Mapping) else read_scales(Path(scales), manifest)
    check_no_model(out)
    update = ScalesUpdate(values)
    there = not overwrite and any((out / name).exists() for name in ADAPTER_FILES)
    for name in ADAPTER_FILES:
        check_output_path(out / name, [factorized], overwrite=overwrite or there)
    adapter = PeftAdapter.of(factorized, manifest, update, progress) if there else None
    if adapter is not None and not adapter.is_in(out, progress):
        for name in ADAPTER_FILES:
            check_output_path(out / name, [factorized], overwrite=False)
    with Run(out) as run, run.uploading(push_to_hub, private=private):
        if adapter is not None:
            if not (out / ADAPTER_CONFIG).exists():  # stopped just before the end
                adapter.adapter.write_config(out)
            progress.note(f"{out} is already complete" + (": nothing to do" if run.upload is None else ""))
        else:
            adapter = PeftAdapter.of(factorized, manifest, update, progress)
            adapter.write(out, progress)
        note_older_peft(adapter.adapter)
        files, modules, rank = {name: out / name for name in ADAPTER_FILES}, adapter.adapter.modules, adapter.adapter.rank
        update_told = ExportedUpdate(modules, rank, train_of_values(values, manifest))
        publish_adapter(run.upload, files, manifest, factorized, update_told)
    return ExportReport(out, "peft", modules, rank, (out / ADAPTER_WEIGHTS).stat().st_size)
