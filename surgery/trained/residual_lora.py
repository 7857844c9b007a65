"""A LoRA that was trained on the residual of a factorized checkpoint, as an update of the original weights.

The model that is trained computes with ``R + B A``, the original being ``R + U diag(s) V^T``; it begins with
``A0 = diag(sqrt s) V^T`` and ``B0 = U diag(sqrt s)``. Source: PiSSA (arXiv 2404.02948), whose conversion to a LoRA this is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from surgery.errors import OptionError, ScalesError, few
from surgery.escapes import quoted
from surgery.files.json_files import read_json_object
from surgery.format.header import TensorEntry
from surgery.format.manifest import Manifest
from surgery.models.carriers import Carrier
from surgery.names import ADAPTER_CONFIG, MANIFEST_FILE
from surgery.progress import listening, note
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.content import AdapterContent, ModuleUpdate
from surgery.updates.adapters.homes import Homes
from surgery.updates.adapters.peft_lora import read_peft
from surgery.updates.adapters.placement import placed
from surgery.updates.exported import ExportedAdapter, ExportForm
from surgery.updates.protocol import ScalesUpdate
from surgery.updates.writing.low_rank import LowRankTensor
from surgery.updates.writing.modules import AdaptedModule, Halved
from surgery.updates.writing.peft_layout import in_peft_layout

#: The largest distance of A or B from where it began, relative to that, over all modules: an adapter that was started again is
#: further. Where the config does not say for which residual the adapter is, it must be near: what ``export`` writes for the
#: original model has the same directions.
_FURTHEST, _NEAR = 0.95, 0.3
_FOLD = "fold it: surgery fold gives standard weights"


def read_residual_lora(path: Path, factorized: Path, manifest: Manifest, entries: Mapping[str, TensorEntry]) -> AdapterUpdate:
    """What a LoRA that was trained on the residual changes of the original weights: ``B A - B0 A0``, of twice its rank.

    It is made of ``[B - B0, B0]`` and ``[A; A - A0]``, so that what was not trained changes nothing, exactly.

    Args:
        path: the adapter's folder.
        factorized, manifest: the checkpoint whose residual it was trained on.
        entries: of all tensors of the source, by name.

    Raises:
        ScalesError: it did not begin with these factors, or lacks some of them.
        OptionError: it was trained on another residual, or is of a kind that cannot be merged.
        SourceError, FormatError, ReadError, MissingExtra: see ``surgery.updates.adapters.reading.read_adapters``.
    """
    changed = _differences(path, factorized, manifest)
    if not (changed.updates or changed.copied or changed.tokens):
        return AdapterUpdate({}, ())
    found = placed(changed, Homes(factorized, entries), {name: entry.shape for name, entry in entries.items()}, 1.0)
    return AdapterUpdate(found.changes, [found.account]).tied(manifest.targets)


def _differences(path: Path, factorized: Path, manifest: Manifest) -> AdapterContent:
    """An adapter of a residual as one of the original model, without the modules that have not been changed.

    Raises:
        ScalesError, OptionError: see ``read_residual_lora``.
    """
    content = read_peft(path, manifest.fingerprint)
    untouched = ScalesUpdate.untouched(manifest.targets)
    exported = ExportedAdapter.of(factorized, manifest, untouched, ExportForm("peft-pissa"), listening())
    given = {one.module: one for one in content.updates}
    found, met, far = [], set(), torch.zeros(2, 2, dtype=torch.float64)
    for module, A0, B0 in exported.initial():
        update = given.get(module.name)
        if update is None:
            raise _of_another_base(content, manifest, few(given), f"{module.name!r} among them")
        if update.magnitude is not None or update.bias is not None:
            raise OptionError(
                f"{content.where}: an adapter that was trained on a residual is taken as a plain LoRA only",
                got="one with " + ("DoRA" if update.magnitude is not None else "biases of its own (lora_bias)"),
                hint="merge it into the residual with PEFT: merge_and_unload()",
            )
        if update.A.shape != A0.shape or update.B.shape != B0.shape:
            got = f"for {module.name!r} A {list(update.A.shape)} and B {list(update.B.shape)}"
            raise _of_another_base(content, manifest, got, f"A {list(A0.shape)} and B {list(B0.shape)}")
        met.add(module.name)
        for half, (now, before) in enumerate(((update.A, A0), (update.B, B0))):
            far[half] += torch.stack([(now - before).square().sum(), before.square().sum()]).double()
        changed = _difference(update, A0, B0)
        found += [] if changed is None else [changed]
    distance, most = float((far[:, 0] / far[:, 1]).sqrt().max()), _FURTHEST if content.of_residual else _NEAR
    if not distance <= most:  # NaN is not either
        got = f"matrices that differ from these factors by {distance:.2f} of their norm"
        raise _of_another_base(
            content, manifest, got, f"at most {most}" + ("" if content.of_residual else ", as the config names no residual")
        )
    if content.rounded:
        note(
            f"{path}: {few(map(repr, content.rounded))} have been saved in half precision: the rounding error of "
            "the factors in them changes the weights, as training does"
        )
    return replace(content, updates=[*found, *(one for one in content.updates if one.module not in met)])


def _of_another_base(content: AdapterContent, manifest: Manifest, got: str, expected: str) -> ScalesError:
    """The error for an adapter that was not made for this residual: nearly always it is a LoRA of the original model."""
    what, exported = "did not begin with the factors of this checkpoint", "use the factorized folder that it was exported from"
    if content.of_residual:
        return ScalesError(f"{content.where} {what}", got=got, expected=expected, hint=exported)
    adapter, original = quoted(content.where), quoted(manifest.source.repo_id or _base(Path(content.where)) or "ORIGINAL")
    return ScalesError(
        f"{content.where} seems to be a LoRA of the original model: it {what}",
        got=got,
        expected=expected,
        hint=f"surgery merge {original} {adapter}; beside scales: surgery fold FACTORIZED SCALES --lora {adapter}. "
        f"If it was exported with --to peft-pissa: {exported}",
    )


def _base(adapter: Path) -> str | None:
    """The model that the config of an adapter names, unless that is a factorized checkpoint itself."""
    base = read_json_object(adapter / ADAPTER_CONFIG, str(adapter / ADAPTER_CONFIG)).get("base_model_name_or_path")
    is_model = isinstance(base, str) and base.isprintable() and not (Path(base) / MANIFEST_FILE).is_file()
    return str(base) if is_model else None


def _difference(update: ModuleUpdate, A0: torch.Tensor, B0: torch.Tensor) -> ModuleUpdate | None:
    scaled = update.B * update.scaling(update.module, len(update.A), 1)
    if torch.equal(scaled, B0) and torch.equal(update.A, A0):
        return None
    A, B = torch.cat([update.A, update.A - A0]), torch.cat([scaled - B0, B0], dim=1)
    return replace(update, A=A, B=B, scaling=_ones)


def _ones(_name: str, _rows: int, _matrices: int) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class _MadeModule(AdaptedModule):
    """A module whose halves are known.

    Attributes:
        A, B: float32, of the shapes that ``shapes`` gives for its rank.
    """

    A: torch.Tensor
    B: torch.Tensor

    def halves(
        self, rank: int, carriers: Mapping[str, Carrier], halved: Callable[[LowRankTensor], Halved]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lacking = rank - len(self.A)
        A = torch.cat([self.A, self.A.new_zeros(lacking, *self.A.shape[1:])])
        return A, nn.functional.pad(self.B, (0, lacking))


def residual_lora_exported(path: Path, factorized: Path, manifest: Manifest, base: str | None) -> ExportedAdapter:
    """A LoRA that was trained on the residual as one of the original model, of twice its rank, that is to be written.

    Raises:
        OptionError: it has not been changed, or has whole tensors besides.
        ScalesError, SourceError, FormatError, ReadError, MissingExtra: see ``read_residual_lora``.
    """
    changed = _differences(path, factorized, manifest)
    if changed.copied or changed.tokens or not changed.updates:
        raise OptionError(
            f"{path} cannot be exported as a LoRA of the original model",
            got="whole tensors besides the LoRA" if changed.updates else "an adapter that has not been trained",
            hint=_FOLD,
        )
    halves = {one.module: (one.A, one.B) for one in changed.updates}
    untouched = ScalesUpdate.untouched(manifest.targets)
    exported = ExportedAdapter.of(factorized, manifest, untouched, ExportForm("peft", base=base), listening())
    adapted = exported.adapter.adapted
    modules = [_made(one, *halves[one.name]) for one in adapted.modules if one.name in halves]
    if lacking := sorted(halves.keys() - {one.name for one in modules}):
        raise OptionError(f"{path} changes {lacking[0]!r}, which has no factors", hint=_FOLD)
    return replace(exported, adapter=in_peft_layout(replace(adapted, modules=modules), exported.form))


def _made(one: AdaptedModule, A: torch.Tensor, B: torch.Tensor) -> _MadeModule:
    return _MadeModule(one.name, one.kind, one.parameter, one.carrier, one.tensors, len(A), one.shape, A, B)
