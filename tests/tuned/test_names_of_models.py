"""The same model under other names, or stored in another way: all that is found in it is the same, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.errors import OptionError, SourceError, SurgeryError
from surgery.format import views
from surgery.format.name_map import find_names, match_names, nearest
from surgery.format.safetensors import ShardReader
from surgery.progress import Silent
from tests.families import DECODER, FAMILIES
from tests.models import save_llama, tensors_of
from tests.releases import has, known_classes, needs
from tests.training.test_attach_families import CUT, Interleaved, _ernie, _interleaved, _kimi, _qwen3_vl

stacks_experts = needs("transformers", ">=5.10", "all of these families, with experts that are stacked")

Tensors = dict[str, torch.Tensor]
Rename = Callable[[str], str]
_QUERY = "model.layers.0.self_attn.q_proj.weight"

pytestmark = [
    # PEFT asks transformers for an attribute that has a new name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def _saved(folder: Path, tensors: Tensors, like: Path) -> Path:
    """A model of these tensors, in two files, with the config of another one."""
    folder.mkdir(parents=True)
    if (like / "config.json").is_file():
        shutil.copy(like / "config.json", folder)
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name].clone().contiguous() for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def _trained(tensors: Tensors) -> Tensors:
    """What becomes of weights by some training, by the entries alone, in whatever way they are stored."""
    return {name: tensor + 0.01 * torch.cos(1e3 * tensor) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


def _projected(folder: Path, tuned: Path, out: Path) -> tuple[bytes, list[str]]:
    """The scales file that brings a factorized checkpoint closest to a model, and what was said."""
    heard = Silent()
    surgery.project(folder, tuned, out, device="cpu", progress=heard)
    return out.read_bytes(), heard.notes


def _studied(model: Path, tuned: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """All numbers of ``spectra``, and what was said."""
    heard = Silent()
    report = surgery.spectra(model, tuned, top=4, device="cpu", progress=heard, **options).as_json()
    del report["tuned"]
    return report, heard.notes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama, and the same factorized."""
    folder = tmp_path_factory.mktemp("names")
    model = save_llama(folder / "model", torch.float32)
    surgery.factorize(model, folder / "factorized", rank=4, device="cpu")
    return model, folder / "factorized"


@pytest.fixture(scope="module")
def plain(base: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, bytes, dict[str, Any]]:
    """The weights of a fine-tuned model, the scales and the spectra that it gives under the names of the original."""
    folder = tmp_path_factory.mktemp("plain")
    tensors = _trained(tensors_of(base[0]))
    tuned = _saved(folder / "tuned", tensors, base[0])
    (scales, notes), (spectra, more) = _projected(base[1], tuned, folder / "g"), _studied(base[0], tuned)
    assert notes == more == []
    return tensors, scales, spectra


RENAMED: dict[str, Rename] = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled, then DDP": lambda name: f"module._orig_mod.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "images and text": lambda name: f"language_model.{name}",
    "images and text, new": lambda name: name.replace("model.", "model.language_model."),
    "headless": lambda name: name.removeprefix("model."),
    "another prefix": lambda name: f"student.net.{name}",
    "both": lambda name: f"_orig_mod.policy.{name}",
    "suffix": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED.keys())
def test_a_tuned_model_under_other_names(
    rename: Rename, base: tuple[Path, Path], plain: tuple[Tensors, bytes, dict[str, Any]], tmp_path: Path
) -> None:
    tensors, scales, spectra = plain
    tuned = _saved(tmp_path / "t", {rename(name): tensor for name, tensor in tensors.items()}, base[0])
    for found, expected in ((_projected(base[1], tuned, tmp_path / "g"), scales), (_studied(base[0], tuned), spectra)):
        assert found[0] == expected
        (note,) = found[1]
        said = note.split(": ")[-1].split(" is taken for ")
        assert said[0].strip("'") == rename(said[1].strip("'")) != said[1].strip("'")


@pytest.mark.parametrize("config", [True, False])
def test_more_is_there_than_is_wanted(
    config: bool, base: tuple[Path, Path], plain: tuple[Tensors, bytes, dict[str, Any]], tmp_path: Path
) -> None:
    """A tower for images whose layers are called as those of the text, of another size, and a head."""
    tensors, scales, spectra = plain
    tower = {f"model.vision.{name}": tensor[..., :24] for name, tensor in tensors.items() if "layers" in name}
    wrapped = {f"model.language_model.{name}": tensor for name, tensor in tensors.items()}
    tuned = _saved(tmp_path / "t", wrapped | tower | {"score.weight": torch.ones(2, 48)}, base[0] if config else tmp_path)
    found, notes = _projected(base[1], tuned, tmp_path / "g")
    assert found == scales
    assert len(notes) == 1
    assert _studied(base[0], tuned)[0] == spectra
    found, notes = _projected(base[1], tuned, tmp_path / "again")
    assert "model.language_model.model.layers.0" in notes[0]


def test_more_layers_are_told_of(base: tuple[Path, Path], plain: tuple[Tensors, bytes, dict[str, Any]], tmp_path: Path) -> None:
    tensors, scales, _ = plain
    deeper = tensors | {name.replace("s.1.", "s.2."): tensor for name, tensor in tensors.items()}
    tuned = _saved(tmp_path / "t", {f"module.{name}": tensor for name, tensor in deeper.items()}, base[0])
    found, notes = _projected(base[1], tuned, tmp_path / "g")
    assert found == scales
    assert len(notes) == 2
    assert "has 7 weights of the kinds that are compared, such as 'module.model.layers.2." in notes[1]


@pytest.mark.parametrize("original", ["model.language_model.", "language_model.model.", "model."])
@pytest.mark.parametrize("tuned", ["model.language_model.", "language_model.model.", "model.", ""])
def test_the_text_part_of_models_for_images(
    original: str, tuned: str, plain: tuple[Tensors, bytes, dict[str, Any]], base: tuple[Path, Path], tmp_path: Path
) -> None:
    """As releases of transformers have called it, on either side, with the tower beside it that only one side may have."""

    def called(tensors: Tensors, prefix: str) -> Tensors:
        return {
            (f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name): tensor
            for name, tensor in tensors.items()
        }

    tower = {"visual.blocks.0.attn.qkv.weight": torch.randn(9, 3), "visual.blocks.0.attn.proj.weight": torch.randn(3, 3)}
    before = _saved(tmp_path / "b", called(tensors_of(base[0]), original), tmp_path)
    same = _saved(tmp_path / "s", called(plain[0], original), tmp_path)
    other = _saved(tmp_path / "o", called(plain[0], tuned) | tower, tmp_path)
    assert _studied(before, other)[0] == _studied(before, same)[0]


def test_an_encoder_without_the_name_of_its_model(tmp_path: Path) -> None:
    model = FAMILIES["bert"].save(tmp_path / "m")
    tuned = _saved(tmp_path / "t", _trained(tensors_of(model)), model)
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors_of(tuned).items() if name.startswith("bert.")}
    other = _saved(tmp_path / "o", bare, tmp_path)
    options = {"include": ["*encoder*"]}
    assert _studied(model, other, **options)[0] == _studied(model, tuned, **options)[0]
    _saved(tmp_path / "bare", {name.removeprefix("bert."): tensor for name, tensor in tensors_of(model).items()}, tmp_path)
    assert _studied(tmp_path / "bare", tuned, **options)[0] == _studied(tmp_path / "bare", other, **options)[0]


def test_recommended_and_told_on_the_command_line(
    base: tuple[Path, Path], plain: tuple[Tensors, bytes, dict[str, Any]], tmp_path: Path
) -> None:
    same = _saved(tmp_path / "same", plain[0], base[0])
    other = _saved(tmp_path / "other", {f"_orig_mod.{name}": tensor for name, tensor in plain[0].items()}, base[0])
    written = []
    for tuned in (same, other):
        done = CliRunner().invoke(
            main,
            [*("recommend", str(base[0]), str(tuned), "--budget", "60", "-o", str(tmp_path / f"{tuned.name}.toml"))],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
        assert done.stderr.count("is taken for") == (tuned == other)
        written.append([line for line in (tmp_path / f"{tuned.name}.toml").read_text().splitlines() if line[:1] != "#"])
    assert written[0] == written[1]


def _half_prefixed(tensors: Tensors) -> Tensors:
    return {f"x.{name}" if "layers.0" in name else name: tensor for name, tensor in tensors.items()}


def _two_prefixes(tensors: Tensors) -> Tensors:
    return {f"{'x' if 'layers.0' in name else 'y'}.{name}": tensor for name, tensor in tensors.items()}


def _one_left_out(tensors: Tensors) -> Tensors:
    return {f"module.{name}": tensor for name, tensor in tensors.items() if name != _QUERY}


def _twice(tensors: Tensors) -> Tensors:
    return {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in tensors.items()}


def _twice_in_wrappers(tensors: Tensors) -> Tensors:
    return {f"{part}.{name}": tensor for part in ("x.module", "x") for name, tensor in tensors.items()}


def _other_layers(tensors: Tensors) -> Tensors:
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}


def _wider(tensors: Tensors) -> Tensors:
    return {f"module.{name}": torch.cat([tensor, tensor]) for name, tensor in tensors.items()}


def _adapted(tensors: Tensors) -> Tensors:
    inside = {name.replace("_proj.weight", "_proj.base_layer.weight"): tensor for name, tensor in tensors.items()}
    return inside | {_QUERY.replace("weight", f"lora_{part}.default.weight"): torch.ones(4, 4) for part in "AB"}


def _reparametrized(tensors: Tensors) -> Tensors:
    return {name.replace(".weight", ".parametrizations.weight.original"): tensor for name, tensor in tensors.items()}


def _adapted_otherwise(tensors: Tensors) -> Tensors:
    """By an adapter that is no LoRA."""
    inside = {name.replace("_proj.weight", "_proj.base_layer.weight"): tensor for name, tensor in tensors.items()}
    return inside | {_QUERY.replace("weight", "ia3_l.default"): torch.ones(1, 48)}


def _replaced(tensors: Tensors) -> Tensors:
    """As PEFT keeps modules that were trained whole: both the old weight and the new one."""
    return {
        name.replace(".weight", f".{part}.weight"): tensor
        for name, tensor in tensors.items()
        for part in ("original_module", "modules_to_save.default")
    }


def _normalized(tensors: Tensors) -> Tensors:
    return {
        f"{name}_{part}": tensor if part == "v" else tensor.norm(dim=0, keepdim=True)
        for name, tensor in tensors.items()
        for part in "gv"
    }


def _pruned(tensors: Tensors) -> Tensors:
    return {f"{name}_orig": tensor for name, tensor in tensors.items()}


REFUSED: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (
        _half_prefixed,
        r"has no tensor 'model\.layers\.0\..*\n  got: +7 of 14 names fit; the nearest to .* is 'x\.model\.layers\.0\.",
    ),
    (
        _two_prefixes,
        r"has no tensor 'model\.layers\..*\n  got: +7 of 14 names fit; the nearest .*; '[xy]\.model.* would be 'model",
    ),
    (
        _one_left_out,
        r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'\n  got: +13 of 14 names fit; 'module\.model\.",
    ),
    (
        _twice,
        r"may have 'model\.layers.*' under two names\n.* could be '(student|teacher)\..*' or '(student|teacher)\.model",
    ),
    (_twice_in_wrappers, r"under two names\n.* could be 'x\.model\..*' or 'x\.module\.model\."),
    (
        _other_layers,
        r"has no tensor 'model\.layers\.1\..*\n  got: +7 of 14 names fit; the nearest to .* is 'model\.layers\.7\.",
    ),
    (_wider, r"(has no tensor 'model\.layers\.0|'module\.model\.layers\.0\..*' has another shape)"),
    (_adapted, r"has no tensor 'model\.layers\.0.*, but weights with an adapter beside them\n(.|\n)*merge adapters first"),
    (_adapted_otherwise, r"has no tensor 'model\.layers\.0.*, but weights with an adapter beside them\n(.|\n)*merge adapters"),
    (_replaced, r"has no tensor 'model\.layers\.0.*\n  got: +0 of 14 names fit"),
    (_normalized, r"has no tensor 'model\.layers\.0.*\n  got: +0 of 14 names fit; the nearest .*weight_[gv]'"),
    (_pruned, r"has no tensor 'model\.layers\.0.*\n  got: +0 of 14 names fit; the nearest .*weight_orig'"),
    (_reparametrized, r"has no tensor 'model\.layers\.0.*\n  got: +0 of 14 names fit; the nearest .*original'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[change.__name__ for change, _ in REFUSED])
def test_names_that_could_be_others_are_refused(
    change: Callable[[Tensors], Tensors],
    message: str,
    base: tuple[Path, Path],
    plain: tuple[Tensors, bytes, dict[str, Any]],
    tmp_path: Path,
) -> None:
    tuned = _saved(tmp_path / "t", change(plain[0]), base[0])
    with pytest.raises(SourceError, match=message):
        surgery.project(base[1], tuned, tmp_path / "g", device="cpu")
    with pytest.raises(SourceError, match=message):
        surgery.spectra(base[0], tuned, top=4, device="cpu")


# ---- stored in another way


def _in_memory(model: Any, folder: Path, like: Path) -> Path:
    """A model as its modules hold it."""
    return _saved(folder, dict(model.state_dict()), like)


def _both_ways(make: Callable[[], Any], tmp_path: Path) -> dict[str, Path]:
    """A random model and a tuned one, each as transformers saves it (``files``) and as its modules hold it (``modules``)."""
    torch.manual_seed(0)
    with known_classes():
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    found = {}
    for what in ("original", "tuned"):
        folder = tmp_path / f"{what}, files"
        model.save_pretrained(folder)
        found[f"{what}, files"] = folder
        found[f"{what}, modules"] = _in_memory(model, tmp_path / f"{what}, modules", folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(next(iter(_trained({"w": parameter}).values())))
    return found


INTERLEAVES = has("transformers.core_model_loading", "Interleave")
STORED: dict[str, Any] = {
    **{name: (FAMILIES[name].make, ["*proj*", "*experts*", "*linear*"]) for name in ("mixtral", "qwen3_moe", "deepseek_v3")},
    **{name: (FAMILIES[name].make, ["*proj*", "*experts*", "*linear*"]) for name in ("olmoe", "granitemoe", "jamba")},
    "fused, cut in three": (CUT["nomic_bert"][0], ["*layers*", "*attn*"]),
    "in heads for RoPE": (_kimi, ["*wqkv*", "*q_proj*", "*k_proj*", "*v_proj*"]),
    "experts for text and images": (_ernie, ["*experts*"]),
    "transposed": (_qwen3_vl, ["*experts*"]),
    "interleaved": (_interleaved, ["*proj*", "*w13*"]),
}


@stacks_experts
@pytest.mark.parametrize("direction", ["modules in files", "files in modules"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=INTERLEAVES) if name == "interleaved" else name for name in STORED],
)
def test_stored_in_another_way(name: str, direction: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transformers, "Interleaved", Interleaved, raising=False)
    monkeypatch.setattr(views, "STACK_BYTES", 3 * 4 * 24 * 32)  # three of four experts at a time
    make, patterns = STORED[name]
    models = _both_ways(make, tmp_path)
    if name == "transposed":  # as the models that are on the hub have it, and transformers saves it no more
        for folder in (models["original, files"], models["tuned, files"]):
            turned = {one: tensor.mT if ".experts." in one else tensor for one, tensor in tensors_of(folder).items()}
            models[folder.name] = _saved(tmp_path / f"turned {folder.name}", turned, folder)
    tuned, original = direction.split(" in ")
    before = models[f"original, {original}"]
    include = [pattern for pattern in patterns if any(fnmatch(one, pattern) for one in tensors_of(before))]
    surgery.factorize(before, tmp_path / "f", rank=3, device="cpu", include=include)
    same, other = models[f"tuned, {original}"], models[f"tuned, {tuned}"]
    assert tensors_of(same).keys() != tensors_of(other).keys() or name == "transposed"
    expected, notes = _projected(tmp_path / "f", same, tmp_path / "same")
    assert notes == []
    found, notes = _projected(tmp_path / "f", other, tmp_path / "other")
    assert found == expected
    (note,) = notes
    assert "is stored in another way than the original, and is read as transformers loads it" in note
    assert (" is taken for " in note) == (name != "transposed")
    assert _studied(before, other, include=include)[0] == _studied(before, same, include=include)[0]


@stacks_experts
def test_stored_in_another_way_under_other_names(tmp_path: Path) -> None:
    """The bare model of a class, saved from its modules."""
    models = _both_ways(FAMILIES["qwen3_moe"].make, tmp_path)
    before, same = models["original, files"], models["tuned, files"]
    tensors = tensors_of(models["tuned, modules"])
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    other = _saved(tmp_path / "bare", bare, same)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3MoeModel"]}))
    found, notes = _studied(before, other)
    assert found == _studied(before, same)[0]
    assert notes[0].endswith("'layers.0.mlp.experts.down_proj' is taken for 'model.layers.0.mlp.experts.0.down_proj.weight'")


@stacks_experts
@pytest.mark.parametrize("rename", ["module", "fsdp", "compiled layers"])
def test_stored_in_another_way_by_wrapped_modules(rename: str, tmp_path: Path) -> None:
    """The state of a model in DDP, FSDP or torch.compile, whose experts are stacked."""
    models = _both_ways(FAMILIES["qwen3_moe"].make, tmp_path)
    before, same = models["original, files"], models["tuned, files"]
    tensors = {RENAMED[rename](name): tensor for name, tensor in tensors_of(models["tuned, modules"]).items()}
    other = _saved(tmp_path / "wrapped", tensors, same)
    include = ["*experts*", "*q_proj*"]
    (found, notes), (expected, _) = (_studied(before, tuned, include=include) for tuned in (other, same))
    assert found == expected
    renamed = RENAMED[rename]("model.layers.0.mlp.experts.down_proj")
    assert notes[0].endswith(f"{renamed!r} is taken for 'model.layers.0.mlp.experts.0.down_proj.weight'")


@stacks_experts
def test_of_a_stack_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = _both_ways(FAMILIES["mixtral"].make, tmp_path)
    surgery.factorize(models["original, files"], tmp_path / "f", rank=2, device="cpu", include=["*experts.2.*"])
    sizes: list[int] = []
    empty = ShardReader.empty

    def seen(reader: ShardReader, count: int) -> torch.Tensor:
        if reader.name.startswith("model-0000"):
            sizes.append(count)
        return empty(reader, count)

    monkeypatch.setattr(ShardReader, "empty", seen)
    surgery.project(tmp_path / "f", models["tuned, modules"], tmp_path / "g", device="cpu", progress=Silent())
    gate_up = tensors_of(models["tuned, modules"])["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.nbytes == 4 * gate_up[0].nbytes
    assert max(sizes) == gate_up[0].nbytes


def _fp8(folder: Path, tensors: Tensors, like: Path) -> Path:
    """A model whose matrices are in FP8, with a scale for each block of 16 x 16, which is the largest in it."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            stored[name] = tensor
            continue
        *stack, m, n = tensor.shape
        blocks = tensor.view(*stack, m // 16, 16, n // 16, 16)
        largest = blocks.abs().amax((-3, -1), keepdim=True)
        stored[name] = (blocks / largest).to(torch.float8_e4m3fn).view(tensor.shape)
        stored[f"{name}_scale_inv"] = largest.view(*stack, m // 16, n // 16)
    _saved(folder, stored, like)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_MIXTURE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def _mixture(**config: Any) -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**DECODER, "vocab_size": 64, **_MIXTURE, **config}))


@stacks_experts
@pytest.mark.parametrize("direction", ["modules in files", "files in modules"])
def test_fp8_stored_in_another_way(direction: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One expert at a time, each with the scales that are its own."""
    monkeypatch.setattr(views, "STACK_BYTES", 1)
    models = _both_ways(_mixture, tmp_path)
    tuned, original = direction.split(" in ")
    before = models[f"original, {original}"]
    found = []
    for kind in (original, tuned):
        dense = models[f"tuned, {kind}"]
        keep = {name: tensor for name, tensor in tensors_of(dense).items() if "gate.weight" not in name}
        found.append(_fp8(tmp_path / f"fp8, {kind}", keep, dense))
    surgery.factorize(before, tmp_path / "f", rank=3, device="cpu", include=["*proj*"])
    (expected, _), (scales, notes) = (_projected(tmp_path / "f", one, tmp_path / f"g {one.name}") for one in found)
    assert scales == expected
    assert "is stored in another way" in notes[0]
    assert any(bool((value != 1).any()) for value in load_file(tmp_path / f"g {found[0].name}").values())


@stacks_experts
def test_a_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    models = _both_ways(lambda: _mixture(tie_word_embeddings=True), tmp_path)
    options: dict[str, Any] = {"device": "cpu", "include": ["*embed*", "*lm_head*"], "progress": Silent()}
    manifest = surgery.factorize(models["original, modules"], tmp_path / "f", rank=3, **options).manifest
    assert [len(target.tensors) for target in manifest.targets] == [2]
    found = []
    for i, kept in enumerate(["embed_tokens", "lm_head"]):
        tensors = tensors_of(models["tuned, modules"])
        experts = {name: tensor for name, tensor in tensors_of(models["tuned, files"]).items() if ".experts." in name}
        head = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)
        names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
        rest = {n: t for n, t in tensors.items() if ".experts." not in n and n not in names.values()}
        tuned = _saved(tmp_path / f"t{i}", experts | rest | {names[kept]: head}, models["tuned, files"])
        found.append(_projected(tmp_path / "f", tuned, tmp_path / f"g{i}"))
    assert found[0][0] == found[1][0]


@stacks_experts
def test_an_adapter_beside_weights_that_are_stored_in_another_way(tmp_path: Path) -> None:
    """It would be left out."""
    models = _both_ways(_mixture, tmp_path)
    surgery.factorize(models["original, files"], tmp_path / "f", rank=3, device="cpu")
    halves = {f"model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    tuned = _saved(tmp_path / "t", tensors_of(models["tuned, modules"]) | halves, models["tuned, files"])
    with pytest.raises(SourceError, match=r"has no tensor(.|\n)*merge adapters first"):
        surgery.project(tmp_path / "f", tuned, tmp_path / "g", device="cpu")


@stacks_experts
@pytest.mark.parametrize("change", ["an expert less", "fewer experts", "no config", "NaN", "no class"])
def test_what_is_stored_in_another_way_and_does_not_fit(change: str, tmp_path: Path) -> None:
    models = _both_ways(FAMILIES["mixtral"].make, tmp_path)
    stacked = change in ("NaN", "fewer experts", "no config", "no class")
    before = models[f"original, {'files' if stacked else 'modules'}"]
    surgery.factorize(before, tmp_path / "f", rank=2, device="cpu", include=["*experts*"])
    tuned = models[f"tuned, {'modules' if stacked else 'files'}"]
    tensors, message = tensors_of(tuned), "has no tensor .*experts"
    config = json.loads((tuned / "config.json").read_text())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    if change == "an expert less":
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.1.block_sparse_moe.experts.3" not in name}
    elif change == "fewer experts":
        tensors = {name: tensor[:3] if "experts" in name else tensor for name, tensor in tensors.items()}
        config |= {"num_local_experts": 3}
    elif change == "no class":
        config |= {"architectures": ["NoSuchClass"]}
        message += r"(.|\n)*not looked for as transformers loads it: .*NoSuchClass"
    elif change == "NaN":
        tensors[name][2, 3, 4] = float("nan")
        message = f"{name!r} holds NaN"
    other = _saved(tmp_path / "other", tensors, tuned)
    (other / "config.json").write_text(json.dumps(config))
    if change == "no config":
        (other / "config.json").unlink()
    with pytest.raises(SurgeryError, match=message):
        surgery.project(tmp_path / "f", other, tmp_path / "g", device="cpu")
    assert not (tmp_path / "g").exists()


# ---- adapters


ADAPTED: dict[str, Rename] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "module": lambda name: f"module.{name}",
    "images and text": lambda name: f"language_model.{name}",
    "images and text, new": lambda name: name.replace("model.", "model.language_model."),
    "fsdp": lambda name: name.replace("model.", "model._fsdp_wrapped_module.", 1),
    "prefix": lambda name: f"policy.{name}",
}


@pytest.fixture(scope="module")
def adapter(base: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the Llama, as PEFT saves it."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return folder


def _folded(base: tuple[Path, Path], adapter: Path, out: Path) -> tuple[Tensors, list[str]]:
    heard = Silent()
    scales = base[1] / "surgery/scales.safetensors"
    surgery.fold(base[1], scales, out, lora=adapter, device="cpu", progress=heard)
    return tensors_of(out), heard.notes


def _with_names(adapter: Path, out: Path, rename: Rename) -> Path:
    shutil.copytree(adapter, out)
    prefix = "base_model.model."
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {prefix + rename(name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}
    save_file(renamed, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize("rename", ADAPTED.values(), ids=ADAPTED.keys())
@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_of_a_wrapped_model(
    rename: Rename, config: bool, base: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    if not config:
        bare = _saved(tmp_path / "bare", tensors_of(base[0]), tmp_path)
        surgery.factorize(bare, tmp_path / "f", rank=4, device="cpu")
        base = bare, tmp_path / "f"
    expected, notes = _folded(base, adapter, tmp_path / "plain")
    found, more = _folded(base, _with_names(adapter, tmp_path / "a", rename), tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found[_QUERY], tensors_of(base[0])[_QUERY])
    further = [note for note in more if note not in notes]
    if {"_orig_mod", "_fsdp_wrapped_module"} & set(
        rename("model.layers.0.mlp.down_proj").split(".")
    ):  # which stand for nothing
        assert not further
        return
    (note,) = further
    said = note.split(": ")[-1].split(" is taken for ")
    assert said == [repr(rename("model.layers.0.mlp.down_proj.weight")), repr("model.layers.0.mlp.down_proj.weight")]


def test_an_adapter_that_was_saved_by_peft_around_a_compiled_model(
    base: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    """Whose names PEFT makes, not this test."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base[0], dtype=torch.float32)
    wrapped: Any = torch.nn.Module()
    wrapped.config, wrapped._orig_mod, wrapped.base_model_prefix = model.config, model, model.base_model_prefix
    adapted = peft.get_peft_model(wrapped, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    own = load_file(adapter / "adapter_model.safetensors")
    halves = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    for name, parameter in halves.items():
        parameter.data.copy_(own[name.replace("_orig_mod.", "").replace(".default", "")])
    adapted.save_pretrained(tmp_path / "wrapped")
    assert all("._orig_mod." in name for name in load_file(tmp_path / "wrapped/adapter_model.safetensors"))
    expected, _ = _folded(base, adapter, tmp_path / "plain")
    found, _ = _folded(base, tmp_path / "wrapped", tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_of_other_modules(base: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    changes: list[tuple[Rename, str]] = [
        (lambda name: name.replace("q_proj", "query"), r"changes 'model\.layers\.\d\.self_attn\.query', which is no module"),
        (
            lambda name: f"x.{name}" if "layers.0" in name else name,
            r"changes 'x\.model.*\n  got: +2 of 4 names fit; the nearest",
        ),
        (lambda name: name.replace("layers.1", "layers.7"), r"changes 'model\.layers\.7\..*\n.* is 'model\.layers\.[01]\."),
    ]
    for i, (rename, message) in enumerate(changes):
        with pytest.raises(OptionError, match=message):
            _folded(base, _with_names(adapter, tmp_path / f"a{i}", rename), tmp_path / "out")


# ---- texts alone


def test_more_than_one_way() -> None:
    wanted = dict.fromkeys(["layers.0.q.weight", "layers.1.q.weight"], ())
    two = [f"{part}.layers.{i}.q.weight" for part in "ab" for i in range(2)]
    found = find_names(two, wanted)
    assert not found.is_complete
    assert found.doubtful == ("layers.0.q.weight", "a.layers.0.q.weight", "b.layers.0.q.weight")
    assert "could be 'a.layers.0.q.weight' or 'b.layers.0.q.weight'" in str(
        found.misfit(OptionError, "what", wanted, expected="one", hint="look")
    )
    found = find_names(two, wanted, alike=lambda name, there: there.startswith("b"))
    assert found.is_complete
    assert found.given == {name: f"b.{name}" for name in wanted}
    assert found.unknown == ("a.layers.0.q.weight", "a.layers.1.q.weight")
    assert find_names([*two, *wanted], wanted).given == {name: name for name in wanted}
    assert (
        find_names([*two, *wanted], wanted, alike=lambda name, there: there.startswith("a")).given["layers.0.q.weight"][0]
        == "a"
    )


def test_names_that_will_do_instead() -> None:
    wanted = {"head.weight": ("embed.weight",), "q.weight": ()}
    found = find_names(["m.embed.weight", "m.q.weight", "m.norm.weight"], wanted, ["norm.weight", "bias"])
    assert found.is_complete
    assert found.given == {"embed.weight": "m.embed.weight", "q.weight": "m.q.weight"}
    assert found.unknown == ()
    assert find_names(["m.embed.weight", "m.q.weight", "m.norm.weight"], {"head.weight": (), "q.weight": ()}).missing == (
        "head.weight",
    )


def test_what_is_there_once_is_not_two() -> None:
    found = find_names(["m.a.q.weight"], {"a.q.weight": (), "a.module.q.weight": ()})
    assert not found.is_complete
    assert not match_names(["a.q.weight"], ["a.q.weight", "a.module.q.weight"]).fits


def test_the_nearest_name() -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("q_proj", "k_proj", "norm")]
    assert nearest("model.layers.7.qproj.weight", names) == "model.layers.7.q_proj.weight"
    assert nearest("layers.11.k_proj", names) == "model.layers.11.k_proj.weight"
    assert nearest("x", []) is None
    assert nearest("completely-different", ["ZZZ"]) is None
    assert nearest("q" * 10**6, ["q" * 10**6 + "x"] * 50) is not None


def test_what_a_suffix_may_be() -> None:
    """One word more, but none that says that it is something else; of scales none at all."""
    wanted = {f"layers.{i}.q.weight": () for i in range(3)}
    for end, found in (
        (".default", True),
        (".linear", True),
        (".exp_avg", False),
        (".mask", False),
        (".weight_v", False),
        (".a.b", False),
    ):
        for there in ([f"{name}{end}" for name in wanted], [name.replace(".weight", f"{end}.weight") for name in wanted]):
            assert find_names(there, wanted).is_complete == found
            assert find_names(wanted, dict.fromkeys(there, ())).is_complete == found
            assert not match_names(there, wanted).fits
    there = ["layers.0.q.a.weight", "layers.1.q.b.weight", "layers.2.q.a.weight"]
    assert not find_names(there, wanted).is_complete


@pytest.mark.parametrize(
    ("start", "found"), [("ema.", True), ("encoder.text.", True), ("exp_avg.", False), ("state.grad.", False)]
)
def test_what_a_prefix_may_be(start: str, found: bool) -> None:
    """Of any length, but none that says that the tensors are an optimizer's."""
    wanted = {f"layers.{i}.q.weight": () for i in range(3)}
    there = [f"{start}{name}" for name in wanted]
    assert find_names(there, wanted).is_complete == found
    assert match_names(there, wanted).fits == found
