"""The catalogue of what is merged, and what must come of it.

The truth is PEFT's own merge of the adapter, in float64, of a model whose weights are as exact as they are on disk, under the
names that ``save_pretrained`` writes. ``tests/test_peft_truths.py`` checks it by hand, and against what the adapted model
computed before it was saved. Where PEFT 0.21 gets it wrong, the truth is made by hand:

- A tied embedding with ``ensure_weight_tying``: merged into embedding and head, which are one weight, so twice.
- A tied embedding that is adapted in one of its two places: merged into both. No tied checkpoint computes what was trained.
"""

from __future__ import annotations

import atexit
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.models import tensors_of
from tests.releases import needs
from tests.truths.models import MODELS, saved_model
from tests.truths.peft_side import adapted, merged_by_peft, output_of, perturb, quietly
from tests.truths.rewriting import (
    CONFIG,
    WEIGHTS,
    as_diffusers,
    as_kohya,
    as_processors,
    configured,
    edited,
    half_precision,
    pickled,
    renamed,
    write_adapter,
)


class Built(NamedTuple):
    """A case on disk.

    Attributes:
        model: folder of the checkpoint.
        adapters: what is given to ``merge``, in its order.
        weights: with which each counts, if not 1.
        truth: name in the checkpoint -> float64 tensor, of all of them; None if the adapter must be refused.
        match: what a refusal must say.
        output: of the adapted model before it was saved, float64; None where it has not been run.
    """

    model: Path
    adapters: list[Path]
    weights: list[float] | None
    truth: dict[str, torch.Tensor] | None
    match: str
    output: torch.Tensor | None


_Made = tuple[list[Path], dict[str, torch.Tensor] | None, torch.Tensor | None]
#: Folder of a model and of the case -> adapters, truth, output.
Special = Callable[["Case", Path, Path], _Made]


@dataclass(frozen=True, eq=False)
class Case:
    """A model and an adapter of it.

    Attributes:
        name: of the case.
        model: one of ``MODELS``.
        options: of the ``LoraConfig``, besides rank 3 and alpha 5.
        dtype: of the checkpoint.
        size: of the random numbers that the adapter is made of.
        rewrite: changes the adapter's folder after the truth was found.
        special: makes the adapters in another way.
        weights: with which each adapter counts.
        match: what the refusal says, for a case that must be refused.
        or_refused: what a refusal says where the truth is not a checkpoint of the same tensors: either is right.
        runs: whether a model runs with the adapter in it.
        marks: what skips it where a release cannot make it.
    """

    name: str
    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    size: float = 0.1
    rewrite: Callable[[Path], None] | None = None
    special: Special | None = None
    weights: list[float] | None = None
    match: str = ""
    or_refused: str = ""
    runs: bool = True
    marks: Sequence[pytest.MarkDecorator] = ()

    def build(self, root: Path) -> Built:
        """Everything of the case, below ``root``; built when it is first asked for. Read-only."""
        with quietly():
            return _built(self, root)


@functools.cache
def shared_root() -> Path:
    """The folder for whoever has no reason to take another: what one test has built is there for all of them."""
    folder = tempfile.TemporaryDirectory(prefix="surgery-truths-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _built(case: Case, root: Path) -> Built:
    model = saved_model(root, case.model, case.dtype)
    folder = root / "cases" / case.name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True)
    adapters, truth, output = (case.special or _by_peft)(case, model, folder)
    if case.rewrite is not None:
        for adapter in adapters:
            case.rewrite(adapter)
    return Built(model, adapters, case.weights, None if case.match else truth, case.match, output)


def _by_peft(case: Case, model: Path, folder: Path) -> _Made:
    family, adapter = MODELS[case.model], folder / "adapter"
    trained = adapted(family, model, case.options, size=case.size)
    with quietly():
        trained.save_pretrained(adapter)
    if case.match:
        return [adapter], None, None
    return [adapter], merged_by_peft(family, model, adapter), output_of(family, trained) if case.runs else None


def scaling_of(config: dict[str, Any]) -> float:
    """Of an adapter without patterns."""
    r = float(config["r"])
    return float(config["lora_alpha"]) / (r**0.5 if config.get("use_rslora") else r)


def _tied(adapted_in: str) -> Special:
    """A tied embedding that is adapted in one place, or in both: by hand, the other place keeps the weight as it was."""

    def make(case: Case, model: Path, folder: Path) -> _Made:
        adapters, truth, output = _by_peft(case, model, folder)
        assert truth is not None
        tensors = load_file(adapters[0] / WEIGHTS)
        W = tensors_of(model)["model.embed_tokens.weight"].double()
        by_hand = dict(truth)
        if adapted_in == "head":
            A, B = (tensors[f"base_model.model.lm_head.lora_{half}.weight"].double() for half in "AB")
            update = B @ A
        else:
            A, B = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{half}"].double() for half in "AB")
            update = (B @ A).T
        changed = W + scaling_of(json.loads((adapters[0] / CONFIG).read_text())) * update
        if adapted_in == "both":
            by_hand["model.embed_tokens.weight"] = changed
        else:
            by_hand["model.embed_tokens.weight"] = W if adapted_in == "head" else changed
            by_hand["lm_head.weight"] = changed if adapted_in == "head" else W
        return adapters, by_hand, output

    return make


def _begun(init: str, *, converted: bool) -> Special:
    """An adapter whose beginning changed the weights under it, saved with the difference to that beginning, or as it is."""

    def make(case: Case, model: Path, folder: Path) -> _Made:
        family, adapter = MODELS[case.model], folder / "adapter"
        with quietly():
            torch.manual_seed(0)
            config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **case.options, "init_lora_weights": init})
            trained: Any = peft.get_peft_model(family.load(model).to(torch.float32), config)
            trained.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
            trained.save_pretrained(folder / "beginning")
            trained.peft_config["default"].init_lora_weights = init
            generator = torch.Generator().manual_seed(5)
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.data.add_(case.size * torch.randn(parameter.shape, generator=generator))
            if converted:
                trained.save_pretrained(adapter, path_initial_model_for_weight_conversion=str(folder / "beginning"))
            else:
                trained.save_pretrained(adapter)
        if not converted:
            return [adapter], None, None
        return [adapter], merged_by_peft(family, model, adapter), output_of(family, trained)

    return make


def _several(*options: dict[str, Any]) -> Special:
    """Adapters with a weight each: their updates by PEFT, one at a time, summed in float64."""

    def make(case: Case, model: Path, folder: Path) -> _Made:
        family = MODELS[case.model]
        before = {name: tensor.double() for name, tensor in tensors_of(model).items()}
        truth, adapters = dict(before), []
        for i, (one, weight) in enumerate(zip(options, case.weights or [1.0] * len(options), strict=True)):
            adapters.append(folder / f"adapter-{i}")
            with quietly():
                adapted(family, model, one, size=case.size, seed=2 + i).save_pretrained(adapters[-1])
            merged = merged_by_peft(family, model, adapters[-1])
            truth = {name: truth[name] + weight * (merged[name] - before[name]) for name in before}
        return adapters, truth, None

    return make


def _experts(names: Sequence[str]) -> Special:
    """Some experts, each with an adapter of its own under its name in the checkpoint, as adapters of module lists have them."""

    def make(case: Case, model: Path, folder: Path) -> _Made:
        truth = {name: tensor.double() for name, tensor in tensors_of(model).items()}
        generator = torch.Generator().manual_seed(4)
        chosen = [name for name in truth if any(f".experts.{i}." in name for i in (0, 2)) and name.split(".")[-2] in names]
        assert chosen
        modules = {}
        for name in chosen:
            m, n = truth[name].shape
            A, B = (case.size * torch.randn(shape, generator=generator) for shape in ((3, n), (m, 3)))
            modules[name.removesuffix(".weight")] = (A, B)
            truth[name] = truth[name] + 5 / 3 * (B.double() @ A.double())
        write_adapter(folder / "adapter", modules, alpha=5)
        return [folder / "adapter"], truth, None

    return make


def _exported(case: Case, model: Path, folder: Path) -> _Made:
    """What ``surgery export`` writes of scales."""
    family = MODELS[case.model]
    progress = surgery.Silent()
    surgery.factorize(model, folder / "f", rank=4, progress=progress)
    attached = family.load(model).to(torch.float32)
    scales = surgery.attach(attached, folder / "f")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in scales.parameters():
            delta.copy_(0.5 * torch.randn(delta.shape, generator=generator))
    scales.save(folder / "s.safetensors")
    with quietly():
        surgery.export(folder / "f", folder / "s.safetensors", folder / "adapter", progress=progress)
    return [folder / "adapter"], merged_by_peft(family, model, folder / "adapter"), output_of(family, attached)


def _in_half(case: Case, model: Path, folder: Path) -> _Made:
    """The truth of an adapter whose matrices were rounded to bfloat16 when it was saved."""
    adapters, _, _ = _by_peft(case, model, folder)
    half_precision(adapters[0])
    return adapters, merged_by_peft(MODELS[case.model], model, adapters[0]), None


def _by_diffusers(*, pipeline: bool) -> Special:
    """Saved by diffusers itself: by the model, or by its pipeline beside the model's adapter config."""

    def make(case: Case, model: Path, folder: Path) -> _Made:
        family, adapter = MODELS[case.model], folder / "adapter"
        trained: Any = family.load(model).to(torch.float32)
        trained.add_adapter(peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **case.options}))
        perturb(trained, case.size, 2)
        halves = peft.get_peft_model_state_dict(trained)
        if pipeline:
            about = trained.peft_config["default"].to_dict()
            of_pipeline: Any = diffusers.StableDiffusionPipeline
            of_pipeline.save_lora_weights(adapter, unet_lora_layers=halves, unet_lora_adapter_metadata=about)
        else:
            trained.save_lora_adapter(adapter)
        truth = {name: tensor.double() for name, tensor in tensors_of(model).items()}
        for name in [name for name in halves if name.endswith("lora_A.weight")]:
            A, B = halves[name].double(), halves[name.replace("lora_A", "lora_B")].double()
            weight = name.replace("lora_A.", "")
            truth[weight] = truth[weight] + 5 / 3 * (B.flatten(1) @ A.flatten(1)).reshape(truth[weight].shape)
        return [adapter], truth, output_of(family, trained)

    return make


def _of_another_model(case: Case, model: Path, folder: Path) -> tuple[list[Path], None, None]:
    other = saved_model(folder, "gpt2", torch.float32)
    with quietly():
        adapted(MODELS["gpt2"], other, case.options).save_pretrained(folder / "adapter")
    return [folder / "adapter"], None, None


def _with_more_words(case: Case, model: Path, folder: Path) -> tuple[list[Path], None, None]:
    with quietly():
        grown = MODELS[case.model].load(model)
        grown.resize_token_embeddings(53)
        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        trained: Any = peft.get_peft_model(grown, config)
        trained.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return [folder / "adapter"], None, None


def _one_of_two(case: Case, model: Path, folder: Path) -> tuple[list[Path], None, None]:
    """Two adapters."""
    for i in range(2):
        write_adapter(folder / f"{i}", {"model.layers.0.self_attn.q_proj": (torch.ones(1, 32), torch.ones(32, 1))}, alpha=1)
    return [folder / "0", folder / "1"], None, None


def _unheard_of(tensors: dict[str, torch.Tensor]) -> None:
    """A tensor that no reader knows."""
    tensors["base_model.model.model.layers.0.self_attn.q_proj.unheard_of"] = torch.ones(3)


def _nothing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: torch.zeros_like(value) for name, value in tensors.items() if "lora_B" in name})


def _half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}"
        tensors[f"{name}.default.weight"] = tensors[f"{name}.weight"].clone()


_BF16 = torch.bfloat16
_LINEAR = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
_Q: dict[str, Any] = {"target_modules": ["q_proj"]}
_SOME = {"target_modules": ["q_proj", "down_proj"]}
_PATTERNS = {
    "rank_pattern": {"layers.1.mlp.down_proj": 5, r"layers\.0\..*q_proj": 2},
    "alpha_pattern": {"down_proj": 7, "layers.0.self_attn.q_proj": 4},
}
_GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
_PARAMETERS: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
_UNET: dict[str, Any] = {"target_modules": ["to_q", "to_out.0", "conv1"]}
_UNET_ALIKE: dict[str, Any] = {**_UNET, "lora_alpha": 3}
_ATTENTION: dict[str, Any] = {"target_modules": ["to_q", "to_out.0"], "lora_alpha": 3}
#: Updates of a fraction of a bfloat16's step.
_SMALL = 0.003
_TIED = r"(?i)tie|share"
ties_adapters = needs("peft", ">=0.19", "ensure_weight_tying of an adapted embedding")
_PIPELINES = needs("diffusers", ">=0.36", "pipelines beside transformers 5")
_NEW_VLM = r"model\.language_model\."

CASES: list[Case] = [
    # Kinds of adapters, on a Llama.
    Case("lora, all linear layers", options=_LINEAR),
    Case("lora, bfloat16 model", options=_LINEAR, dtype=_BF16),
    Case("lora, small", "llama, wide", options=_LINEAR, dtype=_BF16, size=_SMALL),
    Case("lora, bfloat16 adapter", options=_SOME, special=_in_half),
    Case("rslora", options={**_SOME, "use_rslora": True}),
    Case("patterns of ranks and alphas", options={**_SOME, **_PATTERNS}),
    Case("patterns, rslora", options={**_SOME, **_PATTERNS, "use_rslora": True}),
    Case("one layer of two", options={**_SOME, "layers_to_transform": [1]}),
    Case("embedding and head", options={"target_modules": ["embed_tokens", "lm_head"]}),
    Case("dora", options={**_LINEAR, "use_dora": True}),
    Case("dora, bfloat16 model", options={**_LINEAR, "use_dora": True}, dtype=_BF16, size=0.02),
    Case("dora, embedding", options={"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    Case("modules to save", options={**_Q, "modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"]}),
    Case("modules to save, bfloat16 model", options={**_Q, "modules_to_save": ["lm_head", "norm"]}, dtype=_BF16),
    Case("tokens", options={**_Q, "trainable_token_indices": [3, 5]}),
    Case("tokens of embedding and head", options={**_Q, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}),
    Case("tokens, bfloat16 model", options={**_Q, "trainable_token_indices": [3, 5]}, dtype=_BF16),
    Case("pissa, converted", options=_SOME, special=_begun("pissa", converted=True), size=0.02),
    Case("olora, converted", options=_SOME, special=_begun("olora", converted=True), size=0.02),
    Case("pissa, rslora, converted", options={**_SOME, "use_rslora": True}, special=_begun("pissa", converted=True), size=0.02),
    Case("two with weights", special=_several(_SOME, {**_Q, "r": 5, "use_rslora": True}), weights=[0.7, 0.3]),
    Case("two with weights, bfloat16 model", special=_several(_LINEAR, _SOME), weights=[0.7, 0.3], dtype=_BF16),
    Case("two without weights", special=_several(_SOME, _LINEAR)),
    Case("a dora with weights", special=_several({**_LINEAR, "use_dora": True}, _SOME), weights=[0.5, 0.5]),
    Case("a negative weight", special=_several(_SOME), weights=[-0.5]),
    # A tied embedding.
    Case(
        "tied, embedding and head as one",
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        special=_tied("both"),
        marks=[ties_adapters],
    ),
    Case(
        "tied, embedding alone",
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"]},
        special=_tied("embedding"),
        or_refused=_TIED,
    ),
    Case("tied, head alone", "tied", {"target_modules": ["q_proj", "lm_head"]}, special=_tied("head"), or_refused=_TIED),
    Case("tied, tokens", "tied", {**_Q, "trainable_token_indices": [3, 5]}),
    Case("tied, saved as one", "tied", {**_Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    Case("tied, embedding saved", "tied", {**_Q, "modules_to_save": ["embed_tokens"]}, or_refused=_TIED),
    Case("tied, both saved", "tied", {**_Q, "modules_to_save": ["embed_tokens", "lm_head"]}, or_refused=_TIED),
    # Keys as users have them.
    Case("keys, adapter's name", options=_SOME, rewrite=renamed(r"(lora_[AB])\.", r"\1.default.")),
    Case("keys, compiled", options=_SOME, rewrite=renamed(r"^base_model\.model\.", "base_model.model._orig_mod.")),
    Case("keys, compiled outside", options=_SOME, rewrite=renamed("^", "_orig_mod.")),
    Case("keys, compiled layers", options=_SOME, rewrite=renamed(r"(layers\.\d+)\.", r"\1._orig_mod.")),
    Case("keys, parallel", options=_SOME, rewrite=renamed("^", "module.")),
    Case("keys, without prefix", options=_SOME, rewrite=renamed(r"^base_model\.model\.", "")),
    Case(
        "keys, dora's magnitude of 2024",
        options={**_SOME, "use_dora": True},
        rewrite=renamed("(magnitude_vector)$", r"\1.weight"),
    ),
    Case(
        "keys, names of modules saved",
        options={**_Q, "modules_to_save": ["lm_head"]},
        rewrite=renamed(r"lm_head\.", "lm_head.modules_to_save."),
    ),
    # Other families.
    Case("gpt2", "gpt2", _GPT2),
    Case("gpt2, bfloat16 model", "gpt2", _GPT2, dtype=_BF16),
    Case("gpt2, told nothing of transposed weights", "gpt2", _GPT2, rewrite=configured(fan_in_fan_out=False)),
    Case("gpt2, small", "gpt2, wide", _GPT2, dtype=_BF16, size=_SMALL),
    Case("gpt2, dora", "gpt2", {**_GPT2, "use_dora": True}),
    Case("gpt2, lora_bias", "gpt2", {**_GPT2, "lora_bias": True}),
    Case("gpt2, all biases", "gpt2", {**_GPT2, "bias": "all"}),
    Case("gpt2, biases of its layers", "gpt2", {**_GPT2, "bias": "lora_only"}),
    Case("phi3", "phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    Case(
        "bert",
        "bert",
        {"target_modules": ["query", "dense", "position_embeddings"], "modules_to_save": ["LayerNorm"]},
    ),
    Case("bert, dora and biases", "bert", {"target_modules": ["query", "value"], "use_dora": True, "bias": "all"}),
    Case("opt", "opt", {"target_modules": ["q_proj", "fc1", "fc2"], "lora_bias": True}),
    Case("t5", "t5", {"target_modules": ["q", "wi", "wo"]}),
    Case("t5, bfloat16 model", "t5", {"target_modules": ["q", "wi", "wo"]}, dtype=_BF16),
    Case("whisper, convolutions over one axis", "whisper", {"target_modules": ["conv1", "conv2", "q_proj"]}, runs=False),
    Case(
        "vit",
        "vit",
        {"target_modules": ["projection", "fc1", "intermediate.dense", "query", "q_proj"], "modules_to_save": ["classifier"]},
    ),
    Case("convnext", "convnext", {"target_modules": ["patch_embeddings", "pwconv1"], "use_dora": True}),
    Case("UNet", "UNet", _UNET),
    Case("UNet, bfloat16 model", "UNet", _UNET, dtype=_BF16),
    Case("UNet, small", "UNet, wide", _UNET, dtype=_BF16, size=2.6 * _SMALL),
    Case("UNet, dora", "UNet", {"target_modules": ["to_q", "conv1", "conv_shortcut"], "use_dora": True}),
    Case("mixtral, stacked", "mixtral", {**_Q, **_PARAMETERS}),
    Case("mixtral, experts by name", "mixtral", special=_experts(["w1", "w2", "w3"])),
    Case("qwen3_moe, stacked", "qwen3_moe", {**_Q, **_PARAMETERS}),
    Case("qwen3_moe, stacked, bfloat16 model", "qwen3_moe", {**_Q, **_PARAMETERS}, dtype=_BF16),
    Case(
        "qwen3_moe, stacked, one of two", "qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True}
    ),
    Case("qwen3_moe, stacked, small", "qwen3_moe, wide", {**_Q, **_PARAMETERS}, dtype=_BF16, size=_SMALL),
    Case("qwen3_moe, experts by name", "qwen3_moe", special=_experts(["gate_proj", "up_proj", "down_proj"])),
    Case("qwen3_moe, a part of the experts by name", "qwen3_moe", special=_experts(["gate_proj"])),
    Case("gpt_oss", "gpt_oss", {**_Q, **_PARAMETERS}),
    Case("gpt_oss, router and attention", "gpt_oss", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    # A model for images and text, whose modules were renamed in transformers 4.52.
    Case("llava", "llava", _SOME),
    Case("llava, old keys", "llava", _SOME, rewrite=renamed(_NEW_VLM + r"(layers|norm)", r"language_model.model.\1")),
    Case("llava, new names on disk", "llava, new names", _SOME),
    Case(
        "llava, new names on disk, old keys",
        "llava, new names",
        _SOME,
        rewrite=renamed(_NEW_VLM + r"(layers|norm)", r"language_model.model.\1"),
    ),
    Case("qwen2_5_vl", "qwen2_5_vl", {"target_modules": ["q_proj", "qkv", "patch_embed.proj"]}),
    Case("qwen2_5_vl, old keys", "qwen2_5_vl", _SOME, rewrite=renamed(_NEW_VLM, "model.")),
    # Diffusion models' own layouts.
    Case(
        "diffusers, with metadata",
        "UNet",
        _UNET,
        rewrite=as_diffusers("", metadata=True),
    ),
    Case("diffusers, saved by its model", "UNet", _UNET, special=_by_diffusers(pipeline=False)),
    Case("diffusers, saved by its pipeline", "UNet", _UNET, special=_by_diffusers(pipeline=True), marks=[_PIPELINES]),
    Case(
        "diffusers, a pipeline's, with metadata",
        "UNet",
        _UNET,
        rewrite=as_diffusers("unet.", metadata=True),
    ),
    Case(
        "diffusers, without alpha",
        "UNet",
        _UNET_ALIKE,
        rewrite=as_diffusers("unet."),
    ),
    Case(
        "diffusers, down and up",
        "UNet",
        _UNET_ALIKE,
        rewrite=as_diffusers("unet.", down="lora.down.weight", up="lora.up.weight"),
    ),
    Case(
        "diffusers, alphas",
        "UNet",
        _UNET,
        rewrite=as_diffusers("unet.", alphas=True),
    ),
    Case("diffusers, processors", "UNet", _ATTENTION, rewrite=as_processors),
    Case("kohya", "UNet", _UNET, rewrite=as_kohya()),
    Case("kohya, a name of its own", "UNet", _UNET, rewrite=as_kohya("my_style.safetensors")),
    Case(
        "diffusers, transformer",
        "Flux",
        {"target_modules": ["to_q", "proj_mlp"]},
        rewrite=as_diffusers("transformer.", metadata=True),
    ),
    # What surgery export writes, for each family that it supports.
    *(
        Case(f"exported, {name}", name, special=_exported)
        for name in ("llama", "gpt2", "phi3", "gpt_neox", "bert", "vit", "t5", "UNet")
    ),
    *(
        Case(f"exported, {name}", name, special=_exported, marks=[needs("peft", ">=0.20", "adapters of experts")])
        for name in ("mixtral", "qwen3_moe", "olmoe")
    ),
    # What must be refused.
    Case("refused, pickled", options=_Q, rewrite=pickled, match=r"adapter_model"),
    Case("refused, pissa", options=_SOME, special=_begun("pissa", converted=False), match="init_lora_weights|pissa"),
    Case("refused, olora", options=_SOME, special=_begun("olora", converted=False), match="init_lora_weights|olora"),
    Case("refused, another kind", options=_Q, rewrite=configured(peft_type="VERA"), match="VERA"),
    Case("refused, qalora", options=_Q, rewrite=configured(use_qalora=True), match="use_qalora"),
    Case("refused, nothing changed", options=_Q, rewrite=edited(_nothing), match="changes nothing"),
    Case("refused, no tensors", options=_Q, rewrite=edited(lambda tensors: tensors.clear()), match="changes nothing"),
    Case("refused, a tensor of no use", options=_Q, rewrite=edited(_unheard_of), match="unheard_of"),
    Case("refused, half of an update", options=_Q, rewrite=edited(_half), match=r"layers\.0\.self_attn\.q_proj"),
    Case("refused, NaN", options=_Q, rewrite=edited(_nan), match=r"NaN"),
    Case("refused, twice", options=_Q, rewrite=edited(_twice), match="twice"),
    Case("refused, another rank", options=_Q, rewrite=configured(r=4), match="rank"),
    Case("refused, another model", options=_GPT2, special=_of_another_model, match="c_attn|c_fc|c_proj"),
    Case("refused, a larger vocabulary", special=_with_more_words, match="lm_head"),
    # Its A reads all channels, so that no grouped convolution computes it; PEFT does not merge it either.
    Case("refused, grouped convolution", "convnext", {"target_modules": ["dwconv"], "r": 32}, match="dwconv"),
    Case(
        "refused, a copy with a weight",
        special=_several({**_Q, "modules_to_save": ["lm_head"]}, _Q),
        weights=[0.7, 0.3],
        match="lm_head",
    ),
    Case("refused, one weight for two", special=_one_of_two, weights=[0.7], match="weights"),
]


def parameters(cases: Sequence[Case]) -> list[Any]:
    """For a test that takes a case."""
    return [pytest.param(case, id=case.name, marks=case.marks) for case in cases]
