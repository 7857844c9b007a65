"""Write trained scales as a LoRA adapter for the original model: ``U diag(s (g - 1)) V^T`` is an update of rank k."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from surgery.device import on_its_own_terms
from surgery.errors import OptionError, OutputError
from surgery.files.access import write_errors
from surgery.files.file_writer import FileWriter, sync_directory, write_file
from surgery.format.factors import FactorsReaders
from surgery.format.header import TensorEntry, make_header
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.scales import check_scales, read_scales
from surgery.memory import bytes_of
from surgery.models.carriers import Carrier, Layer, carriers_of, places_of, terms_of
from surgery.models.peft_api import too_old_for_experts
from surgery.models.placement import Piece, Place
from surgery.models.skeleton import skeleton
from surgery.names import ADAPTER_CONFIG, CONFIG_FILE
from surgery.progress import Progress, listening, phase
from surgery.publish.results import publish_adapter
from surgery.reports import Report
from surgery.run.output_paths import check_output_path
from surgery.run.run import Run
from surgery.updates.lora import PREFIX, WEIGHTS

#: Families whose experts PEFT takes one by one and puts together as transformers does; measured (docs/training.md).
_EXPERTS_ONE_BY_ONE = ("mixtral", "olmoe", "qwen3_moe")
_FOLD_HINT = "fold instead: surgery fold gives standard weights for any model. Or factorize without it: --exclude"


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


@dataclass(frozen=True, slots=True)
class _AdaptedModule:
    """A module of the adapter.

    Attributes:
        name: of the module.
        carrier: its weight; None for one of the experts that the model stacks.
        targets: what is in it, with the places of each.
        rank: of all of that.
        A, B: shapes, with this rank.
    """

    name: str
    carrier: Carrier | None
    targets: list[tuple[TargetRecord, list[Place]]]
    rank: int
    A: tuple[int, ...]
    B: tuple[int, ...]


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
    """Write scales as a LoRA adapter against the original model, in the format of PEFT.

    ``A = V^T`` and ``B = U diag(s (g - 1))``, padded with zeros to one rank for all modules, with alpha equal to it:
    loaders that ignore patterns of ranks take it as well. Only one module is held in memory.

    Args:
        factorized: a folder written by ``factorize``.
        scales: a scales file or a folder that holds one, or for the key of each target ``g``.
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
        SurgeryWarning: see ``surgery.format.scales.read_scales``.
    """
    progress = listening()
    factorized, out = Path(factorized), Path(out)
    manifest = Manifest.read(factorized)
    values = check_scales(scales, manifest) if isinstance(scales, Mapping) else read_scales(Path(scales), manifest)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is no folder", hint="-o chooses another one")
    if (out / CONFIG_FILE).exists():
        # transformers would load what is there with the adapter, without a word.
        raise OutputError(f"there is a model in {out}, which an adapter must not come into", hint="-o chooses another folder")
    there = not overwrite and any((out / name).exists() for name in (ADAPTER_CONFIG, WEIGHTS))
    for name in (ADAPTER_CONFIG, WEIGHTS):
        check_output_path(out / name, [factorized], overwrite=overwrite or there)
    adapter = _Adapter.of(factorized, manifest, values, progress) if there else None
    if adapter is not None and not adapter.is_in(out, factorized, values, progress):
        for name in (ADAPTER_CONFIG, WEIGHTS):
            check_output_path(out / name, [factorized], overwrite=False)
    with Run(out) as run, run.uploading(push_to_hub, private=private):
        if adapter is not None:
            if not (out / ADAPTER_CONFIG).exists():  # stopped just before the end
                write_file(out / ADAPTER_CONFIG, adapter.config)
            progress.note(f"{out} is already complete" + (": nothing to do" if run.upload is None else ""))
        else:
            adapter = _Adapter.of(factorized, manifest, values, progress)
            adapter.write(out, factorized, values, progress)
        if any(module.carrier is None for module in adapter.modules) and (older := too_old_for_experts()) is not None:
            progress.note(f"the adapter changes experts: PEFT loads it from 0.20 on, and here is {older}")
        files, modules = {name: out / name for name in (ADAPTER_CONFIG, WEIGHTS)}, len(adapter.modules)
        publish_adapter(run.upload, files, manifest, factorized, modules=modules, rank=adapter.rank)
    return ExportReport(out, "peft", modules, adapter.rank, (out / WEIGHTS).stat().st_size)


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What an export consists of.

    Attributes:
        modules: the modules, in the order of the file.
        carriers: the parameters of the model.
        rank: of all modules.
        config: the text of ``adapter_config.json``.
    """

    manifest: Manifest
    modules: list[_AdaptedModule]
    carriers: dict[str, Carrier]
    rank: int
    config: bytes

    @classmethod
    def of(cls, factorized: Path, manifest: Manifest, values: Mapping[str, torch.Tensor], progress: Progress) -> Self:
        with phase(progress, "loading transformers"):  # most of the time that a small export takes
            modules, carriers = _adapted_modules(skeleton(factorized, exact=True), manifest)
        held = {target.key for module in modules for target, _ in module.targets}
        for target in manifest.targets:
            if target.key not in held and not (values[target.key] == 1).all():
                raise _not_exportable(target, "scales other than 1, and the model that the config names does not have it")
        rank = max(module.rank for module in modules)
        config = json.dumps(_config(modules, manifest, rank), indent=1).encode() + b"\n"
        return cls(manifest, modules, carriers, rank, config)

    def is_in(self, out: Path, factorized: Path, values: Mapping[str, torch.Tensor], progress: Progress) -> bool:
        """Whether a folder holds this adapter, byte for byte, perhaps but for the config, which comes last."""
        try:
            if (out / ADAPTER_CONFIG).exists() and (out / ADAPTER_CONFIG).read_bytes() != self.config:
                return False
            with (
                open(out / WEIGHTS, "rb") as weights,
                closing(self._contents("comparing", factorized, values, progress)) as contents,
            ):
                return all(weights.read(len(data)) == data for data in contents) and not weights.read(1)
        except OSError:
            return False

    def write(self, out: Path, factorized: Path, values: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """The weights, then the config, without which there is no adapter. An earlier one is there until the weights are."""
        with FileWriter(out / WEIGHTS) as writer:
            for data in self._contents("exporting", factorized, values, progress):
                writer.write(data)
            with write_errors(out):
                (out / ADAPTER_CONFIG).unlink(missing_ok=True)
                sync_directory(out)
            writer.commit(WEIGHTS)
        write_file(out / ADAPTER_CONFIG, self.config)

    def _contents(
        self, what: str, factorized: Path, values: Mapping[str, torch.Tensor], progress: Progress
    ) -> Generator[bytes | memoryview]:
        """The file of weights, one half of a module at a time."""
        entries = [entry for module in self.modules for entry in _entries(module, self.rank)]
        size = sum(entry.nbytes for entry in entries)
        with phase(progress, what, size), FactorsReaders(factorized, self.manifest) as factors:
            yield make_header(entries, {"format": "pt"})
            for module in self.modules:
                progress.item(module.name)
                for half in _halves(module, self.carriers, factors, values, self.rank):
                    yield bytes_of(half)
                    progress.advance(half.nbytes)


def _adapted_modules(model: nn.Module | None, manifest: Manifest) -> tuple[list[_AdaptedModule], dict[str, Carrier]]:
    """The modules of the adapter, sorted by name, and the parameters of the model."""
    if model is None:
        places, carriers = _as_named(manifest)
    else:
        places = places_of(model, manifest)
        carriers = carriers_of(model, {place.parameter for found in places.values() for place in found})
    found: dict[str, tuple[Carrier | None, list[tuple[TargetRecord, list[Place]]]]] = {}
    experts: dict[str, list[TargetRecord]] = {}
    for target in manifest.targets:
        by_parameter: dict[str, list[Place]] = {}
        for place in places.get(target.tensor, ()):
            by_parameter.setdefault(place.parameter, []).append(place)
        for parameter, inside in by_parameter.items():
            if len(inside[0].shape) == 3 and target.view == "matrix":
                experts.setdefault(parameter, []).append(target)
                found[_module_of(target.tensor, target)] = (None, [(target, inside)])
                continue
            carrier = carriers[parameter]
            _check_carrier(target, carrier)
            found.setdefault(_module_of(parameter, target), (carrier, []))[1].append((target, inside))
    if experts and model is not None:
        _check_experts(model, manifest, experts, found)
    modules = []
    for name, (owner, targets) in sorted(found.items()):
        rank = sum(target.rank * len(inside) for target, inside in targets)
        shape = tuple(targets[0][0].shape) if owner is None else owner.shape
        if owner is not None and owner.layers[0].kind == "transposed":
            shape = shape[::-1]
        points = (1,) * (len(shape) - 2)
        modules.append(_AdaptedModule(name, owner, targets, rank, (rank, *shape[1:]), (shape[0], rank, *points)))
    return modules, carriers


def _as_named(manifest: Manifest) -> tuple[dict[str, list[Place]], dict[str, Carrier]]:
    """For a model that is not transformers': modules are named as in the checkpoint."""
    places, carriers = {}, {}
    for target in manifest.targets:
        places[target.tensor] = [Place(target.tensor, tuple(target.shape), Piece.whole(target.tensor, target.shape))]
        kind = {"matrix": "linear", "convolution": "convolution", "stack": "unknown"}[target.view]
        carriers[target.tensor] = Carrier([Layer(nn.Module(), "weight", kind)], tuple(target.shape), False)
    return places, carriers


def _module_of(tensor: str, target: TargetRecord) -> str:
    module, _, last = tensor.rpartition(".")
    if last != "weight":
        raise _not_exportable(target, "no weight of a module")
    return module


def _check_carrier(target: TargetRecord, carrier: Carrier) -> None:
    """Refuse what an adapter changes in another way than fold, or not at all."""
    layer = carrier.layers[0]
    if layer.kind not in ("linear", "transposed", "convolution"):
        raise _not_exportable(target, layer.described)
    if len(carrier.layers) > 1:
        raise _not_exportable(target, "a weight that several modules share")
    if layer.kind == "convolution" and getattr(layer.module, "groups", 1) != 1:
        raise _not_exportable(target, "a convolution in groups")


def _check_experts(
    model: nn.Module, manifest: Manifest, experts: Mapping[str, Sequence[TargetRecord]], found: Mapping[str, Any]
) -> None:
    """PEFT puts the updates of experts together by the last part of their names, for some families.

    A dense or shared MLP beside them has the same names and is lost without a word (deepseek_v3, qwen2_moe).
    """
    first = next(iter(experts.values()))[0]
    family = str(getattr(model.config, "model_type", None))
    if family not in _EXPERTS_ONE_BY_ONE:
        raise _not_exportable(first, f"experts of {family}, which PEFT does not load as they are")
    projections = {target.tensor.rsplit(".", 2)[-2] for targets in experts.values() for target in targets}
    beside = [name for name, (owner, _) in found.items() if owner is not None and name.rsplit(".", 1)[-1] in projections]
    if beside:
        raise _not_exportable(first, f"experts beside {beside[0]!r}, which PEFT would take for one of them")
    for parameter, targets in experts.items():
        size = model.get_parameter(parameter).shape[0]
        parts = 2 if "gate_up" in parameter else 1
        if len(targets) != parts * size:
            raise _not_exportable(first, f"{len(targets)} of the {parts * size} matrices in {parameter!r}")


def _not_exportable(target: TargetRecord, got: str) -> OptionError:
    return OptionError(f"{target.key!r} cannot be exported as LoRA", got=got, hint=_FOLD_HINT)


def _entries(module: _AdaptedModule, rank: int) -> list[TensorEntry]:
    shapes = {"lora_A": (rank, *module.A[1:]), "lora_B": (module.B[0], rank, *module.B[2:])}
    return [
        TensorEntry(f"{PREFIX}{module.name}.{half}.weight", "F32", shape, 0, 4 * math.prod(shape))
        for half, shape in shapes.items()
    ]


def _halves(
    module: _AdaptedModule, carriers: dict[str, Carrier], factors: FactorsReaders, values: Mapping[str, torch.Tensor], rank: int
) -> Iterator[torch.Tensor]:
    """A and B, float32, on the CPU."""
    lefts, rights = [], []
    for target, places in module.targets:
        with factors.of(target) as reader:
            kept = reader.factors(target)
        change = (kept.s.double() * (values[target.key].double() - 1)).float()
        if module.carrier is None:
            pairs = [(kept.U, kept.V)]
        else:
            pairs = [(term.left, term.right) for _, term in terms_of(target, places, carriers, [kept])]
        for left, right in pairs:
            if module.carrier is not None and module.carrier.layers[0].kind == "transposed":
                left, right = right, left
            lefts.append(left * change)
            rights.append(right)
    missing = rank - module.rank
    A = nn.functional.pad(torch.cat(rights, dim=1).T, (0, 0, 0, missing))
    B = nn.functional.pad(torch.cat(lefts, dim=1), (0, missing))
    yield A.contiguous()
    yield B.contiguous()


def _config(modules: Sequence[_AdaptedModule], manifest: Manifest, rank: int) -> dict[str, Any]:
    # Experts by the last part of their names, which is what PEFT looks at; there may be tens of thousands.
    names = {module.name if module.carrier is not None else module.name.rsplit(".", 1)[-1] for module in modules}
    transposed = any(module.carrier is not None and module.carrier.layers[0].kind == "transposed" for module in modules)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": manifest.source.repo_id,
        "revision": manifest.source.commit,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }
