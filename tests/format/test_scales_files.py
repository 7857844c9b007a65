"""Scales files as trainings leave them: other names, dtypes and shapes, other things in them, and what is none."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.commands.scales import show_scales
from surgery.errors import FormatError, ScalesError, SurgeryWarning
from surgery.format.manifest import Manifest
from surgery.format.name_map import match_names
from surgery.format.scales.reading import read_scales
from surgery.format.scales.writing import write_scales
from tests.models import files_of, tensors_of

Tensors = dict[str, torch.Tensor]

# PEFT asks transformers for an attribute that has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def manifest(factorized: Path) -> Manifest:
    return Manifest.read(factorized)


@pytest.fixture(scope="module")
def trained(manifest: Manifest) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {target.key: 1 + 0.3 * torch.randn(target.scales_shape, generator=generator) for target in manifest.targets}


@pytest.fixture(scope="module")
def folded(factorized: Path, trained: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the scales give under their own names. Read-only."""
    out = tmp_path_factory.mktemp("folded") / "out"
    surgery.fold(factorized, trained, out)
    return files_of(out)


def _save(path: Path, tensors: Tensors, fingerprint: str | None) -> Path:
    """By the safetensors library, with what ties scales to factors where there is a fingerprint."""
    owner = json.dumps({"format_version": 1, "fingerprint": fingerprint})
    save_file(tensors, path, metadata=None if fingerprint is None else {"surgery": owner})
    return path


def _per_layer(name: str, wrapper: str) -> str:
    """As wrappers of each layer, and of the whole, make it."""
    return f"{wrapper}." + name.replace(".self_attn.", f".{wrapper}.self_attn.").replace(".mlp.", f".{wrapper}.mlp.")


NAMES: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT's layers": lambda name: f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight",
    "a wrapper's own": lambda name: f"model.{name}",
    "any other": lambda name: f"policy.actor.{name}",
    "FSDP": lambda name: _per_layer(name, "_fsdp_wrapped_module"),
    "FSDP, not the whole": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "each layer compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "checkpointed": lambda name: _per_layer(name, "_checkpoint_wrapped_module"),
    "all of them": lambda name: f"module._orig_mod.base_model.model.{_per_layer(name, '_fsdp_wrapped_module')}",
    "modules": lambda name: name.removesuffix(".weight"),
    "modules, wrapped": lambda name: f"module.{name.removesuffix('.weight')}",
    "without the first": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("how", NAMES)
def test_names_that_carry_something(
    how: str, factorized: Path, manifest: Manifest, trained: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    changed = {NAMES[how](name): value for name, value in trained.items()}
    assert changed.keys() != trained.keys()
    path = _save(tmp_path / "s.safetensors", changed, manifest.fingerprint)
    with pytest.warns(SurgeryWarning, match="correspond to them one to one") as caught:
        values = read_scales(path, manifest)
    assert len(caught) == 1
    assert values.keys() == trained.keys()
    assert all(torch.equal(values[name], trained[name]) for name in trained)
    with pytest.raises(ScalesError, match="belongs to other factors"):
        read_scales(_save(tmp_path / "other.safetensors", changed, "0" * 64), manifest)
    with pytest.warns(SurgeryWarning, match="correspond to them one to one"):
        surgery.fold(factorized, changed, tmp_path / "out")  # as tensors
    assert files_of(tmp_path / "out") == folded


def test_names_that_carry_something_wherever_scales_are_read(
    llama: Path, factorized: Path, manifest: Manifest, trained: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    plain = _save(tmp_path / "plain.safetensors", trained, manifest.fingerprint)
    path = _save(tmp_path / "s.safetensors", {f"module.{name}": value for name, value in trained.items()}, manifest.fingerprint)
    said = pytest.warns(SurgeryWarning, match=r"'module\.model\.layers\.0.* is taken for 'model\.layers\.0")
    with said:
        surgery.fold(factorized, path, tmp_path / "out")
    assert files_of(tmp_path / "out") == folded
    with said:
        surgery.export(factorized, path, tmp_path / "adapter")
    surgery.export(factorized, plain, tmp_path / "plain")
    assert files_of(tmp_path / "adapter") == files_of(tmp_path / "plain")
    scales = surgery.attach(transformers.AutoModelForCausalLM.from_pretrained(llama), factorized)
    with said:
        scales.load(path)
    assert all(torch.allclose(value, trained[name], rtol=0, atol=2**-24) for name, value in scales.values().items())
    ran = CliRunner().invoke(main, ["fold", str(factorized), str(path), "-o", str(tmp_path / "by command")])
    assert ran.exit_code == 0
    assert ran.stderr.count("note: ") == 1
    assert "is taken for" in ran.stderr
    with pytest.warns(SurgeryWarning, match=r"differ from those in .*plain\.safetensors, but .* is taken for"):
        surgery.blend([plain, path], tmp_path / "mean")
    assert {name: value.tolist() for name, value in load_file(tmp_path / "mean").items()} == {
        name: value.tolist() for name, value in trained.items()
    }
    assert show_scales(path).targets == len(trained)


def test_a_factorized_folder_with_such_scales_is_sound(llama: Path, trained: Tensors, tmp_path: Path) -> None:
    manifest = surgery.factorize(llama, tmp_path / "f", rank=4).manifest
    write_scales(
        tmp_path / "f/surgery/scales.safetensors",
        {f"_orig_mod.{name}": value for name, value in trained.items()},
        manifest.fingerprint,
    )
    with pytest.warns(SurgeryWarning, match="is taken for"):
        assert surgery.verify(tmp_path / "f", fast=True).ok


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, first: s.update({f"module.{first}": s.pop(first)}) or s, None),  # one of them: it can only be that one
        (lambda s, first: s.update({f"x.{first}": s.pop(first)}) or s, "no target"),
        (lambda s, first: s.update({f"module.{first}": s[first].clone()}) or s, "no target"),  # twice: which?
        (lambda s, first: s.update({"module.model.norm.weight": torch.ones(4)}) or s, "no target"),
        (lambda s, first: {f"module.{name}": value for name, value in s.items() if name != first}, "are missing"),
        (lambda s, first: {f"{name}.g": value for name, value in s.items()}, "no target"),
        (lambda s, first: {name.replace(".0.", ".7."): value for name, value in s.items()}, "no target"),
        (lambda s, first: {name.replace("q_proj", "query"): value for name, value in s.items()}, "no target"),
    ],
)
def test_names_that_do_not_fit(
    change: Callable[[Tensors, str], Tensors], said: str | None, manifest: Manifest, trained: Tensors, tmp_path: Path
) -> None:
    first = next(iter(trained))
    path = _save(tmp_path / "s.safetensors", change(dict(trained), first), manifest.fingerprint)
    if said is None:
        with pytest.warns(SurgeryWarning, match="is taken for"):
            assert torch.equal(read_scales(path, manifest)[first], trained[first])
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        with pytest.raises(ScalesError, match=said) as caught:
            read_scales(path, manifest)
    there = load_file(path)
    assert any(repr(name) in str(caught.value) for name in there.keys() - trained.keys() or there)
    assert any(repr(name) in str(caught.value) for name in trained)  # both sides


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of a stack of 12 and two matrices, at rank 3."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "m").mkdir()
    tensors = {"layers.0.experts.up": torch.randn(12, 20, 16)}
    save_file(tensors | {f"layers.{i}.q.weight": torch.randn(16, 16) for i in range(2)}, folder / "m/model.safetensors")
    return surgery.factorize(folder / "m", folder / "f", rank=3).manifest


def test_slices_and_stacks_keep_their_own_names(experts: Manifest, tmp_path: Path) -> None:
    manifest = experts
    wanted = {target.key: torch.rand(target.scales_shape) + 0.5 for target in manifest.targets}
    assert {value.ndim for value in wanted.values()} == {1, 2}
    path = _save(
        tmp_path / "s.safetensors",
        {f"module.{name}".removesuffix(".weight"): value for name, value in wanted.items()},
        manifest.fingerprint,
    )
    with pytest.warns(SurgeryWarning, match="is taken for"):
        assert all(torch.equal(value, wanted[name]) for name, value in read_scales(path, manifest).items())
    names = ["layers.0.qkv.weight[q]", "layers.0.qkv.weight[k]", "layers.0.up.weight"]
    found = match_names(["module.layers.0.qkv[q]", "module.layers.0.qkv[k]", "module.layers.0.up"], names)
    assert found.given == dict(
        zip(names, ("module.layers.0.qkv[q]", "module.layers.0.qkv[k]", "module.layers.0.up"), strict=True)
    )


def test_a_module_that_is_called_as_a_wrapper() -> None:
    """It is one of the checkpoint's own names, on both sides."""
    names = [f"module.layers.{i}.module.q.weight" for i in range(3)]
    assert match_names(names, names).renamed is None
    assert match_names([name.replace("module.q", "q") for name in names], names).fits
    both = ["a.module.q.weight", "a.q.weight"]
    assert match_names(both, both).fits
    assert not match_names(["module.a.q.weight", "a.q.weight"], both).fits
    assert not match_names(["x.q.weight", "y.q.weight"], ["a.q.weight", "b.q.weight"]).fits


def test_scales_that_share_memory(factorized: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Views of one vector, one tensor for all, and expanded ones are written as what they hold."""
    keys = [target.key for target in manifest.targets]
    rank = manifest.targets[0].rank
    flat = 1 + torch.rand(len(keys) * rank)
    one, tail = flat[:rank], flat[-rank:]
    for given in (
        dict.fromkeys(keys, one),
        {key: flat[i : i + rank] for i, key in enumerate(keys)},  # overlapping
        {key: torch.nn.Parameter(flat)[i * rank :][:rank] for i, key in enumerate(keys)},
        {key: (one, tail)[i % 2][:1].expand(rank) for i, key in enumerate(keys)},
    ):
        surgery.write_scales(tmp_path / "s", given, manifest.fingerprint)
        read = load_file(tmp_path / "s")
        assert read.keys() == given.keys()
        assert all(torch.equal(read[key], given[key].detach()) for key in keys)
        assert surgery.fold(factorized, tmp_path / "s", tmp_path / "out", overwrite=True).changed == len(keys)


def test_one_number_that_was_expanded(tmp_path: Path) -> None:
    surgery.write_scales(tmp_path / "s", {"a": torch.tensor(2.0).expand(1), "b": torch.tensor(3.0).expand(1, 1)}, None)
    assert {key: value.tolist() for key, value in load_file(tmp_path / "s").items()} == {"a": [2], "b": [[3]]}


def test_many_names_at_once() -> None:
    """As of a large mixture of experts, and a hostile one: of the longest name all others are ends."""
    wanted = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(60) for j in range(384)]
    found = match_names([f"module.{name}" for name in wanted], wanted)
    assert found.fits
    assert found.given[wanted[7]] == f"module.{wanted[7]}"
    assert not match_names(["up_proj"], wanted).fits


# -- numbers and shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_float64(exact: bool, factorized: Path, manifest: Manifest, trained: Tensors, tmp_path: Path) -> None:
    double = {name: value.double() + (0 if exact else 1e-9) for name, value in trained.items()}
    path = _save(tmp_path / "s.safetensors", double, manifest.fingerprint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = read_scales(path, manifest)
        show_scales(path)
    for name, value in values.items():
        assert value.numpy().tolist() == np.float32(double[name].numpy()).tolist()
    rounded = [str(warning.message) for warning in caught if "rounded from F64" in str(warning.message)]
    assert len(rounded) == len(caught) == (0 if exact else 2)
    assert exact or f" of {sum(value.numel() for value in trained.values())} numbers" in rounded[0]


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "row": lambda value: value[None],
    "column": lambda value: value[:, None],
    "deep": lambda value: value[None, :, None, None],
}


@pytest.mark.parametrize("how", SHAPES)
def test_shapes_with_ones(
    how: str, factorized: Path, manifest: Manifest, trained: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    path = _save(
        tmp_path / "s.safetensors", {name: SHAPES[how](value).clone() for name, value in trained.items()}, manifest.fingerprint
    )
    with pytest.warns(SurgeryWarning, match=r"is of shape .* and is taken for \[4\]") as caught:
        surgery.fold(factorized, path, tmp_path / "out")
    assert len(caught) == 1
    assert files_of(tmp_path / "out") == folded
    plain = _save(tmp_path / "plain.safetensors", trained, manifest.fingerprint)
    with pytest.warns(SurgeryWarning, match="is taken for"):
        surgery.blend([plain, path], tmp_path / "mean")
    assert {name: list(value.shape) for name, value in load_file(tmp_path / "mean").items()} == {key: [4] for key in trained}


def test_a_transposed_stack_is_no_stack(experts: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    others = {target.key: torch.ones(3) for target in experts.targets if target.view == "matrix"}
    for shape, fits in (((12, 1, 3), True), ((1, 12, 3), True), ((12, 3, 1), True), ((3, 12), False), ((36,), False)):
        values = torch.arange(36).float().reshape(shape) + 1
        _save(path, {**others, "layers.0.experts.up": values}, experts.fingerprint)
        if fits:
            with pytest.warns(SurgeryWarning, match="is taken for"):
                assert read_scales(path, experts)["layers.0.experts.up"].flatten().tolist() == values.flatten().tolist()
        else:
            with pytest.raises(ScalesError, match="has the wrong shape"):
                read_scales(path, experts)


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("step", torch.tensor(100), True),
        ("optimizer.step", torch.tensor(100.0), True),
        ("global_step", torch.tensor([100]), True),
        ("num_batches_tracked", torch.tensor(7), True),
        ("flag", torch.tensor(True), True),
        ("logit_scale", torch.tensor(2.5), False),  # which may have been trained
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(48), False),
        ("model.norm.weight", torch.ones(48), False),
        ("rng_state", torch.zeros(16, dtype=torch.uint8), False),
        ("exp_avg", torch.ones(4), False),
    ],
)
def test_an_entry_more(
    name: str, value: torch.Tensor, taken: bool, manifest: Manifest, trained: Tensors, tmp_path: Path
) -> None:
    path = _save(tmp_path / "s.safetensors", {**trained, name: value}, manifest.fingerprint)
    if taken:
        with pytest.warns(SurgeryWarning, match=f"are not used: {name}"):
            assert read_scales(path, manifest).keys() == trained.keys()
        with pytest.warns(SurgeryWarning, match=f"are not used: {name}"):
            assert show_scales(path).targets == len(trained)
    else:
        with pytest.raises(ScalesError, match=repr(name)):
            read_scales(path, manifest)


# -- what is given as the file -----------------------------------------------------------------------------------------------


def _commands(factorized: Path, path: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: surgery.fold(factorized, path, out / "folded")
    yield lambda: surgery.export(factorized, path, out / "adapter")
    yield lambda: surgery.blend([path], out / "mean.safetensors")
    yield lambda: show_scales(path)


@pytest.mark.parametrize(
    "name", ["scales.safetensors", "surgery/scales.safetensors", "checkpoint-20/scales.safetensors", "my own"]
)
def test_a_folder_that_holds_one(
    name: str, factorized: Path, manifest: Manifest, trained: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    file = tmp_path / "given" / (f"{name}.safetensors" if name == "my own" else name)
    file.parent.mkdir(parents=True)
    _save(file, trained, manifest.fingerprint)
    (file.parent / "optimizer.pt").write_bytes(b"\x80\x02 never opened")
    (file.parent / "._scales.safetensors").write_bytes(b"\0\5\x16\7")
    for command in _commands(factorized, tmp_path / "given", tmp_path):
        with pytest.warns(SurgeryWarning, match=f"is a folder: its {file.relative_to(tmp_path / 'given')} is taken") as caught:
            command()
        assert len(caught) == 1
    assert files_of(tmp_path / "folded") == folded


def test_the_factorized_folder_itself(factorized: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.warns(SurgeryWarning, match=r"its surgery/scales\.safetensors is taken"):
        surgery.fold(factorized, factorized, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(llama)


def test_folders_that_hold_several_or_none(
    factorized: Path, llama: Path, manifest: Manifest, trained: Tensors, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (50, 100, 1000):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        _save(run / f"checkpoint-{step}/scales.safetensors", trained, manifest.fingerprint)
    both = tmp_path / "both"
    (both / "surgery").mkdir(parents=True)
    for name in ("scales.safetensors", "surgery/scales.safetensors"):
        _save(both / name, trained, manifest.fingerprint)
    adapter = tmp_path / "adapter"
    surgery.export(factorized, trained, adapter)
    (tmp_path / "empty").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/trainer_state.json").write_text("{}")
    for folder, said in (
        (run, "checkpoint-1000/scales.safetensors"),
        (both, "several scales files"),
        (adapter, "--lora"),
        (llama, "is the folder of a model"),
        (tmp_path / "empty", "an empty folder"),
        (tmp_path / "logs", "trainer_state.json"),
    ):
        for command in _commands(factorized, folder, tmp_path):
            with pytest.raises(ScalesError, match=said):
                command()


def test_folders_with_what_is_no_second_file(
    factorized: Path, manifest: Manifest, trained: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    """A copy that an editor keeps, a link to nothing, and a file that is none."""
    folder = tmp_path / "run"
    for name in (".ipynb_checkpoints", "checkpoint-10"):
        (folder / name).mkdir(parents=True)
        _save(folder / name / "scales.safetensors", trained, manifest.fingerprint)
    (folder / "linked.safetensors").symlink_to("gone")
    (folder / "folder.safetensors").mkdir()
    with pytest.warns(SurgeryWarning, match=r"its checkpoint-10/scales\.safetensors is taken"):
        surgery.fold(factorized, folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == folded


def test_folders_with_scales_that_must_be_given_by_name(factorized: Path, trained: Tensors, tmp_path: Path) -> None:
    """As what says that they are scales is in none of them."""
    for name, save in (("mine.safetensors", save_file), ("scales.pt", torch.save)):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        save(trained, folder / name)
        for command in _commands(factorized, folder, tmp_path):
            with pytest.raises(ScalesError, match="holds no scales") as caught:
                command()
            assert f"give the file: {folder / name}" in str(caught.value)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/scales.safetensors").symlink_to("nowhere")
    with pytest.warns(SurgeryWarning), pytest.raises(ScalesError, match="a link that leads nowhere"):
        surgery.fold(factorized, tmp_path / "gone", tmp_path / "out")


def _torch_save(path: Path, tensors: Tensors) -> None:
    torch.save(tensors, path)


def _old_torch_save(path: Path, tensors: Tensors) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def _pickle(path: Path, tensors: Tensors) -> None:
    path.write_bytes(pickle.dumps({name: value.numpy() for name, value in tensors.items()}))


def _npz(path: Path, tensors: Tensors) -> None:
    with open(path, "wb") as file:
        np.savez(file, **{name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_torch_save, "torch.save, which is never opened"),
        (_old_torch_save, "a pickle"),
        (_pickle, "a pickle"),
        (_npz, "NumPy archive"),
        (lambda path, _: path.write_bytes(b""), "is an empty file"),
        (lambda path, _: path.write_bytes(bytes(5000)), "nothing but zeros"),
        (
            lambda path, _: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"),
            "git-lfs pointer",
        ),
        (lambda path, _: path.write_bytes(b"GGUF\3\0\0\0"), "GGUF"),
        (lambda path, _: path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>"), "web page"),
        (lambda path, _: path.write_text('{"a": [1.0, 1.0]}'), "JSON"),
        (lambda path, _: path.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        "), "AppleDouble"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_another_kind(
    write: Callable[[Path, Tensors], object], said: str, suffix: str, factorized: Path, trained: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / f"given{suffix}"
    write(path, trained)
    for command in _commands(factorized, path, tmp_path):
        with pytest.raises(FormatError, match=said) as caught:
            command()
        assert str(path) in str(caught.value)


def test_the_command_that_converts(factorized: Path, trained: Tensors, folded: dict[str, bytes], tmp_path: Path) -> None:
    """As it is printed, for parameters, a name that is a lie, and a folder whose name a shell would take apart."""
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    torch.save({name: torch.nn.Parameter(value) for name, value in trained.items()}, folder / "s.safetensors")
    with pytest.raises(FormatError, match="convert it once") as caught:
        surgery.fold(factorized, folder / "s.safetensors", tmp_path / "out")
    command = str(caught.value).partition("convert it once: python ")[2]
    subprocess.run(["sh", "-c", f"{sys.executable} {command}"], check=True, timeout=120)
    (converted,) = [path for path in folder.iterdir() if path.name != "s.safetensors"]
    with pytest.warns(SurgeryWarning, match="does not say which factors"):
        surgery.fold(factorized, converted, tmp_path / "out")
    assert files_of(tmp_path / "out") == folded


@pytest.mark.parametrize("name", ["scales.pt", "scales.bin", "scales.txt", "scales"])
def test_another_ending(name: str, manifest: Manifest, trained: Tensors, tmp_path: Path) -> None:
    assert read_scales(_save(tmp_path / name, trained, manifest.fingerprint), manifest).keys() == trained.keys()


def test_files_of_other_tensors(llama: Path, factorized: Path, trained: Tensors, tmp_path: Path) -> None:
    surgery.export(factorized, trained, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "of others")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    surgery.attach(model, factorized)
    save_file({name: value.detach() for name, value in model.named_parameters() if value.requires_grad}, tmp_path / "deltas")
    save_file(tensors_of(llama), tmp_path / "model")
    (factors,) = sorted((factorized / "surgery").glob("factors-00001*"))
    for path, said in (
        (tmp_path / "ours/adapter_model.safetensors", "a LoRA adapter"),
        (tmp_path / "of others/adapter_model.safetensors", r"--lora '\S*/of others',"),
        (tmp_path / "deltas", r"scales\.save"),
        (tmp_path / "model", "surgery project"),
        (factors, "holds factors"),
    ):
        for command in _commands(factorized, path, tmp_path):
            with pytest.raises(ScalesError, match=said):
                command()


def test_paths_that_lead_nowhere(factorized: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, said in (
        (tmp_path / "link", "a link that leads nowhere"),
        (Path("https://host/o/n/s.safetensors"), "hf download"),
    ):
        for command in _commands(factorized, path, tmp_path):
            with pytest.raises(ScalesError, match=said):
                command()
