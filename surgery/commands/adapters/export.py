"""Write scales or cores as an adapter of other tools: as the LoRA that they amount to, or as one that PEFT trains further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.files.access import read_errors
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import check_scales, train_of_values
from surgery.format.scales.writing import untouched
from surgery.names import ADAPTER_CONFIG, ADAPTER_FILES, Train
from surgery.progress import Progress, listening
from surgery.publish.results import publish_adapter
from surgery.publish.told import ExportedUpdate
from surgery.reports import Report
from surgery.run.output_paths import check_no_model, check_no_other_adapter, check_output_path
from surgery.run.run import Run
from surgery.trained.reading import adapter_kind, read_any_trained, trained_path
from surgery.trained.residual_lora import residual_lora_exported
from surgery.updates.exported import Exported, ExportedAdapter, ExportForm
from surgery.updates.protocol import ScalesUpdate
from surgery.updates.writing.single_experts import note_older_peft


@dataclass(frozen=True, slots=True)
class ExportReport(Report):
    """What an export wrote.

    Attributes:
        out: the folder.
        format: format of the adapter: ``peft``, ``peft-trainable``, ``peft-pissa``, ``diffusers`` or ``kohya``.
        modules: how many modules the adapter changes.
        rank: the rank, which all modules share.
        trainable: how many numbers are trained if the adapter is trained further; 0 for an adapter that is not meant
            for training.
        bytes_written: size of the adapter's weights.
    """

    out: Path
    format: str
    modules: int
    rank: int
    trainable: int
    bytes_written: int


@on_its_own_terms
def export(
    factorized: str | Path,
    scales: str | Path | Mapping[str, torch.Tensor] | None,
    out: str | Path,
    *,
    to: Exported = "peft",
    train: Train | None = None,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write scales or cores as an adapter.

    ``peft``: a LoRA for the original model, ``A = V^T`` and ``B = U diag(s (g - 1))``, or for cores
    ``B = U diag(sqrt s) (C - I) diag(sqrt s)``. Zeros pad all modules to one rank, and alpha equals this rank: loaders
    that ignore ranks by module can load it too. ``diffusers``, ``kohya``: the same in these layouts, for a component of
    a diffusion pipeline.

    ``peft-trainable``: an adapter of PEFT's TinyLoRA for the original model. Its trainable numbers are g - 1, or C - I
    (``surgery.updates.writing.tinylora_layout``).

    ``peft-pissa``: a LoRA for the residual in the factorized folder, ``A = diag(sqrt s) V^T`` and
    ``B = U diag(sqrt s)``. Residual and untouched adapter together are the original model (PiSSA, arXiv 2404.02948).

    After PEFT has trained one of these two, ``fold`` and ``export`` take the result. Only one module at a time is held
    in memory.

    Args:
        factorized: a folder that ``factorize`` has written.
        scales: a scales file, or a folder that holds one; or a mapping of the key of each target to ``g``, or to its
            core ``C``; or the folder of an adapter that was trained. None for untouched scales or cores.
        out: folder to write; ``adapter_config.json`` is written last. If ``out`` holds the same adapter already,
            surgery leaves it unchanged.
        to: the kind of adapter.
        train: with ``peft-trainable``: whether the adapter trains ``scales`` or a ``core`` of each target; by default
            what ``scales`` holds.
        base_model: the id or path of the model that the adapter names as its base model. By default it is the hub id of
            the model that was factorized, or the id in the model card of a local model. For ``peft-pissa`` it is the
            factorized folder.
        push_to_hub: id of a hub repository to which surgery also uploads the adapter. An earlier result of surgery
            there is replaced.
        private: whether a repository that surgery creates for this is private.
        overwrite: replace any adapter in ``out``.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        What was written, or what ``out`` holds already.

    Raises:
        OptionError: such an adapter cannot change one of the targets, or its loaders are known to load the target
            wrongly; or options contradict each other; or the given cores turn directions, but only scales are to be
            trained.
        OutputError: ``out`` holds another adapter, or is the folder of the adapter that was trained.
        MissingExtra: it is a transformers model, and transformers is not installed.
        SurgeryError: the factorized folder or the scales are damaged, or do not belong together.

    Warns:
        SurgeryWarning: the file does not say which factors it belongs to, or has other names or shapes than the
            targets; or as for ``read_scales``.
    """
    progress = listening()
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    check_no_model(out)
    _check_base(base_model, to, push_to_hub)
    inputs = [factorized]
    if isinstance(scales, str | Path):
        scales = trained_path(Path(scales))
        inputs += [scales / name for name in ADAPTER_FILES] if adapter_kind(scales) else []
    if base_model is None and manifest.source.repo_id is None and to != "peft-pissa":
        base_model = _own_name(factorized)
    of_residual = isinstance(scales, Path) and adapter_kind(scales) == "LORA"
    if isinstance(scales, Path) and of_residual:
        if to != "peft" or train is not None:
            raise OptionError(f"{scales} was trained on the residual, and is exported as a LoRA", got=to, expected="to 'peft'")
        adapter = residual_lora_exported(scales, factorized, manifest, base_model)
    else:
        values = _values(scales, factorized, manifest, to)
        form = ExportForm(to, _train(to, train, values, manifest), base_model)
        adapter = ExportedAdapter.of(factorized, manifest, ScalesUpdate(values), form, progress)
    check_no_other_adapter(out, adapter.files)
    there = not overwrite and any((out / name).exists() for name in adapter.files)
    for name in adapter.files:
        check_output_path(out / name, inputs, overwrite=overwrite or there)
    if there and not adapter.is_in(out, progress):
        for name in adapter.files:
            check_output_path(out / name, inputs, overwrite=False)
    with Run(out) as run, run.uploading(push_to_hub, private=private):
        if there:
            if not (out / ADAPTER_CONFIG).exists():  # stopped just before the end
                adapter.adapter.write_config(out)
            progress.note(f"{out} is already complete" + (": nothing to do" if run.upload is None else ""))
        else:
            adapter.write(out, progress)
        note_older_peft(adapter.adapter)
        files, rank = {name: out / name for name in adapter.files}, adapter.adapter.rank
        held: Train = train_of_values(adapter.update.values, manifest)
        held = held if adapter.tinylora is None else adapter.tinylora.train
        told = ExportedUpdate(adapter.adapter.modules, rank, None if of_residual else held, to)
        publish_adapter(run.upload, files, manifest, factorized, told)
    written = (out / adapter.adapter.file).stat().st_size
    return ExportReport(out, to, adapter.adapter.modules, rank, adapter.trainable, written)


def _check_base(base_model: str | None, to: Exported, push_to_hub: str | None) -> None:
    """Refuse an empty name, and the upload of one that is a path of this machine, which is nobody else's."""
    if base_model is not None and not base_model.strip():
        raise OptionError("the name of the model is empty", got=repr(base_model))
    if push_to_hub is not None and to == "peft-pissa" and base_model is None:
        raise OptionError(
            "the adapter would name a folder of this machine as its model",
            hint="--base-model REPO, the repository that has the factorized folder",
        )


def _own_name(factorized: Path) -> str | None:
    """The hub's id that the card of a model from a local folder gives to it; None if there is none."""
    card = factorized / "README.md"
    if not card.is_file():
        return None
    from surgery.publish.card_parts import name_in_card  # the hub client is slow to import

    with read_errors(card):
        return name_in_card(card.read_text(errors="replace"))


def _values(
    scales: str | Path | Mapping[str, torch.Tensor] | None, factorized: Path, manifest: Manifest, to: Exported
) -> dict[str, torch.Tensor]:
    """The scales or cores that are exported."""
    if scales is None:
        if to not in ("peft-trainable", "peft-pissa"):
            raise OptionError(f"an adapter of kind {to} holds what scales change", got="no scales", hint="give a scales file")
        return dict(ScalesUpdate.untouched(manifest.targets).values)
    return (
        check_scales(scales, manifest)
        if isinstance(scales, Mapping)
        else read_any_trained(Path(scales), factorized, manifest).values
    )


def _train(to: Exported, train: Train | None, values: Mapping[str, torch.Tensor], manifest: Manifest) -> Train:
    """What is trained of the adapter."""
    held = train_of_values(values, manifest)
    if to != "peft-trainable":
        if train is not None:
            raise OptionError(f"an adapter of kind {to} has one form", got=f"train {train!r}", expected="to 'peft-trainable'")
        return held
    if train == "scales" and held == "core":
        key = next((one.key for one in manifest.targets if _turns(values[one.key])), None)
        if key is not None:
            raise OptionError(f"the core of {key!r} turns directions, which scales do not", hint="train cores: --train core")
    return held if train is None else train


def _turns(core: torch.Tensor) -> bool:
    return bool((core * (1 - untouched(core, "core"))).any())
