"""The figures of ``surgery extract`` and what becomes of each tensor, against float64 and the bytes of both models."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from surgery.errors import OptionError, SurgeryError
from tests.commands.tuned_models import extracted, least_error, merged_by_us, relative, saved, trained
from tests.families import FAMILIES
from tests.models import save_llama, tensors_of
from tests.releases import needs, writes_e8m0
from tests.truths.peft_side import quietly

pytestmark = [pytest.mark.usefixtures("one_thread")]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
#: Figures are told in six digits.
_TOLD = 6e-6


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A Llama in each dtype. Read-only."""
    folder = tmp_path_factory.mktemp("bases")
    return {dtype: save_llama(folder / f"{dtype}", dtype) for dtype in (BF16, F16, F32)}


# ---- the error of each weight, and of all


@pytest.mark.parametrize("rank", [1, 4, 16, 40])
@pytest.mark.parametrize(
    ("before", "after"),
    [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F32, BF16), (F16, BF16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_no_error_is_above_the_least_one(
    before: torch.dtype, after: torch.dtype, rank: int, bases: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """Of the report, and of the adapter's own ``B A``; what merging gives is as it says. Some weights have 24 rows only."""
    base = tensors_of(bases[before])
    new = trained(base, after)
    one = extracted(bases[before], saved(tmp_path / "t", new, bases[before], files=2), tmp_path / "a", rank=rank)
    merged = merged_by_us(bases[before], tmp_path / "a", tmp_path / "m")
    assert one.report.rank == rank
    assert len(one.report.targets) == 14
    pairs = one.pairs()
    sums = Counter[str]()
    for told in one.report.targets:
        W, change = base[told.tensor].double(), new[told.tensor].double() - base[told.tensor].double()
        left = change - pairs[told.tensor]
        least = least_error(change, rank)
        assert told.rank == min(rank, *W.shape)
        assert told.change == pytest.approx(relative(change, W), rel=_TOLD)
        assert told.error == pytest.approx(least, rel=1e-5, abs=1e-6)
        assert relative(left, change) == pytest.approx(least, rel=1e-5, abs=1e-6)
        assert told.kept == pytest.approx(1 - least**2, abs=_TOLD)
        missed = merged[told.tensor].double() - new[told.tensor].double()
        assert merged[told.tensor].dtype == before
        assert told.merged_error == pytest.approx(relative(missed, change), rel=_TOLD, abs=1e-7)
        for name, tensor in (("before", W), ("change", change), ("left", left), ("missed", missed)):
            sums[name] += tensor.square().sum().item()  # type: ignore[assignment]
    assert one.report.change == pytest.approx(math.sqrt(sums["change"] / sums["before"]), rel=_TOLD)
    assert one.report.error == pytest.approx(math.sqrt(sums["left"] / sums["change"]), rel=1e-5, abs=1e-6)
    assert one.report.kept == pytest.approx(1 - sums["left"] / sums["change"], abs=_TOLD)
    assert one.report.merged_error == pytest.approx(math.sqrt(sums["missed"] / sums["change"]), rel=_TOLD, abs=1e-7)
    assert one.report.numbers == sum(told.rank * sum(told.shape) for told in one.report.targets)


def test_of_matrices_that_are_iterated_on(tmp_path: Path) -> None:
    """Larger ones, whose directions come from an iteration, in a change that ends in a floor of noise."""
    sizes = {"hidden_size": 320, "intermediate_size": 512, "num_hidden_layers": 1}
    base = save_llama(tmp_path / "b", BF16, **sizes)
    old = tensors_of(base)
    new = trained(old, size=0.01)
    one = extracted(base, saved(tmp_path / "t", new, base), tmp_path / "a", rank=8)
    pairs = one.pairs()
    rules = set()
    for told in one.report.targets:
        change = new[told.tensor].double() - old[told.tensor].double()
        least, error = least_error(change, 8), relative(change - pairs[told.tensor], change)
        rules.add(told.rule)
        assert told.excess is not None
        assert told.excess <= 5e-5
        assert least * (1 - 1e-6) <= error <= least * (1 + 5e-5), told
        assert told.error == pytest.approx(error, rel=1e-5)
    assert rules & {"directions", "error"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_error_of_a_merge_counts_the_rounding_of_the_pairs(
    dtype: str, bases: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    base = tensors_of(bases[F32])
    new = trained(base)
    one = extracted(bases[F32], saved(tmp_path / "t", new, bases[F32]), tmp_path / "a", rank=6, dtype=dtype)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values()} == {f"torch.{dtype}"}
    merged = merged_by_us(bases[F32], tmp_path / "a", tmp_path / "m")
    for told in one.report.targets:
        change = new[told.tensor].double() - base[told.tensor].double()
        missed = relative(merged[told.tensor].double() - new[told.tensor].double(), change)
        assert told.merged_error == pytest.approx(missed, rel=1e-5)
        assert told.error is not None
        assert missed > told.error * (1 - _TOLD)  # as the pairs are rounded


# ---- how many directions


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_an_energy_takes_the_fewest_directions(energy: float, bases: dict[torch.dtype, Path], tmp_path: Path) -> None:
    base = tensors_of(bases[F32])
    new = trained(base)
    one = extracted(bases[F32], saved(tmp_path / "t", new, bases[F32]), tmp_path / "a", energy=energy, max_rank=20)
    pairs, ranks = one.pairs(), one.ranks()
    for name, rank in ranks.items():
        change = new[name].double() - base[name].double()
        shares = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        assert rank == min(20, int((shares < energy).sum()) + 1)
        assert torch.linalg.matrix_rank(pairs[name], rtol=1e-6) == rank
    assert len(set(ranks.values())) > 1


def test_a_budget_is_kept_and_spent_best(bases: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """Against all ways to spend it on four weights."""
    base = tensors_of(bases[F32])
    chosen = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.k_proj", "mlp.down_proj")]
    new = {}
    for i, (name, tensor) in enumerate(trained(base).items()):
        new[name] = base[name] + (tensor - base[name]) * (1 + i % 3)
    tuned = saved(tmp_path / "t", new, bases[F32])
    cost = {name: sum(base[name].shape) for name in chosen}
    gains = {}
    for name in chosen:
        values = torch.linalg.svdvals(new[name].double() - base[name].double())
        gains[name] = [0.0, *values.square().cumsum(0)[:5].tolist()]
    total = sum(torch.sum((new[name].double() - base[name].double()) ** 2).item() for name in chosen)
    for budget in (72, 128, 300, 555, 1000, 10_000):
        options: dict[str, Any] = {"include": chosen, "budget": budget, "max_rank": 5}
        one = extracted(bases[F32], tuned, tmp_path / f"a{budget}", **options)
        best = max(
            sum(gains[name][k] for name, k in zip(chosen, ranks, strict=True))
            for ranks in itertools.product(range(6), repeat=4)
            if sum(cost[name] * k for name, k in zip(chosen, ranks, strict=True)) <= budget
        )
        spent = sum(cost[name] * k for name, k in one.ranks().items())
        stored = load_file(one.out / "adapter_model.safetensors")
        assert spent == one.report.numbers == sum(tensor.numel() for tensor in stored.values()) <= budget
        assert sum(gains[name][k] for name, k in one.ranks().items()) == pytest.approx(best, rel=1e-6)
        pairs = one.pairs()
        left = sum(torch.sum((new[n].double() - base[n].double() - pairs.get(n, 0.0)) ** 2).item() for n in chosen)
        assert one.report.kept == pytest.approx(1 - left / total, abs=_TOLD)
        assert one.report.kept == pytest.approx(best / total, abs=_TOLD)
        assert one.report.merged_error is None
    with pytest.raises(OptionError, match=r"is too small for one direction\n  got: +70\n  expected: at least 72"):
        extracted(bases[F32], tuned, tmp_path / "none", include=chosen, budget=70)


@pytest.mark.parametrize(
    ("before", "after", "planted"),
    # Not one alone from bfloat16 to bfloat16: what rounding does to a single one is no noise, but has directions of its own.
    [(F32, BF16, 1), (F32, BF16, 9), (BF16, F32, 1), (BF16, F32, 9), (BF16, BF16, 3), (BF16, BF16, 9)],
    ids=lambda one: str(one).removeprefix("torch."),
)
def test_auto_counts_the_directions_above_rounding(
    before: torch.dtype, after: torch.dtype, planted: int, tmp_path: Path
) -> None:
    """Each planted one is more than twice the largest singular value that the rounding of the tuned weights has."""
    folder = save_llama(tmp_path / "b", before, hidden_size=96, intermediate_size=160, num_hidden_layers=1)
    base = tensors_of(folder)
    generator = torch.Generator().manual_seed(planted)
    new = {}
    for name, tensor in base.items():
        new[name] = tensor.to(after)
        if "layers" in name and tensor.ndim == 2:
            left, right = (
                torch.linalg.qr(torch.randn(size, planted, generator=generator, dtype=torch.double))[0] for size in tensor.shape
            )
            noise = 1.5 * torch.linalg.matrix_norm(tensor.double() * 2**-9, 2)
            wide = tensor.double() + (left * (noise + noise * torch.rand(planted, generator=generator))) @ right.mT
            new[name] = wide.to(after)
            rounding = torch.linalg.matrix_norm(new[name].double() - wide, 2)
            assert 2 * rounding < noise
    one = extracted(folder, saved(tmp_path / "t", new, folder), tmp_path / "a", rank="auto")
    assert one.ranks() == dict.fromkeys(one.ranks(), planted)
    assert {told.above_floor for told in one.report.targets} == {planted}


def test_auto_finds_nothing_in_rounding(bases: dict[torch.dtype, Path], tmp_path: Path) -> None:
    rounded = {name: tensor.to(BF16) for name, tensor in tensors_of(bases[F32]).items()}
    tuned = saved(tmp_path / "t", rounded, bases[F32])
    with pytest.raises(OptionError, match=r"nothing to extract: no change stands above its noise(.|\n)*--rank 8"):
        extracted(bases[F32], tuned, tmp_path / "a", rank="auto")
    assert not list((tmp_path / "a").glob("adapter*"))


# ---- what becomes of each tensor


def _squares(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


@writes_e8m0
def test_every_tensor_is_told_of_once(tmp_path: Path) -> None:
    """Changed, the same, resized and gone ones, buffers of any dtype, and what only the tuned model has."""
    model = save_llama(tmp_path / "model", BF16, attention_bias=True)
    old = tensors_of(model)
    mask = torch.full((6, 6), -math.inf).triu(1)
    layer = "model.layers.{}.self_attn."
    old |= {
        layer.format(0) + "rotary_emb.inv_freq": torch.rand(6),
        layer.format(1) + "rotary_emb.inv_freq": torch.rand(6),
        "model.mask": mask,
        "model.other_mask": mask.clone(),
        "model.wide_mask": mask.clone(),
        "model.masked_bias": torch.tensor(torch.finfo(F32).min),
        "model.position_ids": torch.arange(8)[None],
        "model.steps": torch.tensor(3),
        "model.causal": torch.ones(4, 4, dtype=torch.bool).tril(),
        "model.empty": torch.zeros(0, 4),
        "model.scale": torch.tensor(2.0),
        "model.exact": torch.rand(3, 3, dtype=torch.float64),
        "model.stray_scale": torch.ones(4, 4).to(torch.float8_e8m0fnu),
        "model.another_scale": torch.ones(4, 4).to(torch.float8_e8m0fnu),
    }
    for name in old:
        if name.endswith("proj.bias"):
            old[name] = (0.1 * torch.cos(torch.arange(len(old[name])))).to(BF16)
    new = {name: tensor.clone() for name, tensor in old.items()}
    after = trained({name: tensor for name, tensor in old.items() if tensor.dtype == BF16})
    changed = [n for n in old if "layers.0" in n and n.endswith(("bias", "norm.weight"))]
    for name in [*changed, *(one for one in old if "proj.weight" in one and "layers" in one)]:
        new[name] = after[name]
    new["lm_head.weight"] = torch.cat([after["lm_head.weight"], torch.ones(3, 48, dtype=BF16)])
    new["model.embed_tokens.weight"] = after["model.embed_tokens.weight"][:-2].clone()
    new["model.position_ids"] += 1
    new["model.scale"] = torch.tensor(2.5)
    new["model.other_mask"][0, 3] = 0.0
    new["model.another_scale"] = torch.full((4, 4), 2.0).to(torch.float8_e8m0fnu)
    new["model.wide_mask"] = mask.to(BF16)
    new["model.masked_bias"] = old["model.masked_bias"].to(BF16)
    assert new["model.masked_bias"].isinf()
    still = layer.format(1) + "q_proj.weight"
    new[still] = old[still]
    del new[layer.format(1) + "rotary_emb.inv_freq"], new[layer.format(1) + "v_proj.bias"]
    more = {"value_head.weight": torch.ones(1, 48), "value_head.bias": torch.ones(1)}
    base = saved(tmp_path / "b", old, model, files=3)
    one = extracted(base, saved(tmp_path / "t", new | more, model, files=2), tmp_path / "a", rank=3)

    targets, others = (Counter(each.tensor for each in some) for some in (one.report.targets, one.report.others))
    assert targets + others == Counter(old.keys())
    assert set(targets) == {name for name in old if "_proj.weight" in name}
    assert sorted(one.report.further) == sorted(more)
    fates = dict.fromkeys(others, "same") | dict.fromkeys(changed, "changed")
    fates |= dict.fromkeys(["lm_head.weight", "model.embed_tokens.weight"], "resized")
    fates |= dict.fromkeys([layer.format(1) + "rotary_emb.inv_freq", layer.format(1) + "v_proj.bias"], "gone")
    fates |= dict.fromkeys(
        ["model.position_ids", "model.scale", "model.other_mask", "model.masked_bias", "model.another_scale"], "changed"
    )
    assert one.fates() == fates
    pairs = one.pairs()
    all_change = all_left = 0.0
    for told in one.report.others:
        assert (told.dtype, told.shape) == (_DTYPES[old[told.tensor].dtype], tuple(old[told.tensor].shape))
        assert told.tuned_shape == (tuple(new[told.tensor].shape) if told.tensor in new else None)
        assert told.reason
        if told.fate == "gone" or "mask" in told.tensor or "_scale" in told.tensor or not old[told.tensor].is_floating_point():
            assert told.change is None or (told.fate, told.change) == ("same", 0.0)
            continue
        rows = min(len(old[told.tensor]), len(new[told.tensor])) if old[told.tensor].ndim else None
        difference = (
            new[told.tensor][:rows].double() - old[told.tensor][:rows].double() if rows else new[told.tensor] - old[told.tensor]
        )
        if old[told.tensor].numel() and old[told.tensor].dtype != torch.float64:
            assert told.change == pytest.approx(relative(difference, old[told.tensor]), rel=_TOLD), told.tensor
        all_change += _squares(difference)
        all_left += _squares(difference)
    (unchanged,) = (told for told in one.report.targets if told.tensor == still)
    assert (unchanged.rank, unchanged.change, unchanged.kept, unchanged.error, unchanged.rule) == (0, 0.0, None, None, "zero")
    assert pairs.keys() == targets.keys() - {still}
    for name in pairs:
        difference = new[name].double() - old[name].double()
        all_change += _squares(difference)
        all_left += _squares(difference - pairs[name])
    assert one.report.kept_of_all == pytest.approx(1 - all_left / all_change, abs=_TOLD)
    said = "\n".join(one.notes)
    count = sum(fate == "changed" for fate in fates.values())
    assert f"{count} tensors have changed and are not in the adapter, most of all " in said
    assert "not in the tuned model, of the tensors of the base: " in said
    assert "not in the base, of the tensors of the tuned model: " in said
    (resized,) = (note for note in one.notes if "another shape" in note)
    assert resized.startswith("2 tensors have another shape in the tuned model: ")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert f"{name}, {list(old[name].shape)} and there {list(new[name].shape)}" in resized
    assert "--full" not in resized


_DTYPES = {
    BF16: "BF16",
    F32: "F32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float64: "F64",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def _merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    with quietly():
        merged: Any = peft.PeftModel.from_pretrained(load(base, dtype=F32), str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


@pytest.mark.parametrize(
    ("family", "full", "changes"),
    [
        ("llama", ["*norm*"], ["layers.1.input_layernorm", "model.norm"]),
        ("llama", ["*norm*", "lm_head*"], ["layers.0.post_attention_layernorm", "lm_head"]),
        ("gpt2", ["*.ln_*"], ["h.0.ln_1.weight", "h.1.ln_2.bias"]),
        ("gpt2", ["*.c_attn.bias", "*.c_fc.bias"], ["h.0.attn.c_attn.bias", "h.1.mlp.c_fc.bias", "h.1.ln_1.weight"]),
        ("gpt2", ["*bias", "*.ln_*"], ["h.0.attn.c_attn.bias", "h.0.ln_1.bias", "h.0.ln_1.weight", "ln_f.weight"]),
    ],
)
def test_whole_are_those_that_have_changed(family: str, full: list[str], changes: list[str], tmp_path: Path) -> None:
    """PEFT loads them, merges to the tuned weights, and leaves what is not chosen; what is kept of all counts them."""
    base = FAMILIES[family].save(tmp_path / "b")
    old = tensors_of(base)
    after = trained(old)
    targets = {name for name in old if name.endswith(("_proj.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    changed = {name for name in old if any(part in name for part in changes) and name not in targets}
    assert len(changed) >= len(changes)
    new = {name: after[name] if name in targets | changed else tensor for name, tensor in old.items()}
    one = extracted(base, saved(tmp_path / "t", new, base), tmp_path / "a", rank=4, full=full)
    fates = one.fates()
    chosen = {name for name in changed if any(Path(name).match(glob) for glob in full)}
    assert {name for name, fate in fates.items() if fate == "saved"} == chosen
    assert {name for name, fate in fates.items() if fate == "changed"} == changed - chosen
    pairs = one.pairs()
    truth = {name: tensor.double() for name, tensor in old.items()} | {name: new[name].double() for name in chosen}
    for name in targets:
        truth[name] = truth[name] + (pairs[name].T if family == "gpt2" else pairs[name])
    merged, ours = _merged_by_peft(base, tmp_path / "a"), merged_by_us(base, tmp_path / "a", tmp_path / "m")
    for name, expected in truth.items():
        for found in (merged[name], ours[name]):
            assert relative(found.double() - expected, expected + 1e-30) <= 1e-6, name
    all_left = sum(_squares(truth[name] - new[name].double()) for name in old)
    all_change = sum(_squares(new[name].double() - old[name].double()) for name in old)
    assert one.report.kept_of_all == pytest.approx(1 - all_left / all_change, abs=_TOLD)
    if changed == chosen:
        assert not any("not in the adapter" in note for note in one.notes)
    stored = {key for key in load_file(tmp_path / "a/adapter_model.safetensors") if "lora_" not in key}
    if not any("bias" in glob for glob in full):
        modules = {name.rpartition(".")[0] for name in chosen}
        assert {key.removeprefix("base_model.model.").rpartition(".")[0] for key in stored} == modules
    else:
        assert len(stored) >= len(chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.double(), "as it is in the tuned model\n  got: +F64"),
        (lambda tensor: tensor[:-1], "has another shape in the tuned model, and cannot be saved whole"),
    ],
)
def test_what_cannot_be_held_whole(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, bases: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    new = trained(tensors_of(bases[F32]))
    tuned = saved(tmp_path / "t", new | {"model.norm.weight": change(new["model.norm.weight"])}, bases[F32])
    with pytest.raises(OptionError, match=message):
        extracted(bases[F32], tuned, tmp_path / "a", full=["*norm*"])
    report = extracted(bases[F32], tuned, tmp_path / "b", rank=2).report
    assert [told.fate for told in report.others if told.tensor == "model.norm.weight"] in (["changed"], ["resized"])


@pytest.mark.parametrize("changes", ["nothing", "norms"])
def test_nothing_that_a_pair_holds(changes: str, bases: dict[torch.dtype, Path], tmp_path: Path) -> None:
    new = tensors_of(bases[BF16])
    if changes == "norms":
        new |= {name: tensor + 1 for name, tensor in new.items() if "norm" in name}
    tuned = saved(tmp_path / "t", new, bases[BF16])
    expected = (
        "the two models have the same weights"
        if changes == "nothing"
        else "none of the weights that would become pairs has changed"
    )
    with pytest.raises(SurgeryError, match=expected):
        extracted(bases[BF16], tuned, tmp_path / "a", full=["*norm*"])
    assert not list((tmp_path / "a").glob("adapter*"))


@needs("peft", ">=0.19", "ensure_weight_tying")
@pytest.mark.parametrize("how", ["left out", "written", "under the other name"])
@pytest.mark.parametrize("is_written", [False, True])
def test_a_tied_head(how: str, is_written: bool, tmp_path: Path) -> None:
    """In the files of both models or not: it is no other tensor than the embedding, is told of so, and is saved with it."""
    model = save_llama(tmp_path / "m", F32, tie_word_embeddings=True)
    old = tensors_of(model)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    new = trained(old)
    base = saved(tmp_path / "b", old | ({head: old[embedding].clone()} if is_written else {}), model)
    tensors = {
        "left out": new,
        "written": new | {head: new[embedding].clone()},
        "under the other name": {head if name == embedding else name: tensor for name, tensor in new.items()},
    }
    tuned = saved(tmp_path / "t", tensors[how], model)
    change = relative(new[embedding].double() - old[embedding].double(), old[embedding])
    for full in ((), ("*embed_tokens*",)):
        one = extracted(base, tuned, tmp_path / f"a{len(full)}", rank=5, full=full)
        told = {each.tensor: each for each in one.report.others if each.tensor in (embedding, head)}
        assert set(told) == {embedding, *([head] if is_written else [])}
        for each in told.values():
            assert each.fate == ("saved" if full else "changed"), each
            assert each.change == pytest.approx(change, rel=_TOLD)
        assert one.report.further == ((head,) if how == "written" and not is_written else ())
    merged, ours = _merged_by_peft(base, tmp_path / "a1"), merged_by_us(base, tmp_path / "a1", tmp_path / "merged")
    for found in (merged, ours):
        assert torch.equal(found[embedding], new[embedding])
        assert torch.equal(found.get(head, new[embedding]), new[embedding])
    for include in (["*embed*", "*q_proj*"], ["*embed*"]):
        with pytest.raises(SurgeryError, match=r"'[\w.]+' cannot be written as LoRA\n.*several modules share") as caught:
            extracted(base, tuned, tmp_path / "o", include=include)
        assert "--full model.embed_tokens.weight; or leave it out" in str(caught.value.hint)  # which works, see above
    for options in ({"full": ["*mlp*"], "include": ["*embed*", "*q_proj*"]}, {"full": ["*norm*"], "include": ["*embed*"]}):
        with pytest.raises(SurgeryError, match="cannot be written as LoRA") as caught:
            extracted(base, tuned, tmp_path / "o", **options)
        assert "--full model.embed_tokens.weight; or leave it out" in str(caught.value.hint)


def test_a_head_that_is_tied_no_more(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", F32, tie_word_embeddings=True)
    old = tensors_of(model)
    new = trained(old)
    apart = {"lm_head.weight": new["model.embed_tokens.weight"] + 0.01}
    tuned = saved(tmp_path / "t", new | apart, model, tie_word_embeddings=False)
    one = extracted(model, tuned, tmp_path / "a", rank=5)
    assert one.report.further == ("lm_head.weight",)
    both = saved(tmp_path / "b", old | {"lm_head.weight": old["model.embed_tokens.weight"].clone()}, model)
    fates = extracted(both, tuned, tmp_path / "a2", rank=5).report.others
    changes = {told.tensor: told.change for told in fates}
    assert changes["lm_head.weight"] == pytest.approx(
        relative(
            apart["lm_head.weight"].double() - old["model.embed_tokens.weight"].double(), old["model.embed_tokens.weight"]
        ),
        rel=_TOLD,
    )
    with pytest.raises(SurgeryError):
        extracted(both, tuned, tmp_path / "a3", rank=5, full=["*embed*"])
