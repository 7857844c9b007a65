"""Cores in a loaded model, against the same computed in float64 with dense weights; and what a file of them is taken for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import surgery
from surgery.errors import ScalesError
from surgery.names import SCALES_METADATA_KEY
from surgery.training.ways import Way, change_from
from tests.families import FAMILIES
from tests.models import save_llama, tensors_of
from tests.training.test_attach import _Odd

IDS = torch.arange(12).view(2, 6)
CORES: list[Way] = ["core", "orthogonal"]


def _core(parameters: torch.Tensor, k: int, train: Way) -> torch.Tensor:
    """docs/format.md, by its words: the core of the parameters of one matrix."""
    eye = torch.eye(k, dtype=parameters.dtype)
    if train == "core":
        return eye + parameters.view(k, k)
    A = torch.zeros(k, k, dtype=parameters.dtype)
    entries = iter(parameters)
    for row in range(k):
        for column in range(row):
            entry = next(entries)
            A[row, column] = entry
            A[column, row] = -entry
    a, b = parameters[-2 * k : -k], parameters[-k:]
    return torch.diag(1 + a) @ torch.linalg.inv(eye - A) @ (eye + A) @ torch.diag(1 + b)


def _changed(weight: torch.Tensor, key: str, factors: dict[str, torch.Tensor], cores: list[torch.Tensor]) -> torch.Tensor:
    """``W + U diag(sqrt s) (C - I) diag(sqrt s) V^T``, float64."""
    U, s, V = (factors[f"{key}.{part}"].double() for part in ("U", "s", "V"))
    if len(cores) == 1 and s.ndim == 1:
        U, s, V = U[None], s[None], V[None]
    C = torch.stack(cores)
    k = s.shape[-1]
    change = U @ torch.diag_embed(s.sqrt()) @ (C - torch.eye(k, dtype=C.dtype)) @ torch.diag_embed(s.sqrt()) @ V.mT
    return weight + change.reshape(weight.shape)


def _odd() -> nn.Module:
    return _Odd().eval()


def _gpt2() -> nn.Module:
    return FAMILIES["gpt2"].make().eval()


def _gpt_oss() -> nn.Module:
    return FAMILIES["gpt_oss"].make().eval()


def _granite() -> nn.Module:
    return FAMILIES["granitemoe"].make().eval()


def _output(result: Any) -> torch.Tensor:
    output: torch.Tensor = getattr(result, "logits", result)
    return output


@pytest.mark.parametrize("train", CORES)
@pytest.mark.parametrize(
    ("make", "include"),
    [
        (_odd, ["*weight"]),  # convolutions, in groups too, a tied embedding, attention, and what nothing is known of
        (_gpt2, []),  # weights that are transposed
        (_gpt_oss, []),  # stacks that compute x W
        (_granite, []),  # stacks that compute x W^T
    ],
)
def test_outputs_and_gradients_in_float64(
    make: Callable[[], nn.Module], include: list[str], train: Way, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    weights = {name: value for name, value in model.state_dict().items() if name not in ("head.weight", "lm_head.weight")}
    (tmp_path / "m").mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "m/model.safetensors")
    if isinstance(model, transformers.PreTrainedModel):
        model.config.save_pretrained(tmp_path / "m")
    options: dict[str, Any] = {"include": include, "split": False}  # attention as one matrix, whose parameter is its name
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=3, layout="overlay", **options).manifest
    dense = copy.deepcopy(model).double()
    if hasattr(dense, "set_experts_implementation"):
        dense.set_experts_implementation("eager")  # grouped products know no float64
    before = _output(model(IDS)).detach()
    scales = surgery.attach(model, tmp_path / "f", train=train)
    assert torch.equal(_output(model(IDS)), before)

    generator = torch.Generator().manual_seed(1)
    for parameter in scales.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    factors = tensors_of(tmp_path / "f/surgery")
    targets = {target.key: target for target in manifest.targets}
    leaves, changed, cores = {}, {}, {}
    for key, parameter in zip([key for key in scales.values() if key in targets], scales.parameters(), strict=True):
        count, k = targets[key].matrices[0], targets[key].rank
        leaves[key] = parameter.detach().double().view(count, -1).requires_grad_()
        cores[key] = [_core(leaf, k, train) for leaf in leaves[key]]
        changed[key] = _changed(dense.get_parameter(key).detach(), key, factors, cores[key])
    output = _output(model(IDS))
    expected = _output(functional_call(dense, changed, (IDS,)))
    assert not torch.allclose(output, before, rtol=1e-2, atol=1e-2 * before.abs().max().item())
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    for key, value in scales.values().items():
        assert torch.allclose(value, torch.stack(cores[key]).detach().float().view(value.shape), rtol=1e-6, atol=1e-6)

    probe = torch.randn(output.shape, generator=generator)
    (output * probe).sum().backward()
    (expected * probe.double()).sum().backward()
    for leaf, parameter in zip(leaves.values(), scales.parameters(), strict=True):
        assert parameter.grad is not None
        assert leaf.grad is not None
        assert (parameter.grad - leaf.grad.flatten()).norm() <= 1e-4 * leaf.grad.norm()


@pytest.mark.parametrize("train", CORES)
def test_targets_of_several_ranks_in_one_parameter(train: Way, tmp_path: Path) -> None:
    """Experts that the checkpoint has one by one, with as many directions as each needs, and a fused weight in slices."""
    for name, split in (("mixtral", None), ("phi3", True)):
        family = FAMILIES[name]
        at = tmp_path / name
        folder = family.save(at / "m")
        options: dict[str, Any] = {"energy": 0.5, "max_rank": 9, "split": split}
        manifest = surgery.factorize(folder, at / "f", layout="overlay", **options).manifest
        assert len({target.rank for target in manifest.targets if "proj" in target.key or "experts" in target.key}) > 1
        model = family.load(folder)
        before = family.run(model)
        scales = surgery.attach(model, at / "f", train=train)
        assert torch.equal(family.run(model), before)
        generator = torch.Generator().manual_seed(1)
        for parameter in scales.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        scales.save(at / "s.safetensors")
        surgery.fold(at / "f", at / "s.safetensors", at / "out", base=folder)
        assert torch.allclose(family.run(model), family.output(at / "out"), rtol=1e-3, atol=1e-5)


# What a file is taken for


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama (``m``), and factorized (``f``). Read-only."""
    folder = tmp_path_factory.mktemp("cores")
    save_llama(folder / "m", torch.float32)
    surgery.factorize(folder / "m", folder / "f", rank=4)
    return folder


def _attached(made: Path, train: Way, *, changed: bool = False) -> surgery.Scales:
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "m", dtype=torch.float32)
    scales = surgery.attach(model, made / "f", train=train)
    generator = torch.Generator().manual_seed(1)
    for parameter in scales.parameters() if changed else ():
        parameter.data.normal_(0, 0.3, generator=generator)
    return scales


def _same(one: surgery.Scales, values: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return all((one.values()[key] - value).abs().max() <= tolerance for key, value in values.items())


def test_orthogonal_cores_of_a_training_that_diverges_are_not_finite() -> None:
    """I - A with equal numbers beside which 1 is nothing has a pivot of 0: no error from within a step, but NaN."""
    parameters = torch.stack([torch.full((9,), 0.1), torch.full((9,), 2.0**40)]).requires_grad_()
    change = change_from("orthogonal", parameters, 3)
    change.sum().backward()
    assert parameters.grad is not None
    for found in (change, parameters.grad):
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


def test_scales_are_taken_as_cores_and_back(made: Path, tmp_path: Path) -> None:
    scales = _attached(made, "scales", changed=True)
    scales.save(tmp_path / "s.safetensors")
    cores = {key: torch.diag(value) for key, value in scales.values().items()}
    for train in CORES:
        other = _attached(made, train)
        other.load(tmp_path / "s.safetensors")
        assert _same(other, cores)
        other.save(tmp_path / f"{train}.safetensors")
        back = _attached(made, "scales")
        back.load(tmp_path / f"{train}.safetensors")
        assert _same(back, scales.values())


def test_cores_that_turn_directions_are_no_scales(made: Path, tmp_path: Path) -> None:
    cores = _attached(made, "core", changed=True)
    cores.save(tmp_path / "c.safetensors")
    ways: list[Way] = ["scales", "orthogonal"]
    for train in ways:
        other = _attached(made, train)
        with pytest.raises(ScalesError, match=r'(?s)c\.safetensors: the core of .*train="core"'):
            other.load(tmp_path / "c.safetensors")
        assert all(not bool(parameter.any()) for parameter in other.parameters())  # nothing is taken over by halves


def test_orthogonal_parameters_come_back_exactly(made: Path, tmp_path: Path) -> None:
    """And their core is any core to others."""
    trained = _attached(made, "orthogonal", changed=True)
    trained.save(tmp_path / "o.safetensors")
    again, core = _attached(made, "orthogonal"), _attached(made, "core")
    again.load(tmp_path / "o.safetensors")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), trained.parameters(), strict=True))
    core.load(tmp_path / "o.safetensors")
    assert _same(core, trained.values(), 1e-7)
    for parameters, value in zip(trained.parameters(), trained.values().values(), strict=True):
        a, b = parameters.detach()[-8:-4], parameters.detach()[-4:]
        rotation = torch.diag(1 / (1 + a)) @ value @ torch.diag(1 / (1 + b))
        assert torch.allclose(rotation @ rotation.T, torch.eye(4), atol=1e-5)
        assert (rotation - torch.eye(4)).abs().max() > 0.05


KEY = "model.layers.1.self_attn.q_proj.weight"
#: Parameters of four directions for which I - A has no inverse in floating point.
SINGULAR = torch.tensor([1e17] * 3 + [0.0] * 11)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda tensors: tensors.update({f"{KEY}.orthogonal": torch.zeros(13)}), "does not fit what it belongs to"),
        (lambda tensors: tensors[f"{KEY}.orthogonal"].fill_(float("nan")), "holds NaN or infinity"),
        (lambda tensors: tensors[f"{KEY}.orthogonal"].add_(0.01), "do not amount to its core"),
        (lambda tensors: tensors[f"{KEY}.orthogonal"].copy_(SINGULAR), "do not amount to its core"),
        (lambda tensors: tensors[KEY].add_(0.01), "do not amount to its core"),
        (lambda tensors: tensors.pop(f"{KEY}.orthogonal"), "has not been trained as an orthogonal one"),
    ],
)
def test_damaged_orthogonal_parameters(
    what: Callable[[dict[str, torch.Tensor]], Any], said: str, made: Path, tmp_path: Path
) -> None:
    _attached(made, "orthogonal", changed=True).save(tmp_path / "o.safetensors")
    tensors = load_file(tmp_path / "o.safetensors")
    what(tensors)
    fingerprint = surgery.Manifest.read(made / "f").fingerprint
    said_in_file = {"format_version": 1, "fingerprint": fingerprint, "train": "core", "beside": ["orthogonal"]}
    save_file(tensors, tmp_path / "o.safetensors", {SCALES_METADATA_KEY: json.dumps(said_in_file)})
    with pytest.raises(ScalesError, match=rf"{KEY}.*{said}"):
        _attached(made, "orthogonal").load(tmp_path / "o.safetensors")
