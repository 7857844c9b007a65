"""Recipes: what they choose, how they meet the command line's options, and what is said of bad ones."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import OptionError, SurgeryError
from surgery.planning.plan import Plan
from surgery.planning.recipes import RECIPE_KEYS, RULE_KEYS, builtin_recipes, find_recipe, read_recipe, recipe_for_family
from tests.families import FAMILIES
from tests.models import files_of, planned, tensors_of


def _recipe(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def _endings(steps: Plan) -> set[str]:
    return {re.sub(r".*\.\d+\.", "", target.tensor).removesuffix(".weight") for target in steps.targets}


def test_first_rule_that_matches_decides(llama: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        tmp_path,
        """
        [[rules]]
        match = "*.0.self_attn.q_proj.weight"
        skip = "the first one stays"

        [[rules]]
        match = ["*.q_proj.weight", "*.k_proj.weight"]
        rank = 3

        [[rules]]
        regex = '.*mlp\\.(up|down)_proj\\.weight'
        energy = 0.4
        max_rank = 9
        """,
    )
    steps = planned(llama, recipe=recipe)
    assert steps.recipe == "mine"
    extent = {target.tensor: (target.rank, target.energy) for target in steps.targets}
    assert extent == {
        "model.layers.0.self_attn.k_proj.weight": (3, None),
        "model.layers.1.self_attn.k_proj.weight": (3, None),
        "model.layers.1.self_attn.q_proj.weight": (3, None),
        **{f"model.layers.{i}.mlp.{name}_proj.weight": (9, 0.4) for i in (0, 1) for name in ("up", "down")},
    }
    reasons = {item.tensor: item.reason for item in steps.skipped}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "the first one stays"
    assert reasons["model.layers.0.self_attn.v_proj.weight"] == "not in the recipe mine"
    assert reasons["lm_head.weight"] == "an output head"
    manifest = surgery.factorize(llama, tmp_path / "f", recipe=recipe).manifest
    assert manifest.options.recipe == "mine"
    assert {target.tensor for target in manifest.targets} == extent.keys()
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(llama)


def test_options_come_on_top(llama: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, '[[rules]]\nmatch = "*.self_attn.*"\nrank = 3\n[[rules]]\nmatch = "*.mlp.*"\nenergy = 0.5')
    assert {target.rank for target in planned(llama, recipe=recipe, rank=5).targets} == {5}
    assert {(t.rank, t.energy) for t in planned(llama, recipe=recipe, energy=0.3, max_rank=7).targets} == {(7, 0.3)}
    # A largest rank alone belongs to the rules with an energy.
    assert {(t.rank, t.energy) for t in planned(llama, recipe=recipe, max_rank=7).targets} == {(3, None), (7, 0.5)}
    assert _endings(planned(llama, recipe=recipe, exclude=["*.mlp.*", "*[kv]_proj*"])) == {
        "self_attn.q_proj",
        "self_attn.o_proj",
    }
    # --include takes exactly what it matches, and sees it as the recipe says.
    assert _endings(planned(llama, recipe=recipe, include=["lm_head.weight", "*.up_proj.*"])) == {"lm_head", "mlp.up_proj"}


def test_include_keeps_the_view_of_the_family(tmp_path: Path) -> None:
    folder = FAMILIES["gpt_oss"].save(tmp_path / "m")
    steps = planned(folder, include=["*experts.gate_up_proj"], rank=2, split=True)
    assert {target.key.rpartition(".")[2] for target in steps.targets} == {"gate_up_proj[gate]", "gate_up_proj[up]"}
    assert {target.matrices for target in steps.targets} == {(4, 32, 48)}


def test_attention_alone_and_mlp_alone(tmp_path: Path) -> None:
    """On every family with both, the two recipes share nothing, and make up what the family's own one takes."""
    for name, family in FAMILIES.items():
        folder = family.save(tmp_path / name)
        if family.recipe in ("mamba", "diffusion"):
            continue
        attention, mlp = (
            {target.tensor for target in planned(folder, recipe=recipe, rank=2).targets} for recipe in ("attention", "mlp")
        )
        both = {target.tensor for target in planned(folder, rank=2).targets}
        assert not attention & mlp, name
        assert attention | mlp == both - {tensor for tensor in both if ".mamba." in tensor}, name


def test_every_builtin_recipe_can_be_named_and_is_used() -> None:
    families = {family.recipe for family in FAMILIES.values()} | {"attention", "mlp"}
    assert families - {None} == builtin_recipes().keys()
    for name, recipe in builtin_recipes().items():
        assert find_recipe(name) is recipe
        assert recipe.description
        for family in recipe.families:
            assert recipe_for_family({"model_type": family}) is recipe, family


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[[rules]\n", "no valid TOML", "line 1"),
        ("", "has no rules", ""),
        ("rules = 3", "has no rules", ""),
        ('[[rules]]\nmatch = "*"\nrnak = 3', "unknown key 'rnak'", "did you mean 'rank'?"),
        ('famlies = []\n[[rules]]\nmatch = "*"', "unknown key 'famlies'", "did you mean 'families'?"),
        ("[[rules]]\nrank = 3", "rule 1 needs either match or regex", "rank"),
        ('[[rules]]\nmatch = "*"\nregex = ".*"', "rule 1 needs either match or regex", ""),
        ("[[rules]]\nmatch = []", "match is empty", ""),
        ("[[rules]]\nmatch = 3", "wrong type", "a list of strings"),
        ('[[rules]]\nregex = "("', "no regular expression", "a ( without a )"),
        ('[[rules]]\nmatch = "*"\nskip = "x"\nrank = 3', "nothing else can be said", ""),
        ('[[rules]]\nmatch = "*"\nskip = ""', "must tell the reason", ""),
        ('[[rules]]\nregex = "a{99999999999999999999}"', "no regular expression", ""),
        ("[[rules]]\nregex = '(?!.*mlp).*proj.*'", "no regular expression", "skip what is not meant in a rule before this one"),
        ("[[rules]]\nmatch = '" + "[" * 10_001 + "'", "a glob of 10001 characters", ""),
        ("[[rules]]\nregex = '" + "(" * 5000 + ")" * 5000 + "'", "no regular expression", ""),
        ("a = " + "[" * 5000, "no valid TOML", ""),
        ('[[rules]]\nmatch = "*"\nslices = ["query", "key"]\nevery = "group"', "only slices q, k and v", ""),
        ('[[rules]]\nmatch = "*"\nrank = 3\nenergy = 0.5', "contradict each other", ""),
        ('[[rules]]\nmatch = "*"\nrank = 0', "rank must be at least 1", "0"),
        ('[[rules]]\nmatch = "*"\nrank = "8"', "wrong type", "expected: a whole number, without quotes\n"),
        ('[[rules]]\nmatch = "*"\nrank = true', "wrong type", "expected: a whole number\n"),
        ('[[rules]]\nmatch = "*"\nenergy = "0.5"', "wrong type", "expected: a number, without quotes\n"),
        ('split = "yes"\n[[rules]]\nmatch = "*"', "wrong type", "expected: true or false, without quotes\n"),
        ('[[rules]]\nmatch = "*"\nskip = 3', "wrong type", "expected: a string, in quotes\n"),
        ('[[rules]]\nmatch = "*"\nenergy = 1.5', "the energy makes no sense", "1.5"),
        ('[[rules]]\nmatch = "*"\nmax_rank = 8', "max_rank goes with an energy", ""),
        ('[[rules]]\nmatch = "*"\nview = "stak"', "view makes no sense", "did you mean 'stack'?"),
        ('convolutions = true\n[[rules]]\nmatch = "*"', "convolutions goes with refines", "refines = true, and families"),
        ('[[rules]]\nmatch = "*"\nslices = ["q"]', "two or more different names", ""),
        ('[[rules]]\nmatch = "*"\nslices = ["q", "q"]', "two or more different names", ""),
        ('[[rules]]\nmatch = "*"\nevery = "group"', "every goes with slices", ""),
        ('[[rules]]\nmatch = "*"\nslices = ["a", "b"]\naxis = "diagonals"', "axis makes no sense", "rows, columns"),
    ],
)
def test_bad_recipes(text: str, message: str, hint: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        planned(llama, recipe=_recipe(tmp_path, text))
    assert message in str(caught.value)
    assert hint in f"{caught.value}\n"


def test_recipes_that_are_not_there(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no recipe 'lama'") as caught:
        planned(llama, recipe="lama")
    assert "did you mean 'llama'?" in str(caught.value)
    with pytest.raises(OptionError, match=r"there is no file '\./nosuch'"):
        planned(llama, recipe="./nosuch")
    for name in (tmp_path / "nothing.toml", "x" * 5000, "~nobody-of-this-name/x.toml", "null\0byte"):
        with pytest.raises(
            SurgeryError, match=r"there is no (file|recipe)|can have this path|a user that is not known|name too long"
        ):
            planned(llama, recipe=name)


def test_a_recipe_for_another_family(llama: Path) -> None:
    with pytest.raises(OptionError, match="the recipe gpt2 takes no tensor") as caught:
        planned(llama, recipe="gpt2")
    assert "model.layers.0.mlp.up_proj.weight (not in the recipe gpt2)" in str(caught.value)


def test_a_rule_of_ones_own_that_matches_nothing_is_noted(llama: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, '[[rules]]\nmatch = "*.q_proj.weight"\n[[rules]]\nmatch = "*.qq_proj.weight"')
    (note,) = planned(llama, recipe=recipe, rank=4).notes
    assert "rule 2 (*.qq_proj.weight) decides on no tensor" in note
    assert not planned(llama, recipe="llama", rank=4).notes  # of a shipped one some rules are for others


@pytest.mark.parametrize(
    ("rule", "notes"),
    [
        (
            'match = "*.q_proj.weight"\nview = "stack"',
            ["2 of 6 tensors that the recipe names are passed over: a tensor of shape"],
        ),
        ('match = "*norm.weight"', ["5 of 9 tensors that the recipe names are passed over: a vector (norm, bias) (first: "]),
        ('match = "mtp.*"', ["recipe mine: rule 2 (mtp.*) takes no tensor: multi-token prediction, which loaders leave out"]),
        ('match = "*.q_proj.weight"\nskip = "as it is"', []),
    ],
)
def test_what_a_rule_names_and_does_not_take_is_noted(rule: str, notes: list[str], llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({**tensors_of(llama), "mtp.0.up.weight": torch.randn(48, 48)}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    text = f'[[rules]]\nmatch = "*.[kv]_proj.weight"\n[[rules]]\n{rule}'
    told = planned(folder, recipe=_recipe(tmp_path, text), rank=4).notes
    assert len(told) == len(notes)
    assert all(note.startswith(start) for note, start in zip(told, notes, strict=True))


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ("refines = true", "refines decides nothing in a model of the family llama, as there are no families"),
        ('refines = true\nfamilies = ["gpt2", "opt"]', "of the family llama, as families has gpt2, opt"),
        ('families = ["llama"]', "families decides nothing without refines = true"),
        ('refines = true\nfamilies = ["llama"]', None),
    ],
)
def test_keys_of_ones_own_that_decide_nothing_are_noted(keys: str, note: str | None, llama: Path, tmp_path: Path) -> None:
    """What no rule matches is a target as by default in the last of these alone."""
    recipe = _recipe(tmp_path, f'{keys}\n[[rules]]\nmatch = "*.q_proj.weight"')
    plan = planned(llama, recipe=recipe, rank=4)
    assert (plan.notes == ()) == (note is None)
    assert all(note in one for one in plan.notes if note)
    assert len(plan.targets) == (14 if note is None else 2)


def test_refines_in_a_model_of_no_family(llama: Path, tmp_path: Path) -> None:
    save_file(tensors_of(llama), tmp_path / "model.safetensors")
    plan = planned(tmp_path, recipe=_recipe(tmp_path, 'refines = true\n[[rules]]\nmatch = "*.q_proj.weight"'), rank=4)
    assert (len(plan.targets), plan.notes) == (14, ())


def test_a_recipe_that_narrows_names_no_norm(tmp_path: Path) -> None:
    folder = FAMILIES["bert"].save(tmp_path / "m")
    plan = planned(folder, recipe="attention", rank=2)
    assert any("attention.output.LayerNorm.weight" in item.tensor for item in plan.skipped)
    assert plan.notes == ()
    text = 'narrows = true\n[[rules]]\nmatch = "*.0.*query.weight"\nview = "stack"\n[[rules]]\nmatch = "*.attention.*"'
    (note,) = planned(folder, recipe=_recipe(tmp_path, text), rank=2).notes
    assert "1 of 8 tensors that would be targets are passed over: a tensor of shape [32, 32] is no stack" in note


@pytest.mark.parametrize(
    ("rules", "got", "hint"),
    [
        (
            '[[rules]]\nmatch = "*.q_proj.weight"\nview = "stack"',
            "model.layers.0.self_attn.q_proj.weight (a tensor of shape [48, 48] is no stack); model.layers.1",
            "correct rule 1 (*.q_proj.weight)",
        ),
        (
            '[[rules]]\nmatch = "lm_head*"\nskip = "as it is"\n[[rules]]\nmatch = "*.self_attn.q_proj.weigth"',
            "rule 2 (*.self_attn.q_proj.weigth) matches no tensor",
            "correct the pattern of rule 2",
        ),
        (
            "[[rules]]\nregex = '.*\\.self_attn\\.q_proj\\.weigth'",
            "rule 1 (.*\\.self_attn\\.q_proj\\.weigth) matches no tensor",
            "correct the pattern of rule 1",
        ),
        ('[[rules]]\nmatch = "*"\nskip = "as it is"', "rules with skip alone", "a rule without skip takes the tensors"),
        (
            '[[rules]]\nmatch = "*"\nskip = "as it is"\n[[rules]]\nmatch = "*.q_proj.weight"',
            "rule 2 (*.q_proj.weight): an earlier rule skips all that it matches",
            "put it before that rule",
        ),
    ],
)
def test_a_recipe_of_ones_own_that_takes_nothing(rules: str, got: str, hint: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the recipe mine takes no tensor") as caught:
        planned(llama, recipe=_recipe(tmp_path, rules))
    assert str(caught.value.got).startswith(got)
    assert str(caught.value.hint).startswith(hint)
    assert ("self_attn.q_proj.weight" in str(caught.value.expected)) == ("weigth" in got)


def test_split_where_nothing_is_fused_is_noted(llama: Path) -> None:
    (note,) = planned(llama, rank=4, split=True).notes
    assert "--split changes nothing" in note


def test_slices_that_do_not_add_up(tmp_path: Path) -> None:
    folder = FAMILIES["phi3"].save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    with pytest.raises(OptionError, match="do not add up") as caught:
        planned(folder, rank=4, split=True)
    assert "32 + 24 + 24 for a length of 64" in str(caught.value)
    assert "leave --split out, or correct the recipe" in str(caught.value)
    recipe = _recipe(tmp_path, '[[rules]]\nmatch = "*.qkv_proj.weight"\nslices = ["q", "k", "v"]\nsplit = true')
    with pytest.raises(OptionError, match="do not add up") as caught:
        planned(folder, rank=4, recipe=recipe)
    assert "give --no-split, or correct the recipe" in str(caught.value)
    assert planned(folder, rank=4, recipe=recipe, split=False).targets
    assert planned(folder, rank=4).targets  # as one matrix there is nothing to add up
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    with pytest.raises(OptionError, match="does not tell the number of attention heads"):
        planned(folder, rank=4, split=True)


def test_tied_head_is_taken_once(tmp_path: Path) -> None:
    weight = torch.randn(20, 8)
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    steps = planned(tmp_path, include=["*"], rank=2)
    assert [target.tensor for target in steps.targets] == ["lm_head.weight"]
    assert [alias.tensor for alias in steps.targets[0].aliases] == ["model.embed_tokens.weight"]
    assert steps.skipped == ()


@pytest.mark.parametrize("flag", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
@pytest.mark.parametrize("head", ["language_model.lm_head.weight", "proj_out.weight", "cls.predictions.decoder.weight"])
def test_tied_heads_by_other_names(head: str, flag: dict[str, object], tmp_path: Path) -> None:
    weight = torch.randn(20, 8)
    save_file({"embed.weight": weight, head: weight.clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(flag))
    (target,) = planned(tmp_path, include=["*"], rank=2).targets
    assert {target.tensor, *(alias.tensor for alias in target.aliases)} == {"embed.weight", head}


def test_gpt2_without_the_prefix_of_a_head(tmp_path: Path) -> None:
    """As the first GPT-2 checkpoints have their names."""
    folder = FAMILIES["gpt2"].save(tmp_path / "m")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors")
    steps = planned(folder, rank=2)
    assert steps.recipe == "gpt2"
    assert _endings(steps) | {t.tensor.removeprefix("h.0.").removesuffix(".weight") for t in steps.targets} >= {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    }
    assert len(steps.targets) == 8


@pytest.mark.parametrize("value", ["abc", [8], 8.5, -8, float("nan"), True, 10**30])
def test_sizes_in_the_config_that_are_none(value: object, tmp_path: Path) -> None:
    folder = FAMILIES["gpt_neox"].save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for name in ("head_dim", "num_attention_heads", "num_key_value_heads"):
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        try:
            steps = planned(folder, rank=2, split=True)
        except OptionError:
            continue
        assert all(min(target.matrices) >= 1 for target in steps.targets)


def test_a_slice_of_one_row_is_passed_over_with_a_reason(tmp_path: Path) -> None:
    folder = FAMILIES["phi3"].save(tmp_path / "m")
    tensors = tensors_of(folder)
    for name in [name for name in tensors if "qkv_proj" in name]:
        tensors[name] = tensors[name][:34].clone()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 1}
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    steps = planned(folder, rank=2, split=True)
    skipped = {item.tensor: item.reason for item in steps.skipped}
    assert skipped["model.layers.0.self_attn.qkv_proj.weight[k]"] == "a single row or column"
    assert "model.layers.0.self_attn.qkv_proj.weight[q]" in {target.key for target in steps.targets}


@pytest.mark.parametrize(
    "options", [{"rank": 4.0}, {"rank": "4"}, {"rank": True}, {"energy": "0.5"}, {"energy": 0.5, "max_rank": 3.5}]
)
def test_numbers_that_are_none(options: dict[str, object], llama: Path) -> None:
    with pytest.raises(OptionError, match=r"plan\(\) cannot take this as"):
        planned(llama, **options)  # type: ignore[arg-type]


def test_the_documentation_describes_the_format(tmp_path: Path) -> None:
    """Its example is a recipe, and every key is in its tables."""
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    recipe = read_recipe(tmp_path / "example.toml")
    assert [rule.skip is not None for rule in recipe.rules] == [True, False, False]
    for key in (*RECIPE_KEYS, *RULE_KEYS):
        assert f"`{key}`" in page, key


@pytest.mark.parametrize(
    "rule",
    [
        r"regex = '([a-z._0-9]+)+X'",
        r"regex = '(.*a.*|.*o.*)*!'",
        r"regex = '(\w*\.?)*!'",
        "regex = '" + ".*o" * 300 + "!'",
        "match = '" + "*o" * 300 + "!'",
        "match = [" + ", ".join(["'" + "[" * 9000 + "'"] * 10) + "]",
    ],
)
def test_patterns_take_bounded_time(rule: str, llama: Path, tmp_path: Path) -> None:
    """They fit nothing here, after however many ways to find out."""
    started = time.perf_counter()
    plan = planned(llama, recipe=_recipe(tmp_path, f"[[rules]]\nmatch = '*q_proj*'\n[[rules]]\n{rule}\nrank = 3"), rank=2)
    assert {target.rank for target in plan.targets} == {2}
    assert time.perf_counter() - started < 20


def test_shipped_recipes_on_names_of_strangers() -> None:
    """Names are as long as a header lets them be."""
    started = time.perf_counter()
    for recipe in builtin_recipes().values():
        for part in ("mlp.", "attn.", "a", ".", "model.layers.1.self_attn.", "experts.1.", "\n"):
            assert recipe.rule_for(part * (20_000 // len(part)) + "!") is None
    assert time.perf_counter() - started < 60


def test_names_of_strangers_take_bounded_time(tmp_path: Path) -> None:
    """A name may have any length and any character; here each part looks like a trace of quantization."""
    name = ".weight.quant_state." * 5_000 + "\n"
    save_file({name: torch.ones(2), "layers.0.a.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    started = time.perf_counter()
    assert [target.tensor for target in planned(tmp_path, rank=2).targets] == ["layers.0.a.weight"]
    assert time.perf_counter() - started < 20
