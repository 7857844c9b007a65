"""What is trained of a factorized checkpoint, as PEFT saves the adapters of ``surgery.peft``; read without PEFT and a model.

An adapter is a folder with ``adapter_config.json``, whose ``peft_type`` is SPECTRAL, and ``adapter_model.safetensors``. The
last part of a tensor's name is the key of a target (``part_of_key``), after ``spectral_delta`` for what is trained and
``spectral_chosen`` for the directions that are.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import Any, get_args
from urllib.parse import unquote

import torch

from surgery.errors import OptionError, ScalesError, SourceError, SurgeryError, few
from surgery.files.json_files import read_json_object
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.format.scales.reading import ScalesFile
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SPECTRAL
from surgery.training.ways import Way, numbers_of_way, saved_as, spread_out, values_of
from surgery.updates.adapters.peft_lora import check_adapter_files

#: The attributes of PEFT's layers that are saved: what is trained, of which directions, and the fingerprint of the factors.
DELTA, CHOSEN, FINGERPRINT = "spectral_delta", "spectral_chosen", "spectral_fingerprint"

#: The case of letters swapped; of ASCII alone, since others do not all come back.
_SWAPPED = str.maketrans(ascii_letters, ascii_letters.swapcase())
_TENSOR = re.compile(rf"(?:.+\.)?(?P<kind>{DELTA}|{CHOSEN})\.(?P<key>[^.]+)")


@dataclass(frozen=True, slots=True)
class SpectralFile(ScalesFile):
    """The contents of an adapter, as those of a scales file.

    Attributes:
        absent: keys of targets that the trained model did not have, which are untouched and not among the values; sorted.
        factorized: the factorized folder that it was trained with, an absolute path on the machine of the training.
    """

    absent: tuple[str, ...] = ()
    factorized: str | None = None


def part_of_key(key: str) -> str:
    """The key of a target as one part of a parameter's name: no dots, nor the prefix that PEFT looks for.

    With the case of its letters swapped: transformers renames what it loads by expressions, in which a dot stands for any
    character, wherever they match; and they know no such names.
    """
    text = key.replace("%", "%25").replace("/", "%2F").translate(_SWAPPED)
    return text.replace("spectral_", "%73pectral_").replace(".", "/")


def key_of_part(text: str) -> str:
    """The inverse of ``part_of_key``."""
    return unquote(text.replace("/", ".")).translate(_SWAPPED)


def is_spectral(folder: Path) -> bool:
    """Whether a folder holds such an adapter, by its config; False where that is missing or cannot be read."""
    try:
        config = read_json_object(folder / ADAPTER_CONFIG, str(folder / ADAPTER_CONFIG))
    except SurgeryError:
        return False
    return config.get("peft_type") == SPECTRAL


def read_spectral(folder: Path) -> SpectralFile:
    """Read what such an adapter has trained.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Values for the targets that the trained model had, sorted by key.

    Raises:
        SourceError: a file is missing, or it is an adapter of another kind.
        OptionError: whole modules were trained beside it.
        ScalesError: a tensor is misshapen, not finite, missing, or of a target that the config does not know.
        FormatError, ReadError: a file is damaged, or cannot be read.
    """
    check_adapter_files(folder, "an adapter that was trained with surgery.peft")
    config = read_json_object(folder / ADAPTER_CONFIG, str(folder / ADAPTER_CONFIG))
    content = _Config(config, folder)
    path = folder / ADAPTER_WEIGHTS
    with ShardReader(path, name=str(path)) as reader:
        entries = _entries(reader, content)
        masks = {key: _mask(reader, entry, content.shapes[key]) for key, entry in entries[CHOSEN].items()}
        if masks and masks.keys() != entries[DELTA].keys():
            key = min(entries[DELTA].keys() ^ masks.keys())
            raise ScalesError(f"{path}: directions are chosen of some targets and not of others", got=repr(key))
        parameters = {
            key: _parameters(reader, entry, content, key, masks.get(key)) for key, entry in sorted(entries[DELTA].items())
        }
    values, beside = {}, {}
    for key, some in parameters.items():
        shape = content.shapes[key]
        values[key] = values_of(content.way, some, shape[-1]).reshape(*shape, *(shape[-1:] if content.way != "scales" else ()))
    if masks:
        beside["chosen"] = {key: masks[key] for key in parameters}
    if content.way == "orthogonal":
        beside["orthogonal"] = {key: some if len(content.shapes[key]) > 1 else some[0] for key, some in parameters.items()}
    return SpectralFile(
        values, content.fingerprint, saved_as(content.way), beside, absent=content.absent, factorized=content.factorized
    )


class _Config:
    """The checked config of an adapter.

    Attributes:
        way: what is trained.
        fingerprint: of the factors.
        shapes: key of each target -> (k,), or (B, k) for a stack.
        absent: see ``SpectralFile``.
        factorized: see ``SpectralFile``.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self._where = str(folder / ADAPTER_CONFIG)
        if config.get("peft_type") != SPECTRAL:
            raise SourceError(
                f"{folder} is no adapter that was trained with surgery.peft",
                got=f"peft_type {reprlib.repr(config.get('peft_type'))}",
                expected=SPECTRAL,
            )
        if config.get("modules_to_save"):
            raise OptionError(
                f"{folder}: beside the scales, whole modules were trained, which a scales file cannot hold",
                got=f"modules_to_save {reprlib.repr(config['modules_to_save'])}",
                hint="merge it in the loaded model, with PEFT's merge_and_unload()",
            )
        self.way: Way = self._checked(config, "train", lambda value: value in get_args(Way))
        self.fingerprint: str = self._checked(config, "fingerprint", lambda v: bool(re.fullmatch("[0-9a-f]{64}", str(v))))
        self.absent: tuple[str, ...] = tuple(sorted(self._checked(config, "absent", _is_list_of_names)))
        self.factorized: str | None = self._checked(config, "factorized", lambda value: isinstance(value, str | None))
        shapes = self._checked(config, "shapes", _are_shapes)
        self.shapes: dict[str, tuple[int, ...]] = {key: tuple(shape) for key, shape in shapes.items()}

    def _checked(self, config: Mapping[str, Any], name: str, fits: Any) -> Any:
        value = config.get(name)
        if not fits(value):
            raise ScalesError(f"{self._where}: {name} makes no sense", got=reprlib.repr(value), hint="save the adapter again")
        return value


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(key, str) for key in value)


def _are_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list)
        and len(shape) in (1, 2)
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)
        for shape in value.values()
    )


def _entries(reader: ShardReader, content: _Config) -> dict[str, dict[str, TensorEntry]]:
    """``DELTA`` or ``CHOSEN`` -> key of a target -> the tensor of that. All targets that are not absent have a delta."""
    found: dict[str, dict[str, TensorEntry]] = {DELTA: {}, CHOSEN: {}}
    for entry in reader.header.tensors:
        if entry.name.endswith(f".{FINGERPRINT}"):
            continue
        match = _TENSOR.fullmatch(entry.name)
        key = None if match is None else key_of_part(match["key"])
        if match is None or key not in content.shapes:
            raise ScalesError(
                f"{reader.name}: {entry.name!r} is of no target that the config knows",
                expected=f"{len(content.shapes)}, such as {min(content.shapes, default='none')!r}",
            )
        if key in found[match["kind"]]:
            raise ScalesError(f"{reader.name}: two tensors are of {key!r}", got=repr(entry.name))
        found[match["kind"]][key] = entry
    if lost := sorted(content.shapes.keys() - found[DELTA].keys() - set(content.absent)):
        raise ScalesError(f"{reader.name}: what was trained of {few(map(repr, lost))} is missing")
    return found


def _mask(reader: ShardReader, entry: TensorEntry, shape: tuple[int, ...]) -> torch.Tensor:
    """Which directions are trained, uint8 of the shape of scales."""
    if entry.dtype != "U8" or tuple(entry.shape) != shape:
        got = f"{entry.dtype} {list(entry.shape)}"
        raise ScalesError(f"{reader.name}: {entry.name!r} is no choice of directions", got=got, expected=f"U8 {list(shape)}")
    mask = reader.read_bytes(entry).view(entry.shape)
    counts = set(mask.reshape(-1, shape[-1]).sum(dim=1).tolist())
    if bool((mask > 1).any()) or len(counts) > 1 or 0 in counts:
        raise ScalesError(f"{reader.name}: {entry.name!r} is no choice of directions", got=few(sorted(counts)))
    return mask


def _parameters(reader: ShardReader, entry: TensorEntry, content: _Config, key: str, mask: torch.Tensor | None) -> torch.Tensor:
    """The parameters of all directions of a target, float32 (B, numbers)."""
    shape = content.shapes[key]
    k, count = shape[-1], math.prod(shape[:-1])
    trained = k if mask is None else int(mask.reshape(count, k)[0].sum())
    expected = [count * numbers_of_way(content.way, trained)]
    if entry.dtype != "F32" or list(entry.shape) != expected:
        got = f"{entry.dtype} {list(entry.shape)}"
        hint = "the file that PEFT's save_pretrained() writes has float32" if entry.dtype in ("BF16", "F16") else None
        raise ScalesError(
            f"{reader.name}: {entry.name!r} does not fit its target", got=got, expected=f"F32 {expected}", hint=hint
        )
    parameters = reader.read(entry).reshape(count, -1)
    if not bool(torch.isfinite(parameters).all()):
        raise ScalesError(
            f"{reader.name}: {entry.name!r} holds NaN or infinity", hint="the training diverged: take an earlier checkpoint"
        )
    if mask is None:
        return parameters
    return spread_out(content.way, parameters, k, mask.reshape(count, k).nonzero()[:, 1].view(count, -1))
