"""Directions that the gradients choose: which they are, and that the training of these alone goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError, ScalesError, SurgeryWarning
from surgery.names import SCALES_METADATA_KEY
from surgery.training.lowrank import LowRankPath
from surgery.training.ways import Way
from tests.families import FAMILIES
from tests.models import save_llama

IDS = torch.arange(40).view(2, 20)
RANK = 5
WAYS: list[Way] = ["scales", "core", "orthogonal"]
#: What is trained of so many directions.
NUMBERS: dict[Way, Callable[[int], int]] = {
    "scales": lambda k: k,
    "core": lambda k: k * k,
    "orthogonal": lambda k: k * (k - 1) // 2 + 2 * k,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 Llama (``m``), and factorized (``f``). Read-only."""
    folder = tmp_path_factory.mktemp("choose")
    save_llama(folder / "m", torch.float32)
    surgery.factorize(folder / "m", folder / "f", rank=RANK)
    return folder


def _attached(made: Path, train: Way = "scales", source: str = "m") -> tuple[Any, surgery.Scales]:
    model = transformers.AutoModelForCausalLM.from_pretrained(made / source, dtype=torch.float32)
    return model, surgery.attach(model, made / "f", train=train)


def _backward(run: Any) -> torch.Tensor:
    loss: torch.Tensor = run(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss


def _directions_of(train: Way) -> list[set[int]]:
    """For each parameter of a matrix the directions that it has a part in, in the order of docs/format.md."""
    if train == "scales":
        return [{i} for i in range(RANK)]
    if train == "core":
        return [{i, j} for i in range(RANK) for j in range(RANK)]
    below = [{i, j} for i in range(RANK) for j in range(i)]
    return below + [{i} for i in range(RANK)] * 2


def _best(gradient: torch.Tensor, train: Way, keep: int) -> set[int]:
    """The directions with the largest norm of the gradients of all parameters that they have a part in."""
    parts = _directions_of(train)
    sizes = [sum(float(g) ** 2 for g, part in zip(gradient, parts, strict=True) if i in part) for i in range(RANK)]
    return set(sorted(range(RANK), key=lambda i: -sizes[i])[:keep])


@pytest.mark.filterwarnings("ignore:weights of the model are residuals")
@pytest.mark.parametrize("source", ["m", "f"])
@pytest.mark.parametrize("train", WAYS)
def test_the_best_directions_are_trained_as_if_the_others_were_frozen(train: Way, source: str, made: Path) -> None:
    model, scales = _attached(made, train, source)
    parameters = list(scales.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    loss = _backward(model)
    assert scales.chosen is None
    scales.choose(keep=2)
    assert all(one is other for one, other in zip(scales.parameters(), parameters, strict=True))
    assert all(parameter.grad is None and parameter.numel() == NUMBERS[train](2) for parameter in parameters)
    for _ in range(3):
        optimizer.zero_grad()
        loss = _backward(model)  # the loss before is alive until here, and with it what gathered the gradients
        optimizer.step()
    assert loss.isfinite()

    other, whole = _attached(made, train, source)
    _backward(other)
    chosen = scales.chosen
    assert chosen is not None
    masks = []
    for (key, mask), parameter in zip(chosen.items(), whole.parameters(), strict=True):
        assert parameter.grad is not None
        assert set(mask.nonzero().flatten().tolist()) == _best(parameter.grad, train, 2), key
        kept = set(mask.nonzero().flatten().tolist())
        masks.append(torch.tensor([part <= kept for part in _directions_of(train)]))
    slow = torch.optim.Adam(whole.parameters(), lr=0.05)
    for _ in range(3):
        slow.zero_grad()
        _backward(other)
        for mask, parameter in zip(masks, whole.parameters(), strict=True):
            assert parameter.grad is not None
            parameter.grad *= mask
        slow.step()
    for key, value in whole.values().items():
        assert (value - scales.values()[key]).abs().max() < 1e-5, key
        if train == "scales":
            assert (value[chosen[key]] - 1).abs().min() > 0.01
            assert torch.equal(scales.values()[key][~chosen[key]], torch.ones(RANK - 2))
    assert torch.allclose(model(IDS).logits, other(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("train", WAYS)
def test_what_is_not_chosen_leaves_the_computation_where_it_can(train: Way, made: Path) -> None:
    for source in ("m", "f"):
        model, scales = _attached(made, train, source)
        before = model(IDS).logits
        _backward(model)
        if source == "m":
            scales.choose(keep=2)
        else:
            with pytest.warns(SurgeryWarning, match="original model loaded they would take neither memory nor time"):
                scales.choose(keep=2)
        paths = [module for module in model.modules() if isinstance(module, LowRankPath)]
        assert (
            {path.left.shape[1] for path in paths} == {path.right.shape[1] for path in paths} == {2 if source == "m" else RANK}
        )
        after = model(IDS).logits
        assert torch.equal(after, before) if source == "m" else torch.allclose(after, before, atol=1e-5)
        with scales.untouched():
            assert torch.equal(model(IDS).logits, after)
        assert repr(scales).startswith(f"Scales(14 targets, {14 * NUMBERS[train](2)} trainable, ")
        assert ", chosen, " in repr(scales)


@pytest.mark.filterwarnings("ignore:weights of the model are residuals")
@pytest.mark.parametrize("source", ["m", "f"])
@pytest.mark.parametrize("train", WAYS)
def test_smaller_choices_and_ranks(train: Way, source: str, made: Path, tmp_path: Path) -> None:
    model, scales = _attached(made, train, source)
    for keep in (RANK + 3, 3, 3, 1):
        before = scales.chosen
        _backward(model)
        scales.choose(keep)
        chosen = scales.chosen
        assert chosen is not None
        assert {int(mask.sum()) for mask in chosen.values()} == {min(keep, RANK)}
        assert before is None or all(not bool((mask & ~before[key]).any()) for key, mask in chosen.items())
        for parameter in scales.parameters():
            parameter.data.fill_(0.3)
        changed = scales.values()
        model(IDS).logits.sum().backward()
        assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in scales.parameters())
        for parameter in scales.parameters():
            parameter.grad = None
        assert all((value - _untouched(value)).abs().max() > 0.01 for value in changed.values())
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(made / "f", tmp_path / "s.safetensors", tmp_path / "out")
    folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(folded(IDS).logits, model(IDS).logits, atol=1e-5)


def _untouched(value: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(value) if value.ndim == 1 else torch.eye(len(value))


@pytest.mark.filterwarnings("ignore:weights of the model are residuals")
@pytest.mark.parametrize(
    ("name", "train"), [("UNet", "core"), *((name, train) for name in ("gpt2", "granitemoe", "mixtral") for train in WAYS)]
)
def test_what_is_chosen_is_folded(name: str, train: Way, tmp_path: Path) -> None:
    """In weights that are transposed, in stacks (each matrix has its own choice), in single experts, in convolutions."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    manifest = surgery.factorize(folder, tmp_path / "f", rank=4).manifest
    for source in ("m", "f"):
        model = family.load(tmp_path / source)
        scales = surgery.attach(model, tmp_path / "f", train=train)
        family.run(model).square().mean().backward()
        scales.choose(keep=2)
        chosen = scales.chosen
        assert chosen is not None
        for target in manifest.targets:
            assert chosen[target.key].shape == target.scales_shape
            assert set(chosen[target.key].sum(dim=-1).flatten().tolist()) == {2}
        if name == "granitemoe":
            assert any(len(mask.unique(dim=0)) > 1 for mask in chosen.values() if mask.ndim == 2)
        generator = torch.Generator().manual_seed(1)
        for parameter in scales.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        attached = family.run(model)
        scales.save(tmp_path / "s.safetensors")
        surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out", overwrite=True)
        folded = family.output(tmp_path / "out")
        assert torch.allclose(attached, folded, rtol=1e-3, atol=1e-4 * folded.abs().max().item())
        again = family.load(tmp_path / source)
        loaded = surgery.attach(again, tmp_path / "f", train=train)
        loaded.load(tmp_path / "s.safetensors")
        assert all(one.shape == other.shape for one, other in zip(loaded.parameters(), scales.parameters(), strict=True))
        assert torch.allclose(family.run(again), attached, rtol=1e-4, atol=1e-5 * folded.abs().max().item())


def test_choosing_under_compile(made: Path) -> None:
    model, scales = _attached(made, "core")
    block, x = model.model.layers[0].mlp, torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    scales.choose(keep=2)
    gradients = []
    for run in (compiled, block):
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in scales.parameters() if parameter.grad is not None])
        for parameter in scales.parameters():
            parameter.grad = None
    assert len(gradients[0]) == 3
    for gradient, right in zip(*gradients, strict=True):
        assert gradient.shape == (4,)
        assert torch.allclose(gradient, right, rtol=1e-4, atol=1e-7)


# Files


def _trained(made: Path, train: Way, keep: int, seed: int = 1) -> surgery.Scales:
    """Directions chosen by random gradients, and changed."""
    _, scales = _attached(made, train)
    generator = torch.Generator().manual_seed(seed)
    for parameter in scales.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    scales.choose(keep)
    for parameter in scales.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return scales


@pytest.mark.parametrize("train", WAYS)
def test_a_file_brings_its_choice(train: Way, made: Path, tmp_path: Path) -> None:
    scales = _trained(made, train, 2)
    scales.save(tmp_path / "s.safetensors")
    for loads in (1, 2):  # into untouched scales, and into those of the same choice
        _, again = _attached(made, train)
        for _ in range(loads):
            again.load(tmp_path / "s.safetensors")
        chosen = scales.chosen
        assert chosen is not None
        assert again.chosen is not None
        assert all(torch.equal(mask, again.chosen[key]) for key, mask in chosen.items())
        assert all((value - again.values()[key]).abs().max() < 1e-6 for key, value in scales.values().items())
        again.save(tmp_path / "again.safetensors")
        one, other = load_file(tmp_path / "s.safetensors"), load_file(tmp_path / "again.safetensors")
        assert one.keys() == other.keys()
        assert all((one[name].float() - other[name].float()).abs().max() < 1e-6 for name in one)
    kept = surgery.read_scales(tmp_path / "s.safetensors").values
    assert kept.keys() == scales.values().keys()


def test_a_file_names_what_is_beside_its_cores(made: Path, tmp_path: Path) -> None:
    """Another training than the one that kept it leaves it out, and does not say that it is there."""
    _trained(made, "orthogonal", 2).save(tmp_path / "s.safetensors")
    _, scales = _attached(made, "core")
    scales.load(tmp_path / "s.safetensors")
    scales.save(tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        said = json.loads(file.metadata()[SCALES_METADATA_KEY])
        kinds = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert set(said["beside"]) == kinds - {"weight"} == {"chosen"}


def test_values_outside_the_choice_are_not_loaded(made: Path, tmp_path: Path) -> None:
    scales, other = _trained(made, "scales", 2), _trained(made, "scales", 2, seed=2)
    other.save(tmp_path / "other.safetensors")
    before = scales.values()
    with pytest.raises(ScalesError, match=r"(?s)other\.safetensors: directions of .* not among those chosen.*attach again"):
        scales.load(tmp_path / "other.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in scales.values().items())
    scales.load(made / "f/surgery/scales.safetensors")  # untouched everywhere
    assert all(torch.equal(value, torch.ones(RANK)) for value in scales.values().values())
    assert all(parameter.numel() == 2 for parameter in scales.parameters())


KEY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda chosen: chosen[:-1], "does not fit what it belongs to"),
        (lambda chosen: 2 * chosen, "is no choice of directions"),
        (lambda chosen: 0 * chosen, "is damaged"),
        (lambda chosen: 1 - chosen, "have been changed that are not among those chosen"),
    ],
)
@pytest.mark.parametrize("train", ["scales", "core"])
def test_damaged_choices(
    what: Callable[[torch.Tensor], torch.Tensor], said: str, train: Way, made: Path, tmp_path: Path
) -> None:
    _trained(made, train, 2).save(tmp_path / "s.safetensors")
    tensors = load_file(tmp_path / "s.safetensors")
    assert tensors[f"{KEY}.chosen"].dtype == torch.uint8
    tensors[f"{KEY}.chosen"] = what(tensors[f"{KEY}.chosen"])
    fingerprint = surgery.Manifest.read(made / "f").fingerprint
    owner = {"format_version": 1, "fingerprint": fingerprint, "train": train, "beside": ["chosen"]}
    save_file(tensors, tmp_path / "s.safetensors", {SCALES_METADATA_KEY: json.dumps(owner)})
    _, fresh = _attached(made, train)
    with pytest.raises(ScalesError, match=rf"{KEY}.*{said}"):
        fresh.load(tmp_path / "s.safetensors")
    assert fresh.chosen is None


def test_what_cannot_be_chosen(made: Path) -> None:
    model, scales = _attached(made)
    with pytest.raises(OptionError, match=r"(?s)no gradients.*run some backward passes first"):
        scales.choose()
    _backward(model)
    with pytest.raises(OptionError, match="at least one direction"):
        scales.choose(keep=0)
    gradients = [parameter.grad for parameter in scales.parameters() if parameter.grad is not None]
    for gradient in gradients:
        gradient.zero_()
    with pytest.raises(OptionError, match=r"(?s)no gradients.*all of them are 0"):
        scales.choose()
    gradients[0][0] = float("nan")
    with pytest.raises(OptionError, match="NaN or infinity"):
        scales.choose()
    assert scales.chosen is None
    scales.detach()
    with pytest.raises(OptionError, match="detached"):
        scales.choose()
