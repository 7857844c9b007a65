"""Quantized models on other machines, from the hub, after a kill; and verbs that hold two models against each other."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.engine.lane import Lane
from surgery.progress import Silent
from surgery.shards.factorize_jobs import FactorizeJobs
from surgery.shards.fold_jobs import FoldJobs
from tests.loopback_hub import LoopbackHub
from tests.models import files_of, planned
from tests.quantized.hub_models import dequantized, save_deepseek_v4
from tests.quantized.served import RANK, Made
from tests.quantized.test_served import off
from tests.releases import needs
from tests.stopping import StopAt

pytestmark = needs("transformers", ">=5.23", "making tiny models of these families")


def _sent(jobs: Any, index: int, lane: Lane, on_read: Callable[[], object]) -> Any:
    """Does a job as the task of another machine does it."""
    result = pickle.loads(pickle.dumps(jobs.remote(index)))(lane, "first")
    on_read()
    return pickle.loads(pickle.dumps(result))


@pytest.mark.parametrize("made", ["gpt_oss", "deepseek_v3", "kimi_k2", "nvfp4_llama_modelopt"], indirect=True)
def test_jobs_that_are_sent_give_the_same_bytes(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = made.folded("folded")
    dense, _ = made.folded("dense", dequantize=True)
    monkeypatch.setattr(FactorizeJobs, "do_shard", _sent)
    monkeypatch.setattr(FoldJobs, "do_shard", _sent)
    surgery.factorize(made.model, tmp_path / "f", rank=RANK)
    assert files_of(tmp_path / "f") == files_of(made.factorized)
    for name, kept, options in (("folded", out, {}), ("dense", dense, {"dequantize": True})):
        surgery.fold(made.factorized, made.scales, tmp_path / name, base=made.model, progress=Silent(), **options)
        assert files_of(tmp_path / name) == files_of(kept)


@pytest.mark.parametrize("made", ["kimi_k2"], indirect=True)
def test_streamed_from_the_hub_and_gone_on_with(made: Made, hub: LoopbackHub, tmp_path: Path) -> None:
    """The numbers of its weights are in one file, their scales and shapes in another."""
    hub.publish("acme/packed", made.model)
    last = surgery.Manifest.read(made.factorized).targets[-1].tensor
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize("acme/packed", tmp_path / "f", rank=RANK, stream=True, progress=StopAt(last))
    again = Silent()
    surgery.factorize("acme/packed", tmp_path / "f", rank=RANK, stream=True, progress=again)
    assert any("continuing after" in note for note in again.notes)
    local, streamed = files_of(made.factorized), files_of(tmp_path / "f")
    assert {name for name in local if local[name] != streamed[name]} <= {"surgery/manifest.json", "surgery/scales.safetensors"}
    kept, _ = made.folded("folded")
    with pytest.raises(KeyboardInterrupt):
        surgery.fold(tmp_path / "f", made.scales, tmp_path / "out", stream=True, progress=StopAt(last))
    surgery.fold(tmp_path / "f", made.scales, tmp_path / "out", stream=True, progress=Silent())
    assert files_of(tmp_path / "out") == files_of(kept)


two = pytest.mark.parametrize("made", ["gpt_oss", "deepseek_v3", "kimi_k2", "nvfp4_llama", "nvfp4_mixture"], indirect=True)


@two
def test_project_and_spectra_of_two_quantized_models(made: Made, tmp_path: Path) -> None:
    tuned, _ = made.folded("folded")
    after = dequantized(tuned)
    report = surgery.project(made.factorized, tuned, tmp_path / "s", base=made.model, progress=Silent())
    found = load_file(tmp_path / "s")
    factors = made.factors
    for name, g in found.items():
        U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
        change = after[name] - made.numbers[name]
        wanted = 1 + (U.mT @ change @ V).diagonal(dim1=-2, dim2=-1) / s
        assert torch.allclose(g.double(), wanted, rtol=1e-4, atol=1e-4), name
    assert len(report.targets) == len(made.scales)

    spectra = surgery.spectra(made.model, tuned, top=4, subspace=2, progress=Silent())
    seen = set()
    for target in spectra.targets:
        name = target["tensor"]
        weight = made.numbers[name] if made.numbers[name].ndim == 2 else made.numbers[name][target["matrix"]]
        exact = torch.linalg.svdvals(weight)[:4]
        assert torch.allclose(torch.tensor(target["singular_values"], dtype=torch.float64)[:4], exact, rtol=1e-4)
        seen.add(name)
    assert seen == set(made.scales)


@pytest.mark.parametrize("made", ["deepseek_v3", "nvfp4_llama", "gpt_oss"], indirect=True)
def test_the_difference_of_two_quantized_models_as_an_adapter(made: Made, tmp_path: Path) -> None:
    tuned, _ = made.folded("folded")
    after = dequantized(tuned)
    surgery.extract(made.model, tuned, tmp_path / "a", rank=4, include=("model.layers.[01].self_attn*",), progress=Silent())
    adapter = load_file(tmp_path / "a/adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith("lora_A.weight")]
    assert len(layers) == sum("self_attn" in name for name in made.scales)
    for layer in layers:
        name = layer.removeprefix("base_model.model.") + ".weight"
        found = adapter[f"{layer}.lora_B.weight"].double() @ adapter[f"{layer}.lora_A.weight"].double()
        U, s, Vh = torch.linalg.svd(after[name] - made.numbers[name])
        assert off(found, U[:, :4] * s[:4] @ Vh[:4]) < 1e-3


def test_deepseek_v4_is_planned_and_folded(tmp_path: Path) -> None:
    model = save_deepseek_v4(tmp_path / "m")
    numbers = dequantized(model)
    plan = planned(model, rank=RANK)
    inside = {name for name in numbers if name.startswith("layers.") and (".attn.w" in name or "experts" in name)}
    assert {target.tensor for target in plan.targets} == inside
    assert {target.dtype for target in plan.targets if ".experts." in target.tensor} == {"MXFP4"}
    surgery.factorize(model, tmp_path / "f", rank=RANK)
    assert surgery.verify(tmp_path / "f", base=model).ok
    made = Made("deepseek_v4", tmp_path)
    surgery.fold(made.factorized, made.factorized / "surgery/scales.safetensors", tmp_path / "back", base=model)
    before = files_of(model)
    assert {name: one for name, one in files_of(tmp_path / "back").items() if name in before} == before
    out, report = made.folded("folded")
    after = dequantized(out)
    for name in numbers:
        if name in made.updates:
            assert off(after[name], made.wanted[name]) < (0.3 if ".experts." in name else 0.1), name
        else:
            assert torch.equal(after[name], numbers[name])
    assert report.kept is not None
    assert report.kept > 0.97
    dense, _ = made.folded("dense", dequantize=True)
    found = dequantized(dense)
    assert all(off(found[name], made.wanted[name]) < 2**-8 for name in numbers)
