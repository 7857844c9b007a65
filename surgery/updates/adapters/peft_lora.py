"""LoRA adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source of the format: PEFT 0.18 to 0.21, ``LoraConfig``, ``get_peft_model_state_dict`` and ``set_peft_model_state_dict``.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.errors import FormatError, OptionError, SourceError, few
from surgery.escapes import quoted
from surgery.files.json_files import read_json_object
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.format.scales.no_scales import adapters_below
from surgery.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ATTACHED_NAME,
    CONFIG_FILE,
    PEFT_PREFIX,
    PICKLED_ADAPTER,
    RESIDUAL_OF,
    SPECTRAL,
    TINYLORA,
)
from surgery.progress import note
from surgery.updates.adapters.content import AdapterContent, ModuleUpdate, changes_nothing, checked_halves, read_numbers
from surgery.updates.adapters.patterns import ByModule
from surgery.updates.changes import ReplacedRows, StoredTensor

_MERGE = "merge the adapter with PEFT: merge_and_unload()"
#: Entries of the config that do not change what the adapter does to weights, or are read here.
_KNOWN = frozenset(
    [
        *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r"),
        *("rank_pattern", "target_parameters", "token_indices", "trainable_token_indices", "use_dora", "use_rslora"),
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "peft_version", "revision", "task_type"),
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "ensure_weight_tying"),
        *("fan_in_fan_out", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of ways to begin, which are looked at
        *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # ms-swift's own: how it trains
    ]
)
#: Ways to begin that leave the weights under the adapter as they are.
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")
#: Attributes by which wrappers hold a module: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"])
_ADAPTER = r"(\.(?P<adapter>[^.]+))?"
#: Of an embedding PEFT keeps parameters, of any other module layers. In all of them the adapter's name may be left.
_HALF = re.compile(
    rf"(?P<module>.+)\.((?P<half>lora_[AB]){_ADAPTER}\.(?P<leaf>weight|bias)"
    rf"|(?P<embedding>lora_embedding_[AB])(\.(?P<parameter>[^.]+))?"
    rf"|(?P<magnitude>lora_magnitude_vector)(\.(?!weight$)(?P<vector>[^.]+))?(\.weight)?)"
)
#: What ``ModuleUpdate.parts`` calls them.
_PARTS = {
    "lora_A.weight": "A",
    "lora_embedding_A": "A",
    "lora_B.weight": "B",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
}
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(default\.)?(?P<leaf>.+)")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.(?P<adapter>[^.]+))?")
_COPY = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.(base_layer|original_module)\.(?P<leaf>\w+)")
_NO_PARAMETER = re.compile(rf".+\.base_layer\.{ATTACHED_NAME}\..+|.+\.trainable_tokens_original(\.[^.]+)?")


def read_peft(folder: Path, residual: str | None = None) -> AdapterContent:
    """Read an adapter in PEFT's layout.

    Args:
        folder: with its files.
        residual: the fingerprint of the factorized checkpoint whose residual it may be for; None for the original model.

    Raises:
        SourceError: there is none in the folder, or in a format that has to be converted first.
        OptionError: an adapter of another kind, or with features that cannot be merged.
        FormatError: a file is damaged or contradicts itself.
        ReadError: a file cannot be read.
    """
    check_adapter_files(folder, "a LoRA adapter as PEFT saves it")
    config = read_json_object(folder / ADAPTER_CONFIG, str(folder / ADAPTER_CONFIG))
    unmarked = _checked_residual(config, folder, residual)
    check_config(unmarked, folder)
    with ShardReader(folder / ADAPTER_WEIGHTS, name=str(folder / ADAPTER_WEIGHTS)) as reader:
        content = _PeftFile(folder, unmarked, reader).content()
        reader.check_unchanged()
    return replace(content, of_residual=unmarked != config)


def check_adapter_files(folder: Path, expected: str) -> None:
    """Refuse a folder without the files of an adapter of PEFT. Raises SourceError."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            what = f"there is no {name} in {folder}" if folder.exists() else f"there is no folder {folder}"
            raise SourceError(what, expected=expected, hint=_how_to_have_it(folder))


def _how_to_have_it(folder: Path) -> str | None:
    """The hint for a path that is no folder with the files that PEFT writes today."""
    if folder.is_file():
        return f"give its folder, {quoted(folder.parent)}"
    if not folder.is_dir():
        return "check the name; for an adapter of the hub: hf download ID --local-dir FOLDER fetches it into a folder"
    if (folder / PICKLED_ADAPTER).is_file():
        return f"load it with PEFT, which reads {PICKLED_ADAPTER}, and save it again: save_pretrained writes {ADAPTER_WEIGHTS}"
    if below := adapters_below(folder):
        return f"give the one that is meant of the adapters in it, such as {quoted(below[-1])}"
    if (folder / CONFIG_FILE).is_file():
        return "this is the folder of a model: surgery merge takes the model first, then the adapters"
    if list(folder.glob("adapter_model-*-of-*.safetensors")):
        return f"it is in several files, which PEFT does not read either: put all their tensors into one {ADAPTER_WEIGHTS}"
    return None


def _checked_residual(config: Mapping[str, Any], folder: Path, residual: str | None) -> dict[str, Any]:
    """The config without the mark of an adapter that is for a residual, which has to be that of the checkpoint."""
    patterns = config.get("alpha_pattern")
    if not isinstance(patterns, dict):
        return dict(config)
    kept = {}
    for key, value in patterns.items():
        marked = key.startswith(RESIDUAL_OF)
        fingerprint, _, rest = key.removeprefix(RESIDUAL_OF).partition(")")
        if marked and fingerprint != residual:
            raise OptionError(
                f"{folder} was trained on the residual of a factorized checkpoint, and is no adapter of "
                + ("another one" if residual else "the original model"),
                got=f"factors {fingerprint[:12]}",
                expected=f"factors {residual[:12]}" if residual else None,
                hint=f"surgery merge FACTORIZED {quoted(folder)}, with the folder that it was exported from",
            )
        kept[rest if marked else key] = value
    return {**config, "alpha_pattern": kept}


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what no merge can do, or changes more than is known here, by name."""
    kind = config.get("peft_type")
    if kind == SPECTRAL:
        raise OptionError(
            f"{folder} holds scales or cores of a factorized checkpoint, and no LoRA adapter",
            got=SPECTRAL,
            expected="LORA",
            hint=f"surgery fold {_folder_or(config.get('factorized'), 'FACTORIZED')} {quoted(folder)} -o OUT",
        )
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        ours = f"{_MERGE}; one that surgery export has written to be trained: surgery fold FACTORIZED {quoted(folder)} -o OUT"
        hint = ours if kind == TINYLORA else _MERGE
        raise OptionError(f"{folder} is no LoRA adapter", got=reprlib.repr(kind), expected="LORA", hint=hint)
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(config.get(key), bool | None):
            raise FormatError(f"{folder}: {key} makes no sense", got=reprlib.repr(config[key]), expected="true or false")
    initial = config.get("init_lora_weights")
    if initial is not None and not isinstance(initial, bool) and initial not in _INITIAL:
        raise OptionError(
            f"{folder}: a LoRA adapter with init_lora_weights cannot be merged onto the original model",
            got=f"init_lora_weights = {reprlib.repr(initial)}, which changes the weights under the adapter when it begins",
            expected="an adapter of the weights as they are",
            hint="save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL), which "
            "converts it; or merge onto the residual model that it was trained on, with init_lora_weights true in its config",
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise _not_taken(folder, "bias", config["bias"])
    for key, value in sorted(config.items()):
        if key not in _KNOWN and value not in (None, False, [], {}, ""):
            raise _not_taken(folder, key, value)


def _folder_or(path: object, word: str) -> str:
    """A folder that a config names, if there is one on this machine; else a word for it."""
    return quoted(path) if isinstance(path, str) and Path(path).is_dir() else word


def _not_taken(folder: Path, key: str, value: object) -> OptionError:
    return OptionError(
        f"{folder}: a LoRA adapter with {key} cannot be merged here", got=f"{key} = {reprlib.repr(value)}", hint=_MERGE
    )


class _PeftFile:
    """The tensors of one adapter, put in their places. Each is either taken or refused.

    Args:
        folder: of the adapter.
        config: its checked ``adapter_config.json``.
        reader: of its weights.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], reader: ShardReader) -> None:
        self._folder, self._config, self._reader = folder, config, reader
        self._sources: dict[tuple[str, str], str] = {}
        self._adapter: str | None = None
        self._halves: dict[str, dict[str, torch.Tensor]] = {}
        self._copied: dict[str, StoredTensor] = {}
        self._tokens: dict[str, tuple[str, ReplacedRows]] = {}
        self._compared: dict[str, tuple[str, StoredTensor] | None] = {}
        self._rounded: list[str] = []

    def content(self) -> AdapterContent:
        for entry in self._reader.header.tensors:
            self._take(entry, bare_name(entry.name))
        if not (self._halves or self._copied or self._tokens):
            raise changes_nothing(str(self._folder), "no tensors that change a weight")
        self._check_complete()
        if self._config.get("bias") == "lora_only" and not any(name.endswith(".bias") for name in self._copied):
            note(
                f"{self._folder}: its config says bias = 'lora_only', and its file has no biases; PEFT before 0.21 trained "
                "those that the model has, and did not save them"
            )
        stacked = tuple(_names(self._config, "target_parameters", self._folder))
        modules = [module.replace(".base_layer", "") for module in self._halves]
        ends = {end.rpartition(".")[2] for end in stacked}
        scaling = PeftScaling(self._config, [*modules, *(f"{one}.{end}" for one in modules for end in ends)], self._folder)
        return AdapterContent(
            str(self._folder),
            [self._update(module, parts, scaling) for module, parts in self._halves.items()],
            self._copied,
            self._tokens,
            self._compared,
            stacked,
            self._config.get("peft_version"),
            rounded=self._rounded,
        )

    def _take(self, entry: TensorEntry, name: str) -> None:
        found = _HALF.fullmatch(name)
        if found is not None:
            self._one_adapter(found["adapter"] or found["parameter"] or found["vector"], entry)
            kind = f"{found['half']}.{found['leaf']}" if found["half"] else found["embedding"] or found["magnitude"]
            self._once(found["module"], kind, entry)
            self._halves.setdefault(found["module"], {})[kind] = read_numbers(self._reader, entry, _MERGE)
            self._rounded += [] if entry.dtype == "F32" else [entry.name]
        elif (found := _TOKENS.fullmatch(name)) is not None:
            self._one_adapter(found["adapter"], entry)
            self._once(found["module"], "tokens", entry)
            self._tokens[found["module"]] = (entry.name, self._rows(found["module"], entry))
        elif (found := _SAVED.fullmatch(name)) is not None:
            self._copy(f"{found['module']}.{found['leaf']}", entry)
        elif _NO_PARAMETER.fullmatch(name):
            self._compared[entry.name] = None
        elif (found := _COPY.fullmatch(name)) is not None and "lora_" not in name:
            if found["leaf"] == "bias" and self._config.get("bias") in ("all", "lora_only"):
                self._copy(f"{found['module'].replace('.base_layer', '')}.bias", entry)
            else:
                self._compared[entry.name] = (f"{found['module']}.{found['leaf']}", self._stored(entry))
        elif "lora_" in name or ".base_layer" in name:
            raise OptionError(
                f"{self._folder}: {entry.name!r} is no part of a LoRA update that is known here", got=entry.dtype, hint=_MERGE
            )
        else:
            self._copy(name, entry)

    def _copy(self, parameter: str, entry: TensorEntry) -> None:
        self._once(parameter, "copy", entry)
        self._copied[parameter] = self._stored(entry)

    def _stored(self, entry: TensorEntry) -> StoredTensor:
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise OptionError(
                f"{self._folder}: {entry.name!r} replaces a tensor of the model, and has a dtype that cannot be copied",
                got=entry.dtype,
                hint=_MERGE,
            )
        return StoredTensor.of(self._reader, self._folder / ADAPTER_WEIGHTS, entry)

    def _one_adapter(self, name: str | None, entry: TensorEntry) -> None:
        if name is not None:
            if self._adapter not in (None, name):
                raise FormatError(
                    f"{self._folder}: {entry.name!r} is of a second adapter in one file", got=name, expected=self._adapter
                )
            self._adapter = name

    def _once(self, module: str, kind: str, entry: TensorEntry) -> None:
        other = self._sources.setdefault((module, kind), entry.name)
        if other != entry.name:
            raise FormatError(f"{self._folder}: two tensors are the same without wrappers' names", got=[other, entry.name])

    def _check_complete(self) -> None:
        """Refuse a file that lacks what its config says it has. Raises FormatError."""
        saved = _names(self._config, "modules_to_save", self._folder)
        there = [f".{name}." for name in (*self._copied, *self._halves)]
        if lacking := [name for name in saved if not any(f".{name}." in one for one in there)]:
            raise FormatError(f"{self._folder}: modules_to_save are not in its file", got=few(there), expected=few(lacking))
        if (self._config.get("trainable_token_indices") or self._config.get("token_indices")) and not self._tokens:
            raise FormatError(f"{self._folder}: its config has trained tokens, and its file has none")

    def _rows(self, module: str, entry: TensorEntry) -> ReplacedRows:
        indices = self._config.get("trainable_token_indices") or self._config.get("token_indices")
        if isinstance(indices, dict):
            indices = next((of for name, of in indices.items() if f".{module}".endswith(f".{name}")), None)
        rows = indices if isinstance(indices, list) else []
        is_sound = all(type(one) is int and 0 <= one < 1 << 62 for one in rows) and len(set(rows)) == len(rows) > 0
        if not is_sound or entry.shape[:1] != (len(rows),) or len(entry.shape) != 2:
            raise FormatError(
                f"{self._folder}: the rows of trained tokens contradict its config",
                got=f"{entry.name!r} of {list(entry.shape)} for {reprlib.repr(indices)}",
                expected="an index for each row, each once",
            )
        order = torch.tensor(rows, dtype=torch.int64).argsort()
        values = read_numbers(self._reader, entry, _MERGE)
        return ReplacedRows(torch.tensor(rows, dtype=torch.int64)[order], values[order].contiguous())

    def _update(self, module: str, parts: Mapping[str, torch.Tensor], scaling: PeftScaling) -> ModuleUpdate:
        embedding = "lora_embedding_A" in parts
        halves = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
        expected = [*halves]
        if self._config.get("use_dora"):
            expected.append("lora_magnitude_vector")
        if self._config.get("lora_bias"):
            expected.append("lora_B.bias")
        if set(parts) != set(expected):
            raise FormatError(
                f"{self._folder}: {module!r} lacks a half of its update, or has more than its config says",
                got=sorted(parts),
                expected=sorted(expected),
            )
        A, B = checked_halves(str(self._folder), module, parts[halves[0]], parts[halves[1]])
        bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
        for what, vector in (("bias", bias), ("magnitude", magnitude)):
            if vector is not None and vector.numel() != len(B):
                raise FormatError(
                    f"{self._folder}: the {what} of {module!r} does not fit", got=list(vector.shape), expected=[len(B)]
                )
        inner = re.fullmatch(r"(?P<module>.*?)(?P<layers>(\.base_layer)*)", module)
        assert inner is not None  # any text fits
        if ".base_layer." in inner["module"]:
            raise OptionError(
                f"{self._folder}: the adapter changes {module!r}, a layer inside of one that it changes, as in torch's "
                "MultiheadAttention",
                got="an update that PEFT 0.21 adds twice to that layer, when it is trained and when it is merged",
                expected="layers of their own",
                hint=_MERGE,
            )
        return ModuleUpdate(
            inner["module"],
            A,
            B,
            scaling.of,
            {_PARTS[part]: self._sources[module, part] for part in parts},
            None if magnitude is None else magnitude.flatten(),
            None if bias is None else bias.flatten(),
            embedding,
            self._config.get("fan_in_fan_out") is True,
            inner["layers"].count(".base_layer"),
        )


def _names(config: Mapping[str, Any], key: str, folder: Path) -> list[str]:
    """An entry of the config that is a list of names, or nothing."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{folder}: {key} makes no sense", got=reprlib.repr(names), expected="a list of names")
    return names


def bare_name(name: str) -> str:
    """The name of a tensor in an adapter's file without those of wrappers around the model, and around PEFT's own."""
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    while words[:1] == ["module"] and len(words) > 1:
        del words[0]
    return ".".join(words).removeprefix(PEFT_PREFIX)


class PeftScaling:
    """The scaling of each update, by the ranks and alphas of the config."""

    def __init__(self, config: Mapping[str, Any], names: list[str], folder: Path) -> None:
        self._folder, self._rslora = folder, config.get("use_rslora") is True
        if names:
            self._ranks = ByModule(config, "rank_pattern", "r", names, folder)
            self._alphas = ByModule(config, "alpha_pattern", "lora_alpha", names, folder)

    def of(self, name: str, rows: int, matrices: int) -> float:
        """The scaling for a module or parameter whose A has so many rows, for so many matrices together.

        Raises:
            FormatError: the config says otherwise, or makes no sense.
        """
        r, alpha = self._ranks.of(name), self._alphas.of(name)
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e30
        if not is_number or type(r) is not int or r <= 0 or r * matrices != rows:
            raise FormatError(
                f"{self._folder}: rank or alpha of {name!r} contradicts its config",
                got=reprlib.repr([r, alpha]),
                expected=f"a rank of {rows / matrices:g}, as its matrices have, and a number",
            )
        return float(alpha / (math.sqrt(r) if self._rslora else r))
