"""The plan as text: its rows, and what it says of slices and of other files."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file

from surgery.cli.report import plan_text
from tests.families import FAMILIES
from tests.models import planned, tensors_of


def _rows(text: str) -> list[list[str]]:
    """The rows of all tables of a plan, as their cells."""
    return [re.split(r"  +", line) for line in text.splitlines() if re.match(r"\d+  ", line)]


def test_a_row_of_one_tensor_has_its_whole_name(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    first = "the first layer stays as it is"
    recipe.write_text(f'[[rules]]\nmatch = "model.layers.0.*"\nskip = "{first}"\n[[rules]]\nmatch = "*.[qk]_proj.weight"')
    plan = planned(llama, recipe=recipe, rank=4)
    rows = _rows(plan_text(plan, 1.0, every=False))
    names = {target.tensor for target in plan.targets} | {item.tensor for item in plan.skipped}
    assert all((row[1] in names) == (row[0] == "1") for row in rows)
    assert ["1", "model.layers.1.self_attn.q_proj.weight", "48x48", "matrix", "BF16", "4"] in rows
    assert ["2", "model.layers.*.input_layernorm.weight", "a vector (norm, bias)"] in rows
    # Those of one glob stand together.
    at = rows.index(["1", "model.layers.0.mlp.up_proj.weight", first])
    beside = ["1", "model.layers.1.mlp.up_proj.weight", "not in the recipe mine"]
    assert beside in (rows[at - 1], rows[at + 1])
    every = _rows(plan_text(plan, 1.0, every=True))
    assert {row[1] for row in every} == names
    assert sum(int(row[0]) for row in rows) == len(every) == len(names)


def test_slices_are_shown_with_the_size_of_their_matrices(tmp_path: Path) -> None:
    seen = {}
    for family in ("phi3", "gpt_oss"):
        plan = planned(FAMILIES[family].save(tmp_path / family), rank=2, split=True)
        seen |= {row[1]: row[3] for row in _rows(plan_text(plan, 1.0, every=False)) if "[" in row[1]}
    assert seen["model.layers.*.self_attn.qkv_proj.weight[q]"] == "matrix, 32x32"
    assert seen["model.layers.*.mlp.experts.gate_up_proj[up]"] == "stack, 4x32x48"


def test_one_other_file(llama: Path, tmp_path: Path) -> None:
    save_file(tensors_of(llama), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "train.jsonl").write_text("{}")
    plan = planned(tmp_path, rank=4)
    assert (plan.files_along, [*plan.left_out]) == (1, ["train.jsonl"])
    assert re.search(r"^1 other file is copied, .*; 1 file or folder is left out$", plan_text(plan, 1.0, every=False), re.M)
