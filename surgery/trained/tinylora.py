"""What PEFT has trained of an adapter that ``surgery.updates.writing.tinylora_layout`` has written."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path

import torch

from surgery.errors import FormatError, OptionError, ScalesError, few
from surgery.files.json_files import read_json_object
from surgery.format.header import TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.safetensors import ShardReader
from surgery.format.scales.reading import Trained
from surgery.format.scales.writing import as_cores
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINS
from surgery.progress import listening, note
from surgery.updates.adapters.peft_lora import bare_name, check_adapter_files
from surgery.updates.exported import ExportedAdapter, ExportForm
from surgery.updates.protocol import ScalesUpdate
from surgery.updates.writing.tinylora_layout import TinyLora

#: By how much A and B may differ from the factors: PEFT holds them in the dtype of the weights, rounded once.
_ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
#: Below the smallest normal number of float16 a rounding is no longer relative.
_LEAST = 2.0**-24
_HINT = "use the factorized folder that this adapter was exported from"


def read_tinylora(path: Path, factorized: Path, manifest: Manifest) -> Trained:
    """Read the scales or cores that an adapter of PEFT's TinyLoRA has.

    PEFT drops what it does not know from a config that it saves again, but it keeps A and B: these have to be the factors.

    Args:
        path: the adapter's folder.
        factorized, manifest: the checkpoint that it was exported from.

    Raises:
        ScalesError: it was made of other factors, or of none; or it holds NaN or infinity.
        FormatError, ReadError: a file cannot be read, or is damaged.
        SourceError: a file is missing.
        OptionError: its config says otherwise than exported adapters do.
        MissingExtra: see ``surgery.models.skeleton``.

    Warns:
        SurgeryWarning: its trained numbers are in half precision.
    """
    check_adapter_files(path, "an adapter of TinyLoRA as PEFT saves it")
    exported, tinylora = _exported(path, factorized, manifest)
    with ShardReader(path / ADAPTER_WEIGHTS, name=str(path / ADAPTER_WEIGHTS)) as reader:
        file = _File(reader, tinylora)
        file.check_names()
        for module, A, B in exported.initial():
            file.check_factors(module.name, A, B)
        values = file.values()
        reader.check_unchanged()
    absent: Mapping[str, torch.Tensor]
    absent = ScalesUpdate.untouched(one for one in manifest.targets if one.key not in values).values
    if tinylora.train == "core":
        absent = {key: as_cores(value) for key, value in absent.items()}
    return Trained({**values, **absent}, tinylora.train, {})


def _exported(path: Path, factorized: Path, manifest: Manifest) -> tuple[ExportedAdapter, TinyLora]:
    """The adapter as it was exported, and what it trains, by the numbers that each module has."""
    config = read_json_object(path / ADAPTER_CONFIG, str(path / ADAPTER_CONFIG))
    for key, expected in (("weight_tying", 0), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key) not in (expected, None, []):
            raise OptionError(
                f"{path}: an adapter with {key} is none that surgery export has written",
                got=f"{key} = {reprlib.repr(config[key])}",
                expected=repr(expected),
            )
    untouched = ScalesUpdate.untouched(manifest.targets)
    exported = ExportedAdapter.of(factorized, manifest, untouched, ExportForm("peft-trainable"), listening())
    assert exported.tinylora is not None
    kinds = [exported.tinylora.training(train) for train in TRAINS]
    sizes = [(one.rank, one.numbers) for one in kinds]
    given = config.get("r"), config.get("u")
    if given not in sizes:
        raise ScalesError(
            f"{path} has not been made of these factors",
            got=f"r and u {reprlib.repr(list(given))}",
            expected=f"{list(sizes[0])} for scales, or {list(sizes[1])} for cores",
            hint=_HINT,
        )
    return exported, kinds[sizes.index(given)]


class _File:
    """The weights of an adapter.

    Args:
        reader: of the file.
        tinylora: how it was exported.
    """

    def __init__(self, reader: ShardReader, tinylora: TinyLora) -> None:
        self._reader, self._tinylora = reader, tinylora
        self._by_name = {one.module.name: one for one in tinylora.modules}
        self._entries: dict[str, TensorEntry] = {}
        for entry in reader.header.tensors:
            other = self._entries.setdefault(bare_name(entry.name), entry)
            if other is not entry:
                raise FormatError(
                    f"{reader.name}: two tensors are the same without wrappers' names", got=[other.name, entry.name]
                )

    def _entry(self, key: str) -> TensorEntry:
        return self._entries[bare_name(key)]

    def check_names(self) -> None:
        """Refuse a file that has other tensors than were exported."""
        modules = self._tinylora.modules
        expected = {bare_name(key): key for one in modules for key in (*map(one.key_of, "ABP"), one.key_of_numbers)}
        # PEFT saves the weight under an adapter of the output head as well, which is not trained.
        copies = {f"{one.module.name}.base_layer.{leaf}" for one in modules for leaf in ("weight", "bias")}
        there = self._entries.keys()
        if missing := sorted(expected[name] for name in expected.keys() - there):
            got = few(sorted(self._reader.entries))
            raise ScalesError(f"{self._reader.name} lacks {missing[0]!r}", got=got, hint=_HINT)
        if unknown := sorted(self._entries[name].name for name in there - expected.keys() - copies):
            raise ScalesError(
                f"{self._reader.name} holds more than scales or cores", got=few(unknown), hint="they would not be folded"
            )

    def check_factors(self, module: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Refuse factors or projections of a module that are not those that were exported."""
        one = self._by_name[module]
        for part, expected in (("A", A), ("B", B), ("P", self._tinylora.projections(one))):
            entry = self._entry(one.key_of(part))
            if entry.dtype not in _ROUNDING or entry.shape != tuple(expected.shape):
                raise ScalesError(
                    f"{self._reader.name}: {entry.name!r} is not of these factors",
                    got=f"{entry.dtype} {list(entry.shape)}",
                    expected=f"F32 {list(expected.shape)}",
                    hint=_HINT,
                )
            there = self._reader.read(entry).float()
            margin = expected.abs() * _ROUNDING[entry.dtype] + (_LEAST if entry.dtype != "F32" else 0.0)
            if not bool(((there - expected).abs() <= margin).all()):
                raise ScalesError(f"{self._reader.name}: {entry.name!r} is not of these factors", hint=_HINT)

    def values(self) -> dict[str, torch.Tensor]:
        """Key of each target in the model -> its scales or core."""
        values: dict[str, torch.Tensor] = {}
        halves: list[str] = []
        for one in self._tinylora.modules:
            entry = self._entry(one.key_of_numbers)
            if entry.dtype not in _ROUNDING or entry.shape != (self._tinylora.numbers,):
                raise FormatError(
                    f"{self._reader.name}: {entry.name!r} is misshapen",
                    got=f"{entry.dtype} {list(entry.shape)}",
                    expected=f"F32 {[self._tinylora.numbers]}",
                )
            v = self._reader.read(entry).float()
            if not bool(torch.isfinite(v).all()):
                raise ScalesError(
                    f"{self._reader.name}: {entry.name!r} holds NaN or infinity",
                    hint="the training diverged: take an earlier checkpoint",
                )
            halves += [] if entry.dtype == "F32" else [entry.name]
            values |= self._tinylora.values(one, v)
        if halves:
            note(f"{self._reader.name}: {halves[0]!r} and {len(halves) - 1} others have been saved in half precision")
        return values
