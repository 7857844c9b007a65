"""LoRA adapters of diffusion models: in one file, as diffusers and kohya's scripts (and ComfyUI) store them.

Source of the formats: diffusers 0.35, ``loaders/lora_base.py`` and ``loaders/lora_conversion_utils.py``; kohya-ss/sd-scripts,
``networks/lora.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.errors import FormatError, OptionError, few
from surgery.files.json_files import json_object
from surgery.format.header import TensorEntry
from surgery.format.safetensors import ShardReader
from surgery.progress import note
from surgery.updates.adapters.content import AdapterContent, ModuleUpdate, Scaling, checked_halves, read_numbers
from surgery.updates.adapters.patterns import with_ranks
from surgery.updates.adapters.peft_lora import PeftScaling, check_config

_HINT = "merge it with the tool that it was made with"
#: The component of a name: in diffusers' layout with dots, in kohya's with underscores.
_COMPONENT = re.compile(r"(?P<component>(unet|transformer|text_encoder|controlnet|prior)(_\d+)?|diffusion_model)\.(?P<rest>.+)")
_KOHYA = re.compile(r"lora_(?P<component>unet|transformer|te\d?)_(?P<rest>[^.]+\..+)")
#: kohya's component -> those of diffusers that it can be.
_MEANT = {
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
    "unet": ("unet", "transformer"),
    "diffusion_model": ("unet", "transformer"),
}
_PART = re.compile(
    r"(?P<module>.+?)"
    r"((?P<old>_lora|\.lora|\.lora_linear_layer)?\.(?P<half>lora_A|lora_B|lora_down|lora_up|down|up)(\.default)?\.(?P<leaf>weight|bias)"
    r"|\.(?P<other>alpha|dora_scale|lora_magnitude_vector)(\.default)?(\.weight)?)"
)
_HALVES = {"lora_A": "A", "lora_down": "A", "down": "A", "lora_B": "B", "lora_up": "B", "up": "B"}
#: Words by which other methods are known, and their names.
_OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a core (lora_mid)",
    "oft_": "OFT",
    "on_input": "IA3",
    "w_norm": "a tuned norm",
    "b_norm": "a tuned norm",
    ".diff": "a full difference",
}
_METADATA = "lora_adapter_metadata"
#: What ``ModuleUpdate.parts`` calls them.
_PARTS = {"A.weight": "A", "B.weight": "B", "B.bias": "bias"}
#: kohya's own entries of the metadata that a file has by its ranks, and those that are hashes of its tensors.
_KOHYA_RANKS, _KOHYA_HASHES = ("ss_network_dim", "ss_network_alpha"), ("sshs_model_hash", "sshs_legacy_hash")


def read_diffusion(path: Path, component: str | None, entries: Collection[str]) -> AdapterContent:
    """Read what an adapter of a diffusion model has for one component.

    Args:
        path: of its safetensors file.
        component: such as ``unet``; None if the file is of one alone.
        entries: the names of the component's tensors; kohya's names are those of modules with underscores for dots.

    Raises:
        OptionError: another method than LoRA, a module that is not there, or nothing for this component.
        FormatError: the file is damaged or contradicts itself.
        ReadError: it cannot be read.
    """
    with ShardReader(path, name=str(path)) as reader:
        content = _DiffusionFile(path, component, entries, reader).content()
        reader.check_unchanged()
    return content


def read_diffusion_alone(path: Path) -> AdapterContent:
    """Read all that an adapter of a diffusion model has, for whichever components, with modules named as in the file.

    Raises:
        OptionError: another method than LoRA.
        FormatError: the file is damaged or contradicts itself.
        ReadError: it cannot be read.
    """
    with ShardReader(path, name=str(path)) as reader:
        content = _FileAlone(path, None, (), reader).content()
        reader.check_unchanged()
    return content


def metadata_with_ranks(metadata: Mapping[str, str], ranks: Mapping[str, int], path: Path) -> dict[str, str]:
    """The metadata of a file whose modules have got other ranks, and a scaling of 1.

    Hashes of what the tensors were are left out.

    Args:
        metadata: of the file.
        ranks: by module, as ``read_diffusion_alone`` names them.
        path: of the file, for messages.
    """
    changed = {key: value for key, value in metadata.items() if key not in _KOHYA_HASHES}
    # As kohya's own script for this writes them.
    several = "Dynamic" if len(set(ranks.values())) > 1 else str(max(ranks.values()))
    changed |= {key: several for key in _KOHYA_RANKS if key in metadata}
    if configs := _configs(metadata, path):
        owned: dict[str, dict[str, int]] = {}
        for module, rank in ranks.items():
            component, own = _place_in(configs, module)
            owned.setdefault(component, {})[own] = rank
        for component, own_ranks in owned.items():
            if component in configs:
                configs[component] = with_ranks(configs[component], own_ranks, path)
        packed = {
            f"{component}.{key}" if component else key: value
            for component, config in configs.items()
            for key, value in config.items()
        }
        changed[_METADATA] = json.dumps(packed, indent=2, sort_keys=True)
    return changed


class _DiffusionFile:
    """The tensors of one file, put in their places; arguments as for ``read_diffusion``."""

    def __init__(self, path: Path, component: str | None, entries: Collection[str], reader: ShardReader) -> None:
        self._path, self._reader, self._component = path, reader, component
        self._modules: dict[str, list[str]] = {}
        for name in entries:
            module = name.removesuffix(".weight")
            if module != name:
                self._modules.setdefault(module.replace(".", "_"), []).append(module)
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._sources: dict[str, dict[str, str]] = {}

    def content(self) -> AdapterContent:
        mine, others = self._of_component()
        if not mine:
            raise OptionError(
                f"{self._path}: nothing of it is for {self._component}",
                got=few(f"{n} for {one}" for one, n in sorted(others.items())),
            )
        for entry, name, is_kohya in mine:
            self._take(entry, name, is_kohya)
        if others:
            told = ", ".join(f"{count} for {one}" for one, count in sorted(others.items()))
            note(f"{self._path}: only the tensors for {self._component} are merged; there are others: {told}")
        scaling = self._metadata_scaling()
        return AdapterContent(str(self._path), [self._update(module, parts, scaling) for module, parts in self._parts.items()])

    def _of_component(self) -> tuple[list[tuple[TensorEntry, str, bool]], dict[str, int]]:
        """The entries for the component, without its name, and whether kohya's; how many there are for which others."""
        named: list[tuple[TensorEntry, str | None, str, bool]] = []
        for entry in self._reader.header.tensors:
            named.append((entry, *_parsed(entry.name)))
        there = {one for _, one, _, _ in named if one is not None}
        if self._component is None and len(there) > 1:
            raise OptionError(
                f"{self._path} is for several components of a diffusion model", got=sorted(there), expected="a choice of one"
            )
        mine, others = [], dict[str, int]()
        for entry, one, rest, is_kohya in named:
            meant = _MEANT.get(one or "", (one,)) if is_kohya or one == "diffusion_model" else (one,)
            if one is None or self._component is None or self._component in meant:
                mine.append((entry, rest, is_kohya))
            else:
                others[one] = others.get(one, 0) + 1
        return mine, others

    def _take(self, entry: TensorEntry, name: str, is_kohya: bool) -> None:
        other = next((method for sign, method in _OTHER_METHODS.items() if sign in name), None)
        found = _PART.fullmatch(name)
        if other is not None or found is None:
            raise OptionError(
                f"{self._path}: {entry.name!r} is no part of a LoRA update that is known here",
                got=other or f"{entry.dtype} {list(entry.shape)}",
                expected="LoRA matrices, alphas and DoRA's magnitudes",
                hint=_HINT,
            )
        module = self._module(entry, name, found, is_kohya)
        kind = found["other"] or f"{_HALVES[found['half']]}.{found['leaf']}"
        kind = "magnitude" if kind in ("dora_scale", "lora_magnitude_vector") else kind
        known = self._sources.setdefault(module, {}).setdefault(kind, entry.name)
        if known != entry.name:
            raise FormatError(f"{self._path}: two tensors are the same part of {module!r}", got=[known, entry.name])
        self._parts.setdefault(module, {})[kind] = read_numbers(self._reader, entry, _HINT)

    def _module(self, entry: TensorEntry, name: str, found: re.Match[str], is_kohya: bool) -> str:
        """The module that an entry is of."""
        return self._kohya_module(found["module"], entry) if is_kohya else self._own_module(found["module"], found["old"])

    def _kohya_module(self, name: str, entry: TensorEntry) -> str:
        """The module of the checkpoint that kohya's name, without dots, stands for."""
        bare = name.removeprefix("text_model_")  # which files have, or have not, by their age
        for one in (name, _of_diffusers(name), bare, f"text_model_{name}"):
            modules = self._modules.get(one, [])
            if len(modules) == 1:
                return modules[0]
            if modules:
                raise OptionError(f"{self._path}: {entry.name!r} could be of any of several modules", got=few(modules))
        raise OptionError(
            f"{self._path}: {entry.name!r} is for a module that is not in this checkpoint",
            got=name,
            expected=few(self._modules),
            hint="merge onto the model that the adapter was trained on, in diffusers' layout",
        )

    def _own_module(self, name: str, old: str | None) -> str:
        """The module of a name in diffusers' layout, also as it once was: beside the projections of the attention."""
        name = name.replace(".processor.", ".")
        module, _, projection = name.rpartition(".")
        if old == "_lora" and module.endswith("self_attn"):  # of a text encoder
            names = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
            return f"{module}.{names.get(projection, projection)}"
        return f"{name}.0" if projection == "to_out" and f"{name}.0".replace(".", "_") in self._modules else name

    def _metadata_scaling(self) -> Scaling | None:
        """What diffusers has written of ranks and alphas; None if nothing."""
        configs = _configs(self._reader.header.metadata, self._path)
        config = configs.get("") or configs.get(self._component or next(iter(configs), ""))
        if not config:
            return None
        check_config({"peft_type": "LORA", **config}, self._path)
        return PeftScaling(config, list(self._parts), self._path).of

    def _update(self, module: str, parts: Mapping[str, torch.Tensor], scaling: Scaling | None) -> ModuleUpdate:
        if not {"A.weight", "B.weight"} <= parts.keys() or "A.bias" in parts:
            raise FormatError(
                f"{self._path}: {module!r} lacks a half of its update, or has more than that",
                got=[*self._sources[module].values()],
                expected="a matrix down and one up",
            )
        A, B = checked_halves(str(self._path), module, parts["A.weight"], parts["B.weight"])
        alpha, magnitude, bias = parts.get("alpha"), parts.get("magnitude"), parts.get("B.bias")
        if alpha is not None and alpha.numel() != 1:
            raise FormatError(f"{self._path}: the alpha of {module!r} is no number", got=list(alpha.shape))
        by_input = (
            "dora_scale" in self._sources[module].get("magnitude", "") and magnitude is not None and magnitude.shape[0] == 1
        )
        for what, vector in (("magnitude", magnitude), ("bias", bias)):
            if vector is not None and (vector.numel() != len(B) or (what == "magnitude" and by_input and len(B) > 1)):
                raise FormatError(
                    f"{self._path}: the {what} of {module!r} does not fit", got=list(vector.shape), expected=[len(B)]
                )
        value = len(A) if alpha is None else alpha.item()
        return ModuleUpdate(
            module,
            A,
            B,
            (lambda name, rows, matrices: value / rows) if scaling is None or alpha is not None else scaling,
            {_PARTS.get(kind, kind): source for kind, source in self._sources[module].items()},
            None if magnitude is None else magnitude.flatten(),
            None if bias is None else bias.flatten(),
        )


class _FileAlone(_DiffusionFile):
    """A file without the model that it is for: all of it, by its own names."""

    def _of_component(self) -> tuple[list[tuple[TensorEntry, str, bool]], dict[str, int]]:
        return [(entry, *_parsed(entry.name)[1:]) for entry in self._reader.header.tensors], {}

    def _module(self, entry: TensorEntry, name: str, found: re.Match[str], is_kohya: bool) -> str:
        return entry.name.removesuffix(name) + str(found["module"])

    def _metadata_scaling(self) -> Scaling | None:
        configs = _configs(self._reader.header.metadata, self._path)
        owned: dict[str, list[str]] = {}
        for module in self._parts:
            component, own = _place_in(configs, module)
            owned.setdefault(component, []).append(own)
        scalings: dict[str, PeftScaling] = {}
        for component, config in configs.items():
            check_config({"peft_type": "LORA", **config}, self._path)
            scalings[component] = PeftScaling(config, owned.get(component, []), self._path)

        def of(module: str, rows: int, matrices: int) -> float:
            component, own = _place_in(configs, module)
            return scalings[component].of(own, rows, matrices) if component in scalings else 1.0

        return of


def _parsed(name: str) -> tuple[str | None, str, bool]:
    """The component that a name begins with, if with any, the rest of it, and whether it is kohya's."""
    kohya = _KOHYA.fullmatch(name)
    found = kohya or _COMPONENT.fullmatch(name)
    return (None, name, False) if found is None else (found["component"], found["rest"], kohya is not None)


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """What diffusers has written of ranks and alphas, by component, which is empty in the file of a single model."""
    text = metadata.get(_METADATA)
    everything = {} if text is None else json_object(text.encode(), f"{path}: its {_METADATA}")
    if "r" in everything:
        return {"": everything}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in everything.items():
        component, _, entry = key.partition(".")
        configs.setdefault(component, {})[entry] = value
    return configs


def _place_in(configs: Mapping[str, object], module: str) -> tuple[str, str]:
    """Which of ``configs`` a module's ranks are in, and the name that it has there."""
    component, own, _ = _parsed(module)
    if "" in configs:
        return "", own
    return component or next(iter(configs), ""), own


_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def _of_diffusers(name: str) -> str:
    """A name in the blocks of the original UNet (two layers in each), as diffusers counts them; itself if it is none."""
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)|middle_block_(\d)_(.+)", name)
    if found is None or name in _OUTER:
        return _OUTER.get(name, name)
    side, number, inner, rest, middle, rest_of_middle = found.groups()
    if middle is not None:
        is_attention, block, layer, rest = middle == "1", "mid_block", int(middle) // 2, rest_of_middle
    else:
        count = int(number) - (side == "input")
        block, layer = f"{'down' if side == 'input' else 'up'}_blocks_{count // 3}", count % 3
        if rest == "op":
            return f"{block}_downsamplers_0_conv"
        if rest == "conv":
            return f"{block}_upsamplers_0_conv"
        is_attention = inner == "1"
    return f"{block}_attentions_{layer}_{rest}" if is_attention else f"{block}_resnets_{layer}_{_RESNET.get(rest, rest)}"
