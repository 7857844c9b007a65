"""``surgery merge`` of every adapter of the catalogue, against float64 truths that know nothing of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.commands.adapters.merge import merge
from surgery.errors import SurgeryError
from surgery.progress import Silent
from tests.models import files_of, tensors_of
from tests.truths.cases import CASES, Built, Case, parameters, shared_root
from tests.truths.measures import Kept, kept_of
from tests.truths.models import MODELS
from tests.truths.peft_side import merged_by_peft

pytestmark = [pytest.mark.usefixtures("one_thread")]

_MERGED = [case for case in CASES if not case.match]
_IN_FLOAT32 = [case for case in _MERGED if case.dtype == torch.float32]
_IN_BFLOAT16 = [case for case in _MERGED if case.dtype == torch.bfloat16]
#: Updates of which bfloat16 loses a part, whose matrices change by low-rank ones alone.
_SMALL = [case for case in _IN_BFLOAT16 if "small" in case.name]
_BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", parameters(_IN_FLOAT32))
def test_in_float32_it_is_the_truth_rounded(case: Case, tmp_path: Path) -> None:
    built, out = case.build(shared_root()), tmp_path / "o"
    assert built.truth is not None
    try:
        merge(built.model, built.adapters, out, weights=built.weights, progress=Silent())
    except SurgeryError as error:
        refused = bool(case.or_refused) and re.search(case.or_refused, str(error)) is not None
        if not refused or (out / "config.json").exists():
            raise
        return
    before, after = tensors_of(built.model), tensors_of(out)
    assert set(after) == set(built.truth)
    for name, tensor in after.items():
        truth = built.truth[name]
        assert tensor.dtype == torch.float32, name
        assert tensor.shape == truth.shape, name
        assert (tensor.double() - truth).norm() <= 1e-6 * truth.norm(), name
        torch.testing.assert_close(tensor.double(), truth, rtol=2e-7, atol=1e-8 * truth.abs().max().item())
    _check_untouched(built, before, after, out)


@pytest.mark.parametrize("case", parameters(_IN_BFLOAT16))
def test_to_nearest_it_is_the_truth_rounded(case: Case, tmp_path: Path) -> None:
    """In bfloat16, but for numbers half-way between two of it, where the last bit of a float64 decides."""
    built, out = case.build(shared_root()), tmp_path / "o"
    assert built.truth is not None
    merge(built.model, built.adapters, out, weights=built.weights, rounding="nearest", progress=Silent())
    before, after = tensors_of(built.model), tensors_of(out)
    assert set(after) == set(built.truth)
    for name, tensor in after.items():
        truth = built.truth[name]
        assert tensor.dtype == torch.bfloat16, name
        rounded = truth.to(torch.bfloat16)
        further = (tensor.double() - truth).abs() - (rounded.double() - truth).abs()
        assert (further <= 1e-7 * truth.abs()).all(), f"{name}: {(tensor != rounded).sum()} of {tensor.numel()} are others"
    _check_untouched(built, before, after, out)


@pytest.mark.parametrize("case", parameters(_SMALL))
def test_what_rounding_keeps_of_small_updates(case: Case, tmp_path: Path) -> None:
    """By itself it keeps nearly all of each matrix's update, where PEFT's merge in bfloat16 keeps less."""
    built, out = case.build(shared_root()), tmp_path / "o"
    assert built.truth is not None
    merge(built.model, built.adapters, out, weights=built.weights, progress=Silent())
    before, after = tensors_of(built.model), tensors_of(out)
    by_peft = merged_by_peft(MODELS[case.model], built.model, built.adapters[0], torch.bfloat16)
    ours: list[Kept] = []
    theirs: list[Kept] = []
    for name, truth in built.truth.items():
        if torch.equal(truth, before[name].double()):
            continue
        ours += kept_of(before[name], truth, after[name], rank=3)
        theirs += kept_of(before[name], truth, by_peft[name], rank=3)
    least, peft_least = min(one.share for one in ours), min(one.share for one in theirs)
    share, peft_share = Kept.of_all(ours).share, Kept.of_all(theirs).share
    told = f"kept {share:.4f}, at least {least:.4f}; PEFT's bfloat16 merge {peft_share:.4f}, {peft_least:.4f}"
    assert peft_least < 0.97, told
    assert least >= 0.99, told
    assert max(one.error for one in ours) <= 0.03, told
    _check_untouched(built, before, after, out)


@pytest.mark.parametrize("case", parameters([case for case in CASES if case.match]))
def test_what_must_be_refused(case: Case, tmp_path: Path) -> None:
    built, out = case.build(shared_root()), tmp_path / "o"
    with pytest.raises(SurgeryError, match=built.match):
        merge(built.model, built.adapters, out, weights=built.weights, progress=Silent())
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.safetensors"))


def test_from_float32_to_bfloat16(tmp_path: Path) -> None:
    """With ``dtype``, all of the truth is rounded once."""
    built, out = _BY_NAME["lora, all linear layers"].build(shared_root()), tmp_path / "o"
    assert built.truth is not None
    merge(built.model, built.adapters, out, dtype="bfloat16", rounding="nearest", progress=Silent())
    for name, tensor in tensors_of(out).items():
        rounded = built.truth[name].to(torch.bfloat16)
        further = (tensor.double() - built.truth[name]).abs() - (rounded.double() - built.truth[name]).abs()
        assert tensor.dtype == torch.bfloat16, name
        assert (further <= 1e-7 * built.truth[name].abs()).all(), name


def test_by_the_command_line(tmp_path: Path) -> None:
    """With weights, it writes the bytes that the function writes."""
    built = _BY_NAME["two with weights"].build(shared_root())
    assert built.weights is not None
    merge(built.model, built.adapters, tmp_path / "a", weights=built.weights, progress=Silent())
    arguments = [str(built.model), *map(str, built.adapters), "-o", str(tmp_path / "b")]
    weights = ",".join(map(str, built.weights))
    result = CliRunner().invoke(main, ["merge", *arguments, "--weights", weights], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def _check_untouched(built: Built, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], out: Path) -> None:
    """What no adapter changes has the bytes that it had: tensors, files without a changed one, all that goes along."""
    assert built.truth is not None
    same = {name for name in before if torch.equal(built.truth[name], before[name].double())}
    changed = set(built.truth) - same
    assert changed
    for name in same:
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), f"{name} was to stay as it was"
    index = built.model / "model.safetensors.index.json"
    if index.is_file():
        place = json.loads(index.read_text())["weight_map"]
        untouched = set(place.values()) - {place[name] for name in changed}
        for file in untouched:
            assert _sha256(out / file) == _sha256(built.model / file), file
    if set(after) == set(before):
        mine, theirs = (
            {name: data for name, data in files_of(folder).items() if not name.endswith(".safetensors")}
            for folder in (out, built.model)
        )
        assert mine == theirs


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
