"""Adapters of another rank: what PEFT and diffusers merge of them is what LAPACK says is closest to what they merged before."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError
from surgery.progress import Silent
from surgery.updates.adapters.patterns import with_ranks
from tests.families import FAMILIES
from tests.releases import needs
from tests.updates.merging import adapt

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LLAMA = ["q_proj", "o_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Families, what PEFT adapts of them, and the rank after; that before is 6, but for patterns.
_KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"target_modules": _LLAMA}, 6),
    ("llama", {"target_modules": _LLAMA, "use_rslora": True}, 2),
    (
        "llama",
        {
            "target_modules": [*_LLAMA, "embed_tokens"],
            "rank_pattern": {"layers.1.mlp.down_proj": 5, "o_proj": 2},
            "alpha_pattern": {"down_proj": 7, r"layers\.0\..*q_proj": -4},
        },
        3,
    ),
    ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"], "rank_pattern": {"q_proj.weight": 3}}, 2),
    ("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "lora_bias": True}, 2),
    ("UNet", {"target_modules": ["to_q", "conv1", "conv_shortcut", "time_emb_proj"]}, 2),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS}, 2),
    ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, 1),
]


def _merged(model: Any, adapter: Path | None) -> dict[str, torch.Tensor]:
    """float64: the weights of a model with what PEFT merges into it."""
    model = model.double()
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as of keys that it does not find
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings(
                "ignore", message=".*tie_word_embeddings.*|.*target_parameters.*|.*tied.*|Unsupported layer type.*"
            )
            # PEFT looks for patterns of parameters among the modules, too late: it has applied them.
            warnings.filterwarnings("ignore", message=r".*_pattern keys did not match any.*(gate_up_proj|q_proj\.weight)'")
            model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.double().clone() for name, tensor in model.state_dict().items()}


def _deltas(family: Any, folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight, float64."""
    before, after = _merged(family.load(folder), None), _merged(family.load(folder), adapter)
    changes = {name: after[name] - tensor for name, tensor in before.items() if tensor.is_floating_point()}
    return {name: change for name, change in changes.items() if bool(change.any())}


def _matrices(name: str, change: torch.Tensor) -> torch.Tensor:
    """(E, m, n)"""
    return change if "experts" in name and change.ndim == 3 else change.flatten(1)[None]


def _best(name: str, change: torch.Tensor, rank: int) -> torch.Tensor:
    """The closest of a rank, by float64 LAPACK."""
    if change.ndim == 1:
        return change
    U, s, Vh = np.linalg.svd(_matrices(name, change).numpy(), full_matrices=False)
    s[:, rank:] = 0
    return torch.from_numpy((U * s[:, None]) @ Vh).view(change.shape)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (found - expected).norm() <= 1e-6 * expected.norm(), name


def _config(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / _CONFIG).read_text()))


@pytest.mark.parametrize(("name", "options", "rank"), _KINDS, ids=range(len(_KINDS)))
def test_as_peft_merges_it(name: str, options: dict[str, Any], rank: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    adapter = adapt(family.load(folder), tmp_path / "lora", **{"r": 6, **options})
    report = surgery.resize(adapter, tmp_path / "out", rank=rank, progress=Silent())
    before, after = _deltas(family, folder, adapter), _deltas(family, folder, tmp_path / "out")
    assert before.keys() == after.keys()
    norm = error = 0.0
    for weight, change in before.items():
        expected = _best(weight, change, rank)
        _assert_close(after[weight], expected, weight)
        if change.ndim > 1:
            norm, error = norm + change.square().sum().item(), error + (change - expected).square().sum().item()
    assert report.kept == pytest.approx(1 - error / norm, abs=1e-9)
    assert report.error == pytest.approx((error / norm) ** 0.5, abs=1e-6)
    config, old = _config(tmp_path / "out"), _config(adapter)
    changed = {key for key in old | config if old.get(key) != config.get(key)}
    assert changed <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    old_tensors, tensors = load_file(adapter / _WEIGHTS), load_file(tmp_path / "out" / _WEIGHTS)
    assert {key: value.dtype for key, value in tensors.items()} == {key: value.dtype for key, value in old_tensors.items()}


def test_an_energy_and_one_rank_for_all(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    folder = family.save(tmp_path / "m")
    adapter = adapt(family.load(folder), tmp_path / "lora", r=7, target_modules=_LLAMA)
    report = surgery.resize(adapter, tmp_path / "out", energy=0.7)
    before, after = _deltas(family, folder, adapter), _deltas(family, folder, tmp_path / "out")
    ranks = {}
    for weight, change in before.items():
        squares = np.linalg.svd(change.numpy(), compute_uv=False) ** 2
        ranks[weight.removesuffix(".weight")] = rank = int((squares.cumsum() < 0.7 * squares.sum()).sum()) + 1
        _assert_close(after[weight], _best(weight, change, rank), weight)
    assert {one.module: one.rank for one in report.modules} == ranks
    assert all(one.kept is not None and one.kept >= 0.7 and one.rank_before == 7 for one in report.modules)
    assert (report.rank, len(set(ranks.values())) > 1) == (max(ranks.values()), True)

    most = min(ranks.values())
    capped = surgery.resize(adapter, tmp_path / "capped", energy=0.7, max_rank=most)
    assert {one.rank for one in capped.modules} == {most}
    assert _config(tmp_path / "capped")["rank_pattern"] == {}

    same = surgery.resize(adapter, tmp_path / "uniform", energy=0.7, uniform=True)
    assert {one.rank for one in same.modules} == {report.rank}
    assert _config(tmp_path / "uniform")["rank_pattern"] == {}
    padded = _deltas(family, folder, tmp_path / "uniform")
    assert all(torch.equal(padded[weight], change) for weight, change in after.items())

    whole = surgery.resize(adapter, tmp_path / "whole", energy=1.0)
    assert {one.rank for one in whole.modules} == {7}


def test_a_smaller_rank_of_its_own_and_none(tmp_path: Path) -> None:
    """An update of rank 2 in matrices of rank 5, one of zeros, and one that a scaling of zero makes none."""
    torch.manual_seed(1)
    tensors = {}
    for module, rank in (("a.low", 2), ("a.zero", 0), ("a.off", 5), ("a.full", 5)):
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(5, 12)
        B = torch.randn(9, rank, dtype=torch.float64) @ torch.randint(-3, 4, (rank, 5), dtype=torch.float64)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (64 * B).round().float() / 64
    left = torch.randint(-3, 4, (9, 2)).float()  # small integers: the product has exactly this rank
    tensors["base_model.model.a.low.lora_B.weight"] = left @ torch.randint(-3, 4, (2, 5)).float()
    tensors["base_model.model.a.full.lora_B.weight"] = torch.randn(9, 5)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / _WEIGHTS)
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 5, "alpha_pattern": {"off": 0}}
    (tmp_path / "lora" / _CONFIG).write_text(json.dumps(config))
    heard = Silent()
    report = surgery.resize(tmp_path / "lora", tmp_path / "out", rank=64, progress=heard)
    found = {one.module: (one.rank, one.kept) for one in report.modules}
    assert found == {"a.full": (5, 1), "a.low": (2, 1), "a.off": (1, None), "a.zero": (1, None)}
    assert heard.notes == [
        "2 of 4 updates are zero, and have rank 1 in the file: a.off, a.zero",
        "2 of 4 updates have a rank below 64 and keep their own (least: 2, a.low)",
    ]
    new = load_file(tmp_path / "out" / _WEIGHTS)
    for module in ("off", "zero"):
        for half, shape in (("A", (1, 12)), ("B", (9, 1))):
            assert torch.equal(new[f"base_model.model.a.{module}.lora_{half}.weight"], torch.zeros(shape))
    only = {name: tensor for name, tensor in tensors.items() if ".zero." in name}
    save_file(only, tmp_path / "lora" / _WEIGHTS)
    nothing = surgery.resize(tmp_path / "lora", tmp_path / "none", energy=0.5, progress=heard)
    assert (nothing.rank, nothing.kept, nothing.kept_least, nothing.error) == (1, None, None, None)


def test_all_else_keeps_its_bytes(tmp_path: Path) -> None:
    """Saved modules, trained tokens, biases and DoRA's magnitudes; the matrices in another dtype, beside others."""
    family = FAMILIES["llama"]
    folder = family.save(tmp_path / "m")
    options = {"target_modules": _LLAMA, "modules_to_save": ["lm_head", "norm"], "trainable_token_indices": [3, 1]}
    adapter = adapt(family.load(folder), tmp_path / "lora", r=4, use_dora=True, **options)
    surgery.resize(adapter, tmp_path / "out", rank=3, dtype="bfloat16")
    old, new = load_file(adapter / _WEIGHTS), load_file(tmp_path / "out" / _WEIGHTS)
    assert old.keys() == new.keys()
    halves = {name for name in old if re.search("lora_[AB]", name)}
    assert any("magnitude" in name for name in old.keys() - halves)
    assert sum("tokens" in name or "lm_head" in name or "norm" in name for name in old.keys() - halves) >= 3
    for name in old.keys() - halves:
        assert old[name].dtype == new[name].dtype
        assert old[name].numpy().tobytes() == new[name].numpy().tobytes(), name
    for name in halves:
        assert new[name].dtype == torch.bfloat16
        if "lora_A" in name:
            B = name.replace("lora_A", "lora_B")
            expected = _best("", 5 / 4 * old[B].double() @ old[name].double(), 3)
            assert (new[B].double() @ new[name].double() - expected).norm() <= 2**-8 * expected.norm()
    with safe_open(tmp_path / "out" / _WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    old = {name: tensor.clone() for name, tensor in old.items()}  # older releases map the file, which is written to here
    for number in (1e15, 1e-20):
        old[next(name for name in sorted(halves) if "lora_B" in name)].fill_(number)
        save_file(old, adapter / _WEIGHTS)
        with pytest.raises(OptionError, match=r"beyond the range of torch\.float16"):
            surgery.resize(adapter, tmp_path / "out2", rank=3, dtype="float16")


@needs("peft", ">=0.20", "loading adapters of single experts")
def test_experts_one_by_one(tmp_path: Path) -> None:
    """PEFT makes stacks of them, with one rank for all: that of the config. One of them was never trained."""
    family = FAMILIES["mixtral"]
    folder = family.save(tmp_path / "m")
    torch.manual_seed(4)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".experts." in name or "q_proj" in name:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(5, tensor.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(len(tensor), 5) * (".experts.1." not in name)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / _WEIGHTS)
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "target_modules": ["w1", "w2", "w3", "q_proj"]}
    (tmp_path / "lora" / _CONFIG).write_text(json.dumps(config))
    report = surgery.resize(tmp_path / "lora", tmp_path / "out", energy=0.8)
    assert {one.rank for one in report.modules if ".experts." in one.module} == {report.rank}
    before, after = _deltas(family, folder, tmp_path / "lora"), _deltas(family, folder, tmp_path / "out")
    assert before.keys() == after.keys()
    assert sum("experts" in name for name in before) == 4
    for name, change in before.items():
        parts = change.chunk(2, dim=1) if "gate_up" in name else [change]
        news = after[name].chunk(2, dim=1) if "gate_up" in name else [after[name]]
        for part, new in zip(parts, news, strict=True):
            for one, other in zip(_matrices(name, part), _matrices(name, new), strict=True):
                squares = np.linalg.svd(one.numpy(), compute_uv=False) ** 2
                rank = int((squares.cumsum() < 0.8 * squares.sum()).sum()) + 1
                expected = _best("", one, rank)
                assert (other - expected).norm() <= 1e-6 * max(1.0, expected.norm().item()), name


# --- layouts of diffusion models


def _updates_of_kohya(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module -> ``alpha / rank up down``, float64, as kohya's scripts have it."""
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_down.weight"):
            module = name.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{module}.lora_up.weight"], tensors.get(f"{module}.alpha", torch.tensor(len(down)))
            assert up.shape[2:].numel() == 1
            found[module] = alpha.item() / len(down) * up.double().flatten(1) @ down.double().flatten(1)
    return found


def test_a_file_of_kohya(tmp_path: Path) -> None:
    """For two components at once, with convolutions, alphas and a scale of DoRA."""
    torch.manual_seed(0)
    shapes = {"lora_unet_mid_block_attentions_0_proj_in": (8, 6), "lora_unet_down_blocks_0_resnets_0_conv1": (7, 5, 3, 3)}
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, *inputs) in {**shapes, "lora_te1_text_model_encoder_layers_0_mlp_fc1": (9, 6)}.items():
        tensors[f"{module}.lora_down.weight"] = torch.randn(4, *inputs).half()
        tensors[f"{module}.lora_up.weight"] = torch.randn(out, 4, *(1,) * (len(inputs) - 1)).half()
        tensors[f"{module}.alpha"] = torch.tensor(2.0 if "unet" in module else 8.0, dtype=torch.float16)
    scale = "lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale"
    tensors[scale] = torch.rand(9, 1)
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_tag": "x", "sshs_model_hash": "of the old tensors"}
    save_file(tensors, tmp_path / "style.safetensors", metadata)
    report = surgery.resize(tmp_path / "style.safetensors", tmp_path / "small.safetensors", rank=2, dtype="float32")
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and "small" in path.name] == ["small.safetensors"]
    new = load_file(tmp_path / "small.safetensors")
    assert {name: value.shape[1:] for name, value in new.items() if "down" in name[-18:]} == {
        name: value.shape[1:] for name, value in tensors.items() if "down" in name[-18:]
    }
    old, after = _updates_of_kohya(tensors), _updates_of_kohya(new)
    assert old.keys() == after.keys() == {one.module for one in report.modules}
    for module, change in old.items():
        _assert_close(after[module], _best("", change, 2), module)
        assert new[f"{module}.alpha"].dtype == torch.float16
        assert new[f"{module}.alpha"].item() == 2
    assert torch.equal(new[scale], tensors[scale])
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        assert file.metadata() == {"ss_network_dim": "2", "ss_network_alpha": "2", "ss_tag": "x"}

    surgery.resize(tmp_path / "style.safetensors", tmp_path / "f", energy=0.6)  # into a folder, under its own name
    with safe_open(tmp_path / "f/style.safetensors", "pt") as file:
        ranks = {len(file.get_tensor(name)) for name in file.keys() if name.endswith("down.weight")}  # noqa: SIM118
        assert len(ranks) > 1
        assert file.metadata()["ss_network_dim"] == file.metadata()["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("metadata_of", ["a pipeline", "a model", None])
def test_a_file_of_diffusers(metadata_of: str | None, tmp_path: Path) -> None:
    """As diffusers fuses it, with what its metadata says of ranks and alphas, or without."""
    family = FAMILIES["UNet"]
    folder = family.save(tmp_path / "m")
    options: dict[str, Any] = {"target_modules": ["to_q", "conv1", "time_emb_proj"], "r": 4, "lora_alpha": 4}
    if metadata_of is not None:
        options |= {"rank_pattern": {"conv1": 5}, "alpha_pattern": {"to_q": 9}, "use_rslora": True}
    adapter = adapt(family.load(folder), tmp_path / "lora", **options)
    prefix = "" if metadata_of == "a model" else "unet."
    halves = {name.replace("base_model.model.", prefix): one for name, one in load_file(adapter / _WEIGHTS).items()}
    if prefix:
        halves |= {f"text_encoder.text_model.fc1.lora_{half}.weight": torch.randn(4, 4) for half in "AB"}
    config = {f"{prefix}{key}": value for key, value in _config(adapter).items()}
    metadata = {"format": "pt"} | ({} if metadata_of is None else {"lora_adapter_metadata": json.dumps(config)})
    (tmp_path / "old").mkdir()
    save_file(halves, tmp_path / "old/pytorch_lora_weights.safetensors", metadata)
    surgery.resize(tmp_path / "old", tmp_path / "new", rank=2)
    before, *fused = [_fused(family.load(folder), tmp_path / name, prefix) for name in ("", "old", "new")]
    changed = 0
    for name, weight in before.items():
        change, new = (one[name].double() - weight.double() for one in fused)
        if bool(change.any()):
            changed += 1
            expected = _best("", change, 2)
            assert (new - expected).norm() <= 1e-5 * (weight.double().norm() + expected.norm()), name
    assert changed >= 3


def _fused(model: Any, folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    path = folder / "pytorch_lora_weights.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata")
        told = {} if text is None else {"metadata": json.loads(text)}
        model.load_lora_adapter(load_file(path), prefix=prefix.removesuffix(".") or None, **told)
        model.fuse_lora()
        model.unload_lora()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- ranks in a config


def test_ranks_are_found_as_peft_looks_them_up() -> None:
    chance = random.Random(5)
    words = ("a", "b", "a_b", "b_c", "q", "q+", "0", "1")
    for _ in range(300):
        names = {".".join(chance.choices(words, k=chance.randrange(1, 5))) for _ in range(chance.randrange(1, 12))}
        ranks = {name: chance.choice((2, 3, 4)) for name in names}
        config = with_ranks({"r": 9, "use_rslora": True, "other": 1}, ranks, Path("x"))
        for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            for name, rank in ranks.items():
                pattern = config[key]
                assert pattern.get(get_pattern_key(pattern.keys(), name), config[default]) == rank, (ranks, config)
        assert (config["use_rslora"], config["other"]) == (False, 1)


def test_patterns_are_ends_of_names() -> None:
    """Which hold also where a loader knows the modules under names that begin otherwise."""
    ranks = {f"m.layers.{i}.{part}": 8 if part == "q" else 4 for i in range(3) for part in ("q", "k")} | {"m.layers.2.q": 2}
    config = with_ranks({}, ranks, Path("x"))
    assert config == {
        "r": 8,
        "lora_alpha": 8,
        "rank_pattern": {"k": 4, "2.q": 2},
        "alpha_pattern": {"k": 4, "2.q": 2},
    }
