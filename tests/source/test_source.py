"""Models as they lie on disks and on the hub: incomplete, with other things beside them, behind links."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import FormatError, OutputError, SourceError, SurgeryError, SurgeryWarning
from surgery.planning.numbering import numbering_notes
from surgery.progress import Silent
from surgery.shards.factorize_shard import check_shared
from surgery.source.open import open_source
from tests.loopback_hub import WRITING_TOKEN, LoopbackHub
from tests.models import files_of, planned, save_llama, tensors_of

# PEFT asks transformers for an attribute that has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama in three shards, to be changed."""
    shutil.copytree(llama, tmp_path / "m")
    return tmp_path / "m"


def _logits(folder: Path, **options: Any) -> torch.Tensor:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return loaded(IDS).logits  # type: ignore[no-any-return]


def _there_and_back(model: Path, work: Path) -> tuple[Path, Path]:
    surgery.factorize(model, work / "f", rank=4)
    surgery.fold(work / "f", work / "f/surgery/scales.safetensors", work / "back")
    return work / "f", work / "back"


def _plan(model: Path) -> surgery.Plan:
    return planned(model, rank=4)


# -- which of several ---------------------------------------------------------------------------------------------------------


def _older(*files: Path) -> None:
    for file in files:
        os.utime(file, (1e9, 1e9))


@pytest.mark.parametrize("newer", ["single", "shards"])
def test_one_file_beside_shards_is_read_as_transformers_reads_it(newer: str, model: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", torch.bfloat16, shard_size="1GB", rope_theta=7.0)
    _edit_shard(other / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(3))
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    _older(*model.glob("model-*") if newer == "single" else [model / "model.safetensors"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert loaded["model.norm.weight"].unique().tolist() == [3.0]
    steps = _plan(model)
    assert [shard.file for shard in steps.shards] == ["model.safetensors"]
    assert any("not read: model-00001-of-00003" in note for note in steps.notes)
    told = [note for note in steps.notes if "is newer than" in note]
    assert len(told) == (newer == "shards")
    assert all("newer than model.safetensors, which is read" in note for note in told)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.fp32-00001-of-00001.safetensors", False),  # as of whisper-large-v3
        ("model.fp16.safetensors", False),
        ("mmproj.safetensors", False),
        ("model (1).safetensors", True),
        ("model-00001-of-00001.safetensors", True),
    ],
)
def test_what_is_no_other_save_of_the_model_may_be_newer(name: str, told: bool, tmp_path: Path) -> None:
    """As a download leaves them, one after the other."""
    model = save_llama(tmp_path / "m", torch.bfloat16, shard_size="1GB")
    shutil.copy(model / "model.safetensors", model / name)
    _older(model / "model.safetensors")
    notes = _plan(model).notes
    assert any(f"not read: {name}" in note for note in notes)
    assert any(f"{name} is newer than model.safetensors" in note for note in notes) is told


@pytest.mark.parametrize("indexed", [True, False])
def test_one_file_beside_shards_is_read_as_diffusers_reads_it(indexed: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "embedding_dim": 32, "num_embeddings": 2}
    torch.manual_seed(0)
    one = diffusers.PriorTransformer(**sizes, additional_embeddings=2)
    one.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shards = {path.name for path in (tmp_path / "m").glob("*-of-*.safetensors")}
    assert len(shards) > 1
    with torch.no_grad():
        one.proj_in.weight.zero_()
    one.save_pretrained(tmp_path / "single")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "single" / name, tmp_path / "m" / name)
    if not indexed:
        (tmp_path / "m" / f"{name}.index.json").unlink()
    read = diffusers.PriorTransformer.from_pretrained(tmp_path / "m", low_cpu_mem_usage=False)
    assert bool(read.proj_in.weight.any()) is indexed
    assert {shard.file for shard in _plan(tmp_path / "m").shards} == (shards if indexed else {name})


def test_an_index_of_an_earlier_save(model: Path, tmp_path: Path) -> None:
    """transformers follows it and fails; without it the shards are taken."""
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] = {name: shard.replace("-of-00003", "-of-00007") for name, shard in index["weight_map"].items()}
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(OSError, match="of-00007"):
        transformers.AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(FormatError, match="remove it to take"):
        _plan(model)
    (model / INDEX).unlink()
    assert len(_plan(model).targets) == 14


def test_weights_of_something_else(model: Path, factorized: Path, tmp_path: Path) -> None:
    run = tmp_path / "checkpoint-100"
    run.mkdir()
    shutil.copy(factorized / "surgery/scales.safetensors", run / "scales.safetensors")
    with pytest.raises(SourceError, match="holds scales and no model"):
        _plan(run)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SourceError, match="holds an adapter and no safetensors weights") as caught:
        _plan(tmp_path / "adapter")
    assert f"surgery factorize {model}" in str(caught.value)
    assert f"surgery fold FACTORIZED SCALES --lora {tmp_path / 'adapter'}" in str(caught.value)
    kohya = {
        f"lora_unet_down_{i}.{part}": torch.ones(4, 4) for i in range(3) for part in ("lora_down.weight", "lora_up.weight")
    }
    (tmp_path / "kohya").mkdir()
    save_file(kohya | {"lora_unet_down_0.alpha": torch.tensor(1.0)}, tmp_path / "kohya/style.safetensors")
    with pytest.raises(SourceError, match="holds a LoRA adapter and no weights"):
        _plan(tmp_path / "kohya")


def test_a_folder_as_a_mac_has_it(model: Path, tmp_path: Path) -> None:
    _, plain = _there_and_back(model, tmp_path / "plain")
    for folder in (model, model / "additional_chat_templates"):
        for name in ("._model-00001-of-00003.safetensors", f"._{INDEX}", "._config.json", "._x.jinja", ".DS_Store"):
            (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    out = tmp_path / "seen"
    for folder in (out / "f", out / "back"):
        folder.mkdir(parents=True)
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    f, back = _there_and_back(model, out)
    assert {name for name in files_of(back) if name != ".DS_Store"} == files_of(plain).keys()
    assert {name: data for name, data in files_of(back).items() if name != ".DS_Store"} == files_of(plain)
    progress = Silent()
    surgery.fold(f, f / "surgery/scales.safetensors", back, progress=progress)  # done again, and compared
    surgery.fold(f, f / "surgery/scales.safetensors", back, overwrite=True)
    assert (back / ".DS_Store").exists()


def test_the_folder_in_which_the_hubs_client_keeps_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--it"
    (folder / "snapshots/0123abc").mkdir(parents=True)
    with pytest.raises(SourceError, match="is where the hub's client keeps me/it") as caught:
        _plan(folder)
    assert "give me/it --revision 0123abc" in str(caught.value)


def test_a_source_in_the_current_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    before = files_of(model)
    ran = CliRunner().invoke(main, ["factorize", ".", "--rank", "4", "-q"])
    assert ran.exit_code == 1
    command = ran.stderr.partition("try:      ")[2].partition(";")[0]
    assert command == "-o ../m-factorized"
    assert CliRunner().invoke(main, ["factorize", ".", "--rank", "4", "-q", *command.split()]).exit_code == 0
    assert files_of(model) == before
    # A result that somebody has moved into the model is no part of it, and no model to be taken.
    expected = files_of(tmp_path / "m-factorized")
    (tmp_path / "m-factorized").rename(model / "factorized")
    monkeypatch.chdir(tmp_path)
    again = surgery.factorize(model, tmp_path / "again", rank=4).manifest
    assert [record.reason for record in again.left_out if record.file == "factorized/"] == ["no loader looks for it"]
    assert {name for name in files_of(tmp_path / "again") if not name.endswith("manifest.json")} == {
        name for name in expected if not name.endswith("manifest.json")
    }


# -- one whole model ---------------------------------------------------------------------------------------------------------


def test_a_numbered_shard_that_is_missing(model: Path, tmp_path: Path) -> None:
    (model / INDEX).unlink()
    assert len(_plan(model).targets) == 14
    (model / "model-00002-of-00003.safetensors").unlink()
    for run in (_plan, lambda m: surgery.factorize(m, tmp_path / "f", rank=4)):
        with pytest.raises(FormatError, match=r"lacks the weight file model-00002-of-00003\.safetensors"):
            run(model)
    assert not (tmp_path / "f").exists()


def test_an_index_that_names_too_few(model: Path, tmp_path: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    left = "model-00003-of-00003.safetensors"
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != left}
    (model / INDEX).write_text(json.dumps(index))
    progress = Silent()
    manifest = surgery.factorize(model, tmp_path / "f", rank=4, progress=progress).manifest
    assert any(left in note and "not read" in note for note in progress.notes)
    assert left in {record.file for record in manifest.left_out}
    # Not even on the disk: the numbering tells.
    (model / left).unlink()
    with pytest.raises(FormatError, match=f"lacks the weight file {left}"):
        _plan(model)


def _without(model: Path, gone: Callable[[str], bool]) -> tuple[str, ...]:
    """The notes on a model in one file without some of its tensors."""
    tensors = {name: tensor for name, tensor in tensors_of(model).items() if not gone(name)}
    for file in (*model.glob("*.safetensors"), *model.glob(INDEX)):
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    return _plan(model).notes


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ((1,), "of model.layers.0 to model.layers.3 there is no model.layers.1"),
        ((1, 2), "there is no model.layers.1, nor 1 others"),
        ((0,), "there is no model.layers.0"),
        ((3,), "speaks of 4 layers, and no list of layers among the weights is longer than 3"),
        ((), ""),
    ],
)
def test_holes_in_the_numbering_of_layers(gone: tuple[int, ...], said: str, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.bfloat16, num_hidden_layers=4)
    notes = _without(model, lambda name: name.startswith(tuple(f"model.layers.{i}." for i in gone)))
    assert [said in note for note in notes] == ([True] if gone else [])


def test_holes_in_other_lists(tmp_path: Path) -> None:
    for names, said in (
        (("layers.0.w.weight", "layers.2.w.weight"), "there is no layers.1"),
        (("h.1.attn.weight", "h.2.attn.weight"), "there is no h.0"),
        (("x.layers.0.e.experts.0.up.weight", "x.layers.0.e.experts.0.down.weight", "x.layers.0.e.experts.5.up.weight",
          "x.layers.0.e.experts.5.down.weight"), "there is no x.layers.0.e.experts.1, nor 3 others"),
        (("layers.0.w.weight", "layers.999999999.w.weight"), "nor 999999997 others"),
    ):  # fmt: skip
        save_file({name: torch.randn(4, 4) for name in names}, tmp_path / "model.safetensors")
        (note,) = planned(tmp_path, rank=2, include=["*"]).notes
        assert said in note


def test_numbers_without_weights_are_no_holes(tmp_path: Path) -> None:
    """An activation between layers has a number and no weight."""
    save_file(
        {
            f"layers.0.{part}": torch.randn(8, 8)
            for part in ("ff.0.weight", "ff.2.weight", "net.1.conv.a.weight", "net.3.b.weight")
        },
        tmp_path / "model.safetensors",
    )
    assert _plan(tmp_path).notes == ()


@pytest.mark.parametrize("name", ["albert", "clap", "encodec", "hrm_text", "pp_doclayout_v3", "rt_detr", "swin"])
def test_the_numbering_of_whole_models_has_no_holes(name: str) -> None:
    """As transformers builds them: layers that are run several times, activations between convolutions, counts of all parts."""
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {name}")
    config = transformers.AutoConfig.for_model(name)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert numbering_notes(model.state_dict(), json.loads(config.to_json_string(use_diff=False))) == []


# -- as the reference readers read it ----------------------------------------------------------------------------------------


def _edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_index_entries_that_no_shard_has(model: Path, tmp_path: Path) -> None:
    truth = _logits(model)
    index = json.loads((model / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.ghost.weight"] = shards[0]
    moved = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][moved] = shards[1]
    (model / INDEX).write_text(json.dumps(index))
    assert torch.equal(_logits(model), truth)
    notes = _plan(model).notes
    assert any("no shard holds: 1, the first model.layers.0.ghost.weight" in note for note in notes)
    assert any(f"another shard than the tensor is in: 1, the first {moved}" in note for note in notes)
    with pytest.warns(SurgeryWarning, match=r"model\.safetensors\.index\.json names"):
        _, back = _there_and_back(model, tmp_path)
    assert files_of(back) == files_of(model)
    assert torch.equal(_logits(back), truth)


@pytest.mark.filterwarnings("ignore:.*in several weight files:surgery.SurgeryWarning")
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
@pytest.mark.parametrize("indexed", [True, False])
def test_the_same_tensor_in_several_shards(name: str, indexed: bool, model: Path, tmp_path: Path) -> None:
    """No target, so that no copy can be older than another, whichever a loader takes."""
    truth = _logits(model)
    place = json.loads((model / INDEX).read_text())["weight_map"][name]
    tensor = load_file(model / place)[name]
    others = [path for path in sorted(model.glob("*.safetensors")) if path.name != place]
    for path in others:
        _edit_shard(path, lambda tensors: tensors.update({name: tensor}))
    assert torch.equal(_logits(model), truth)
    if not indexed:
        (model / INDEX).unlink()
    steps = _plan(model)
    assert [item.reason.split(":")[0] for item in steps.skipped if item.tensor == name] == ["in several weight files"] * 3
    assert name not in {target.tensor for target in steps.targets}
    there = sum(target.entries for target in steps.targets)
    is_wanted = "layers" in name and tensor.ndim == 2
    assert steps.reached == pytest.approx(there / (there + tensor.numel()) if is_wanted else 1, rel=1e-12)
    assert any("several weight files" in note for note in steps.notes) == is_wanted
    _, back = _there_and_back(model, tmp_path)
    assert files_of(back) == files_of(model)
    # Where they differ, transformers takes the last one and says nothing.
    _edit_shard(others[0], lambda tensors: tensors.update({name: tensor + 1}))
    with pytest.raises(FormatError, match=f"'{name}' is in two shards, and not the same in both"):
        _plan(model)
    _edit_shard(others[0], lambda tensors: tensors.update({name: tensor[:1]}))
    with pytest.raises(FormatError, match="is in two shards"):
        _plan(model)


@pytest.mark.filterwarnings("ignore:.*in several weight files:surgery.SurgeryWarning")
def test_what_is_tied_to_a_tensor_in_several_shards(tmp_path: Path) -> None:
    """Is no target either: one parameter could not be edited in all its places."""
    model = save_llama(tmp_path / "m", torch.bfloat16, tie_word_embeddings=True)
    shards = sorted(model.glob("*.safetensors"))
    embedding = tensors_of(model)["model.embed_tokens.weight"]
    for path in shards[:2]:
        _edit_shard(path, lambda tensors: tensors.update({"model.embed_tokens.weight": embedding}))
    _edit_shard(shards[2], lambda tensors: tensors.update({"lm_head.weight": embedding}))
    manifest = surgery.factorize(model, tmp_path / "f", rank=4, include=["lm_head.weight", "*q_proj*"]).manifest
    assert {target.tensor.split(".")[-2] for target in manifest.targets} == {"q_proj"}
    assert "lm_head.weight" in {item.tensor for item in manifest.skipped}


def test_metadata_that_is_null(model: Path, tmp_path: Path) -> None:
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = {**json.loads(data[8 : 8 + length]), "__metadata__": None}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        tensors |= load_file(path)
    factorized, back = _there_and_back(model, tmp_path)
    assert files_of(back) == files_of(model)
    assert tensors_of(factorized).keys() == tensors.keys()


# -- what goes along ---------------------------------------------------------------------------------------------------------


def _make_output_folder(model: Path) -> None:
    """What trainers and people leave beside a model."""
    shutil.copytree(model, model.parent / "copy")
    shutil.move(model.parent / "copy", model / "checkpoint-100")
    for name in ("wandb/run-1/files/x.json", "runs/events", ".git/config", ".cache/x", "data/train.parquet", "a/b/c/d.txt"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("private")
    for name in (
        ".env",
        "train.jsonl",
        "config.json.bak",
        "trainer_state.json",
        "__0_0.distcp",
        "training_args.bin",
        "notes.txt",
    ):
        (model / name).write_text("private")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub client sends a file so
def test_an_output_folder_of_a_trainer(model: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITING_TOKEN)
    before = files_of(model)
    _make_output_folder(model)
    repo = hub.create("acme/output-folder", private=True)
    with pytest.warns(SurgeryWarning, match=r"uploaded to .*/acme/output-folder \(private\)"):
        manifest = surgery.factorize(model, tmp_path / "f", rank=4, push_to_hub="acme/output-folder").manifest
    left = {record.file for record in manifest.left_out}
    assert left == {
        "checkpoint-100/", "wandb/", "runs/", ".git/", ".cache/", "data/", "a/", ".env", "train.jsonl", "config.json.bak",
        "trainer_state.json", "__0_0.distcp", "training_args.bin", "notes.txt",
    }  # fmt: skip
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == before
    for folder in (tmp_path / "f", repo.folder):
        ours = {name for name in files_of(folder) if not name.startswith("surgery/")}
        assert ours - {"README.md", ".gitattributes"} == before.keys()


def test_the_plan_says_what_goes_along_and_what_stays(model: Path) -> None:
    along = {name: data for name, data in files_of(model).items() if not name.endswith(".safetensors")}
    _make_output_folder(model)
    shown = CliRunner().invoke(main, ["plan", str(model), "--json"])
    parsed = json.loads(shown.stdout)
    assert (parsed["files_along"], parsed["bytes_along"]) == (len(along), sum(map(len, along.values())))
    assert {"file": "checkpoint-100/", "reason": "left by a training run"} in parsed["left_out"]
    text = CliRunner().invoke(main, ["plan", str(model)]).stdout
    assert f"{len(along)} other files are copied, " in text
    assert "14 files and folders are left out" in text
    assert ".cache/, .env, .git/" in text
    every = CliRunner().invoke(main, ["plan", str(model), "--all"]).stdout
    assert all(entry["file"] in every for entry in parsed["left_out"])


def test_an_adapter_beside_the_weights(model: Path, tmp_path: Path) -> None:
    """What transformers makes of the results is the model without its adapter."""
    truth = _logits(model)
    adapted = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, model)
    assert not torch.equal(_logits(model), truth)
    notes = _plan(model).notes
    assert any("adapter_config.json, adapter_model.safetensors" in note for note in notes)
    with pytest.warns(SurgeryWarning, match="adapter_config.json, adapter_model.safetensors"):
        factorized, back = _there_and_back(model, tmp_path)
    assert torch.equal(_logits(back), truth)
    assert _logits(factorized).shape == truth.shape
    with pytest.raises(SourceError, match="holds an adapter and no safetensors weights"):
        _plan(tmp_path / "adapter")


MODELING = """
from transformers import LlamaForCausalLM
from .scale import factor

class Own(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * factor()
        return out
"""


def test_code_of_the_models_own(model: Path, tmp_path: Path) -> None:
    """A model whose class is in its folder."""
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_own.py").write_text(MODELING)
    (model / "scale.py").write_text("def factor():\n    return 2\n")
    (model / "unrelated").mkdir()
    (model / "unrelated/x.py").write_text("private")
    _, back = _there_and_back(model, tmp_path)
    assert files_of(model).keys() - files_of(back).keys() == {"unrelated/x.py"}
    assert type(transformers.AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True)).__name__ == "Own"
    assert torch.equal(_logits(back, trust_remote_code=True), 2 * _logits(back, trust_remote_code=False))


def test_modules_with_weights_of_their_own(model: Path, tmp_path: Path) -> None:
    """As sentence-transformers lays them out: what modules.json names goes along whole."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "a"}, {"idx": 1, "name": "1", "path": "1_Dense", "type": "b"}]
    (model / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Dense", "2_Dense"):
        (model / name).mkdir()
        (model / name / "config.json").write_text("{}")
        save_file({"linear.weight": torch.eye(4)}, model / name / "model.safetensors")
    _, back = _there_and_back(model, tmp_path)
    assert files_of(back) == {name: data for name, data in files_of(model).items() if not name.startswith("2_Dense/")}


def test_a_processor_with_two_tokenizers(model: Path, tmp_path: Path) -> None:
    """Without its folder transformers takes the first tokenizer for both."""

    def tokenizer(*words: str) -> transformers.PreTrainedTokenizerFast:
        of_words = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
        made = tokenizers.Tokenizer(of_words)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
        return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0])

    # The one that needs no torchvision; in older versions the only one.
    image_processor = getattr(transformers, "BlipImageProcessorPil", transformers.BlipImageProcessor)()
    for_query = tokenizer("?", "b", "a")
    processor = transformers.InstructBlipProcessor(image_processor, tokenizer("?", "a", "b"), qformer_tokenizer=for_query)
    shutil.rmtree(model / "additional_chat_templates")  # of any bytes
    processor.save_pretrained(model)
    made, back = _there_and_back(model, tmp_path)
    for folder in (made, back):
        loaded = transformers.AutoProcessor.from_pretrained(folder)
        assert loaded.tokenizer("a b").input_ids == [1, 2]
        assert loaded.qformer_tokenizer("a b").input_ids == [2, 1]


@pytest.mark.skipif(os.name == "nt", reason="names that Windows cannot have")
def test_names_that_other_systems_cannot_have(model: Path, tmp_path: Path) -> None:
    """Of files that stay behind anyway."""
    odd = {"12:30.log", "a\\b.txt"}
    for name in odd:
        (model / name).write_text("x")
    (model / "run 7:5").mkdir()
    made, back = _there_and_back(model, tmp_path)
    left_out = {record.file: record.reason for record in surgery.Manifest.read(made).left_out}
    assert left_out == dict.fromkeys((*odd, "run 7:5/"), "a name that not every system allows")
    assert files_of(model).keys() - files_of(back).keys() == odd
    (model / "vocab:en.json").write_text("{}")
    with pytest.raises(FormatError, match="a path that leaves its folder"):
        _plan(model)


# -- links -------------------------------------------------------------------------------------------------------------------


def _cached(model: Path, cache: Path) -> Path:
    """A snapshot in the layout of the hub's cache."""
    snapshot = cache / "models--acme--m/snapshots/0123"
    for i, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = cache / "models--acme--m/blobs" / str(i)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def _linked(model: Path, folder: Path, *, relative: bool) -> Path:
    for path in sorted(path for path in model.rglob("*") if not path.is_dir()):
        link = folder / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent) if relative else path)
    return folder


@pytest.mark.parametrize(
    "how", ["by its path", "a link", "a link to a link", "links to blobs", "relative links to links", "shared"]
)
def test_the_hubs_cache(how: str, model: Path, tmp_path: Path) -> None:
    snapshot = _cached(model, tmp_path / "cache")
    given = tmp_path / "given"
    if how == "by its path":
        given = snapshot
    elif how == "links to blobs":
        for path in (path for path in sorted(snapshot.rglob("*")) if path.is_symlink()):
            (given / path.relative_to(snapshot)).parent.mkdir(parents=True, exist_ok=True)
            (given / path.relative_to(snapshot)).symlink_to(path.resolve())
    elif how == "relative links to links":
        _linked(snapshot, given, relative=True)
    elif how == "shared":  # between repositories: a blob is itself a link
        store = tmp_path / "cache/blobs/00"
        store.mkdir(parents=True)
        (store.parent / ".huggingface-shared-blobs").write_text("1\n")
        for blob in sorted((tmp_path / "cache/models--acme--m/blobs").iterdir()):
            shutil.move(blob, store / blob.name)
            blob.symlink_to(store / blob.name)
        given = snapshot
    else:
        target = snapshot
        if how == "a link to a link":
            (tmp_path / "first").symlink_to(snapshot)
            target = tmp_path / "first"
        given.symlink_to(target, target_is_directory=True)
    _, back = _there_and_back(given, tmp_path)
    assert files_of(back) == files_of(model)
    for out in (given / "f", snapshot / "f", tmp_path / "cache/models--acme--m/blobs/f", tmp_path / "cache"):
        with pytest.raises(OutputError, match="one lies in the other"):
            surgery.factorize(given, out, rank=4)


def test_weights_may_lie_anywhere(model: Path, tmp_path: Path) -> None:
    truth = files_of(model)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in sorted(model.glob("*.safetensors")):
        shutil.move(path, elsewhere)
        path.symlink_to(elsewhere / path.name)
    _, back = _there_and_back(model, tmp_path)
    assert files_of(back) == truth
    for out in (elsewhere, elsewhere / "f"):
        with pytest.raises(OutputError, match="one lies in the other"):
            surgery.factorize(model, out, rank=4, overwrite=True)
    surgery.factorize(model, tmp_path / "o", rank=4, layout="overlay")
    with pytest.raises(OutputError, match="the model that the checkpoint was made from"):
        surgery.fold(tmp_path / "o", tmp_path / "o/surgery/scales.safetensors", elsewhere, base=model, overwrite=True)
    assert files_of(model) == truth


def test_another_machine_that_sees_another_folder(model: Path, tmp_path: Path) -> None:
    """What is sent to it says what the weight files must be, before and after they are read."""
    source = open_source(model)
    file = source.selection.shards[0]
    origin = pickle.loads(pickle.dumps(source.origin([file])))
    with origin.file(file) as path:
        assert path.read_bytes() == (model / file).read_bytes()
    changed = pytest.raises(SourceError, match=rf"{file} on .* is not what it was when the run was planned")
    with changed, origin.file(file) as path:
        os.utime(path, (1e9, 1e9))
    with changed, origin.file(file):
        raise AssertionError("it is read")
    (model / file).unlink()
    with pytest.raises(SourceError, match=rf"{file} is not there on .*\n.*every machine sees"), origin.file(file):
        raise AssertionError("it is read")
    with pytest.raises(OutputError, match=r"not the output folder of this run\n.*every machine sees"):
        check_shared(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json", "additional_chat_templates/x.jinja"])
def test_what_is_copied_stays_in_the_folder(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=f"{name} is a link that leaves the model's folder"):
        _plan(model)


def test_folders_that_are_links(model: Path, tmp_path: Path) -> None:
    (tmp_path / "huge").mkdir()
    (model / "data").symlink_to(tmp_path / "huge")  # left out, so nobody's business
    (model / "root").symlink_to("/")
    (model / "circle").symlink_to(model)
    assert {"data/", "root/", "circle/"} <= _plan(model).left_out.keys()
    for target in (tmp_path / "huge", model, Path("/")):
        (model / "modules.json").write_text('[{"path": "1_Pooling", "type": "x"}]')
        (model / "1_Pooling").symlink_to(target)
        with pytest.raises(SourceError, match="is a link"):
            _plan(model)
        (model / "1_Pooling").unlink()
    (model / "inside").mkdir()
    (model / "inside/config.json").write_text("{}")
    (model / "1_Pooling").symlink_to("inside")
    surgery.factorize(model, tmp_path / "f", rank=4)
    assert (tmp_path / "f/1_Pooling/config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json", INDEX, "config.json"])
def test_links_that_lead_nowhere(name: str, model: Path) -> None:
    for target in ("gone", name):  # or to themselves
        (model / name).unlink()
        (model / name).symlink_to(target)
        with pytest.raises(SourceError, match=f"{name} is a link that leads nowhere"):
            _plan(model)
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(SurgeryError, match=rf"{name}: is no ordinary file"):
        _plan(model)


# -- a folder called surgery/ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.py", "deep/x.json", "config.json", "scales.txt"])
def test_a_folder_of_that_name_in_the_source(name: str, model: Path, tmp_path: Path) -> None:
    truth = files_of(model)
    (model / "surgery" / name).parent.mkdir(parents=True)
    (model / "surgery" / name).write_text("")
    factorized, back = _there_and_back(model, tmp_path)
    assert surgery.Manifest.read(factorized).left_out == [
        surgery.format.manifest.LeftOutRecord("surgery/", "no loader looks for it")
    ]
    assert files_of(back) == truth


def test_a_factorized_checkpoint_as_the_model(factorized: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is itself a factorized checkpoint"):
        surgery.factorize(factorized, tmp_path / "f", rank=4)


def test_a_manifest_that_could_not_be_read_again_is_not_written(factorized: Path, tmp_path: Path) -> None:
    """Reader and writer share one rule, whatever it is that is wrong."""
    import dataclasses

    manifest = surgery.Manifest.read(factorized)
    for change in (
        {"files": [*manifest.files, dataclasses.replace(manifest.files[0], file="surgery/notes.py")]},
        {"files": [*manifest.files, dataclasses.replace(manifest.files[0], file="x.partial")]},
        {"targets": [*manifest.targets, manifest.targets[0]]},
    ):
        with pytest.raises(FormatError):
            dataclasses.replace(manifest, **change).write(tmp_path)
        assert not list(tmp_path.rglob("*"))


# -- several models at the top -----------------------------------------------------------------------------------------------


def test_several_models_at_the_top_of_a_repository(model: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """Here and on the hub alike."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(model, pipeline / "unet")
    (pipeline / "model_index.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, pipeline / "sd_xl_base_1.0.safetensors")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("model.fp16.safetensors", "model.bf16.safetensors"):
        save_file({"layers.0.a.weight": torch.randn(4, 4)}, two / name)
    for folder, message in ((pipeline, "--subfolder unet"), (two, "model.bf16.safetensors, model.fp16.safetensors")):
        hub.publish(f"acme/top-{folder.name}", folder)
        for given in (folder, f"acme/top-{folder.name}"):
            with pytest.raises(SourceError, match=message):
                surgery.plan(given)
