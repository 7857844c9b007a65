"""surgery verify measures what the manifest says: a wrong figure of each kind is found, and no right one is taken for wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import SkippedRecord, TargetRecord
from surgery.linalg.measured import gap_limits, measure
from surgery.lossless.factors import Factors
from tests.models import realistic, save_llama

Change = Callable[[TargetRecord], TargetRecord]

#: How a checkpoint is made -> whether its weights are in the model that it was made from.
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "residual": ({}, False),
    "overlay": ({"layout": "overlay"}, True),
    "no correction": ({"correction": False}, True),
}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("figures")
    for name, (options, _) in LAYOUTS.items():
        surgery.factorize(llama, root / name, rank=6, device="cpu", **options)
    return root


def _verified(made: Path, llama: Path, layout: str, change: Callable[[Manifest], Manifest], tmp_path: Path) -> set[str]:
    """The checks that fail where the manifest is another, whole in itself."""
    folder = Path(shutil.copytree(made / layout, tmp_path / "f"))
    change(Manifest.read(folder)).write(folder)
    return {failure.check for failure in surgery.verify(folder, base=llama if LAYOUTS[layout][1] else None).failures}


def _target(change: Change) -> Callable[[Manifest], Manifest]:
    """A manifest with another entry for the last target."""
    return lambda manifest: dataclasses.replace(manifest, targets=[*manifest.targets[:-1], change(manifest.targets[-1])])


def _certificate(**change: Callable[[Any], Any]) -> Change:
    def changed(target: TargetRecord) -> TargetRecord:
        old = target.certificates[0]
        new = dataclasses.replace(old, **{name: how(getattr(old, name)) for name, how in change.items()})
        return dataclasses.replace(target, certificates=[new, *target.certificates[1:]])

    return changed


def _at(index: int, factor: float) -> Callable[[list[float]], list[float]]:
    return lambda values: [value * factor if i == index % len(values) else value for i, value in enumerate(values)]


#: Of a target: what is changed, and the check that finds it.
FIGURES: dict[str, tuple[Change, str]] = {
    "energy, in its fifth digit": (lambda t: dataclasses.replace(t, energy=t.energy + 2e-5), "energy"),
    "energy, too small": (lambda t: dataclasses.replace(t, energy=t.energy * 0.9), "energy"),
    "the last gap, half as large again": (_certificate(gap=_at(-1, 1.5)), "gap"),
    "the first gap, two percent larger": (_certificate(gap=_at(0, 1.02)), "gap"),
    "a gap, two percent smaller": (_certificate(gap=_at(1, 0.98)), "gap"),
    "a gap of 0": (_certificate(gap=_at(2, 0.0)), "gap"),
    "a smaller residual": (_certificate(residual=lambda _: [1e-9] * 6), "certificate"),
    "a larger residual": (_certificate(residual=_at(3, 100.0)), "residual"),
    "not converged": (_certificate(converged=lambda _: False), "converged"),
    "another method": (_certificate(method=lambda _: "block-lanczos"), "method and passes"),
    "a method that is none": (_certificate(method=lambda _: "magic"), "method and passes"),
    "no passes": (_certificate(passes=lambda _: 0), "method and passes"),
    "a matrix of zeros": (_certificate(method=lambda _: "zero", passes=lambda _: 0), "method and passes"),
    "another smallest value": (lambda t: dataclasses.replace(t, s_last=t.s_last * 1.001), "s_1, s_k"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("figure", FIGURES)
def test_a_wrong_figure_of_a_target(figure: str, layout: str, made: Path, llama: Path, tmp_path: Path) -> None:
    change, check = FIGURES[figure]
    assert check in _verified(made, llama, layout, _target(change), tmp_path)


@pytest.mark.parametrize("layout", ["residual", "no correction"])
@pytest.mark.parametrize("factor", [0.5, 1.01, 0.0])
def test_a_wrong_share_of_inexact_entries(factor: float, layout: str, made: Path, llama: Path, tmp_path: Path) -> None:
    def other(target: TargetRecord) -> TargetRecord:
        assert target.inexact
        return dataclasses.replace(target, inexact=float(f"{target.inexact * factor:.3g}"))

    assert _verified(made, llama, layout, _target(other), tmp_path) == {"inexact"}


def _options(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(manifest, options=dataclasses.replace(manifest.options, **changes))


def _skipped(change: Callable[[list[SkippedRecord]], list[SkippedRecord]]) -> Callable[[Manifest], Manifest]:
    return lambda manifest: dataclasses.replace(manifest, skipped=change(manifest.skipped))


#: Of the manifest: what is changed, and part of the check that finds it.
ENTRIES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "a rank": (_options(rank=7), "rank of"),
    "a seed that none can be": (_options(seed=-1), "the seed makes no sense"),
    "a tolerance that none can be": (_options(tolerance=0.0), "the tolerance makes no sense"),
    "an include that chooses others": (_options(include=["*.q_proj.weight"]), "include and exclude"),
    "an exclude of a target": (_options(exclude=["*.q_proj.weight"]), "include and exclude"),
    "nothing passed over": (_skipped(lambda _: []), "the manifest knows the tensor"),
    "one less passed over": (_skipped(lambda them: them[1:]), "the manifest knows the tensor"),
    "another name passed over": (
        _skipped(lambda them: [dataclasses.replace(them[0], tensor="x"), *them[1:]]),
        "what was passed over is there",
    ),
    "passed over in another shard": (
        _skipped(lambda them: [dataclasses.replace(them[0], shard=them[-1].shard), *them[1:]]),
        "what was passed over is there",
    ),
    "passed over in no shard": (
        _skipped(lambda them: [dataclasses.replace(them[0], shard="x.safetensors"), *them[1:]]),
        "in one of the weight files",
    ),
    "passed over twice": (_skipped(lambda them: [*them, them[0]]), "in one of the weight files"),
    "left out what is there": (
        lambda m: dataclasses.replace(m, left_out=[surgery.format.manifest.LeftOutRecord("config.json", "why not")]),
        "what is left out is not there",
    ),
    "another fingerprint": (lambda m: dataclasses.replace(m, fingerprint="0" * 64), "fingerprint"),
}


@pytest.mark.parametrize("layout", ["residual", "overlay"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_entry(entry: str, layout: str, made: Path, llama: Path, tmp_path: Path) -> None:
    change, check = ENTRIES[entry]
    assert any(check in found for found in _verified(made, llama, layout, change, tmp_path))


def _model(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "other", **config}))
    return folder


@pytest.mark.filterwarnings("ignore:.*one parameter, edited together")
def test_an_alias_that_is_another_tensor(tmp_path: Path) -> None:
    """Tied by transformers' own class; another tensor of the same shape is named in its place."""
    embedding = realistic(97, 48, seed=1)
    model = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True, shard_size="1GB")
    tensors = load_file(model / "model.safetensors")
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    tensors["model.other.weight"] = embedding + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "f"
    manifest = surgery.factorize(model, folder, rank=4, include=["model.embed_tokens.weight"], device="cpu").manifest
    (target,) = manifest.targets
    assert [alias.tensor for alias in target.aliases] == ["lm_head.weight"]
    assert surgery.verify(folder).ok
    (alias,) = target.aliases
    other = dataclasses.replace(alias, tensor="model.other.weight")
    skipped = [
        dataclasses.replace(record, tensor=alias.tensor) if record.tensor == other.tensor else record
        for record in manifest.skipped
    ]
    wrong = dataclasses.replace(manifest, targets=[dataclasses.replace(target, aliases=[other])], skipped=skipped)
    wrong.write(folder)
    assert [failure.check for failure in surgery.verify(folder).failures] == ["the same as model.embed_tokens.weight"]


def _odd(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Matrices of all kinds that certificates speak of."""
    random = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, 70, generator=random))[0] for size in (90, 80))
    matrices = {
        "noise": torch.randn(66, 90, generator=random),
        "tall": torch.randn(150, 40, generator=random),
        "zeros": torch.zeros(30, 40),
        "of rank 3": torch.randn(70, 3, generator=random) @ torch.randn(3, 80, generator=random),
        "identity": torch.eye(70),
        "ones": torch.ones(70, 80),
        "graded": (U * 0.5 ** torch.arange(70)) @ V.T,
        "clusters": (U * torch.repeat_interleave(torch.arange(7.0, 0, -1), 10)) @ V.T,
        "sparse": torch.randn(70, 80, generator=random) * (torch.rand(70, 80, generator=random) < 0.02),
        "small": 1e-3 * torch.randn(80, 66, generator=random),
    }
    tensors = {f"layers.{i}.{name}.weight": matrix for i, (name, matrix) in enumerate(matrices.items())}
    tensors["layers.0.experts.up"] = torch.randn(3, 20, 24, generator=random)
    tensors["layers.0.conv.weight"] = torch.randn(12, 6, 3, generator=random)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:.*larger than:surgery.SurgeryWarning")
@pytest.mark.filterwarnings("ignore:.*less than:surgery.SurgeryWarning")
def test_no_right_figure_is_taken_for_wrong(dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    model = _model(tmp_path / "m", _odd(dtype, seed))
    ways: list[dict[str, Any]] = [
        {"rank": 1},
        {"rank": 9, "seed": 5, "tolerance": 1e-3},
        {"rank": 64},
        {"energy": 0.7, "max_rank": 20},
        {"rank": 9, "layout": "overlay"},
        {"rank": 9, "correction": False},
    ]
    for i, options in enumerate(ways):
        out, threads = tmp_path / str(i), torch.get_num_threads()
        torch.set_num_threads(1 + i % 3)
        surgery.factorize(model, out, include=["*"], exclude=[], device="cpu", **options)
        torch.set_num_threads(threads)
        needed = "layout" in options or "correction" in options
        report = surgery.verify(out, base=model if needed else None, device="cpu")
        assert report.ok, (options, report.failures)
        assert not report.unchecked


@pytest.mark.parametrize("shape", [(40, 60), (200, 90), (90, 300)])
def test_gaps_against_all_singular_values(shape: tuple[int, int]) -> None:
    """The value beyond the kept ones by float64 LAPACK; what the gap may be at the most is near what it is."""
    for seed in range(3):
        A = realistic(*shape, seed=seed)
        true = torch.linalg.svdvals(A.double())
        svd = surgery.truncated_svd(A, 8, seed=seed)
        measured = measure(A, Factors(svd.U, svd.s, svd.V))
        assert measured.energy == pytest.approx(true.square().sum().item(), rel=1e-12)
        assert measured.beyond == pytest.approx((true[8] / true[0]).item(), rel=1e-3)
        assert measured.beyond <= (true[8] / true[0]).item() * (1 + 1e-6)
        gap = svd.certificate.gap
        least, most = gap_limits(svd.s.double(), measured, gap, min(shape), max(shape))
        actual = (torch.minimum(true[6] - true[7], true[7] - true[8]) / true[0]).item()
        assert bool(((least <= gap) & (gap <= most)).all())
        assert actual <= most[-1].item() <= 1.1 * actual + 1e-4


def test_a_direction_that_was_missed() -> None:
    """Triplets as exact as can be that are not the leading ones have no gap to what comes after them."""
    random = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(size, 70, generator=random))[0] for size in (80, 70))
    A = (left * torch.linspace(1, 0.1, 70)) @ right.T
    U, s, V = torch.linalg.svd(A.double(), full_matrices=False)
    kept = [0, 1, 3, 4]
    factors = Factors(U[:, kept].float(), s[kept].float(), V[kept].T.float().contiguous())
    measured = measure(A, factors)
    claimed = torch.full((4,), 1e-2, dtype=torch.float64)
    _, most = gap_limits(factors.s.double(), measured, claimed, 70, 80)
    assert measured.beyond == pytest.approx((s[2] / s[0]).item(), rel=1e-3)
    assert most[-1] < 1e-5
