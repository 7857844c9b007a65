"""What is done for each target and for each weight file does not grow with how many others there are."""

from __future__ import annotations

import dataclasses
import json
import pickle
import tracemalloc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.engine.lane import Lane
from surgery.engine.resources import Memory
from surgery.files.file_records import FileRecord
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import Alias, CertificateRecord, ShardRecord, SourceRecord, TargetRecord
from surgery.format.options import Options
from surgery.format.top_k_records import TopKRecord
from surgery.planning.memory import known_bytes
from surgery.progress import Silent
from surgery.run.engines import LocalEngine, ShardJobs, engine_of
from tests.families import FAMILIES
from tests.models import files_of, save_llama
from tests.weights.test_fp8 import quantize_model


class _Counted(list[Any]):
    """A list that knows how often somebody began to go through it."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def _model(folder: Path, files: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    where = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        tensors = {f"layers.{i}.mlp.{one}.weight": torch.randn(16, 16, generator=generator) for one in ("up", "down")}
        save_file(tensors, folder / name)
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Of models of two and of six weight files, by their number; each with trained scales and a tuned model beside it."""
    made = {}
    for files in (2, 6):
        home = tmp_path_factory.mktemp(f"{files}")
        surgery.factorize(_model(home / "model", files), home / "factorized", rank=2, device="cpu")
        scales = load_file(home / "factorized/surgery/scales.safetensors")
        save_file({key: value + 0.5 for key, value in scales.items()}, home / "trained.safetensors")
        _model(home / "tuned", files)
        made[files] = home
    return made


def _attach(home: Path) -> None:
    model = torch.nn.Module()
    layers = torch.nn.ModuleList()
    for _ in range(len(list((home / "model").glob("*.safetensors")))):
        layer = torch.nn.Module()
        layer.mlp = torch.nn.ModuleDict({name: torch.nn.Linear(16, 16, bias=False) for name in ("up", "down")})
        layers.append(layer)
    model.layers = layers
    weights = {key: value for file in (home / "model").glob("*.safetensors") for key, value in load_file(file).items()}
    model.load_state_dict(weights)
    surgery.attach(model, home / "factorized").detach()


@pytest.mark.filterwarnings("ignore::surgery.SurgeryWarning")
@pytest.mark.parametrize(
    "command",
    [
        lambda home, out: surgery.fold(home / "factorized", home / "trained.safetensors", out, device="cpu"),
        lambda home, out: surgery.verify(home / "factorized", device="cpu"),
        lambda home, out: surgery.verify(home / "factorized", fast=True, device="cpu"),
        lambda home, out: surgery.project(home / "factorized", home / "tuned", out / "s.safetensors", device="cpu"),
        lambda home, out: surgery.export(home / "factorized", home / "trained.safetensors", out),
        lambda home, out: _attach(home),
    ],
    ids=["fold", "verify", "verify fast", "project", "export", "attach"],
)
def test_nobody_looks_through_all_targets_for_each_weight_file(
    command: Callable[[Path, Path], object], factorized: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Manifest.read
    counted: list[_Counted] = []

    def reading(folder: str | Path) -> Manifest:
        manifest = read(folder)
        lists = {name: _Counted(getattr(manifest, name)) for name in ("targets", "skipped", "shards", "files")}
        counted.extend(lists.values())
        return dataclasses.replace(manifest, **lists)

    monkeypatch.setattr(Manifest, "read", reading)
    passes = {}
    for files, home in factorized.items():
        (tmp_path / f"{files}").mkdir()
        counted.clear()
        command(home, tmp_path / f"{files}")
        passes[files] = [one.passes for one in counted]
    assert sum(passes[2]) > 0
    assert passes[2] == passes[6]


def _manifest(count: int, rank: int, *, files: int = 4) -> Manifest:
    """As factorize writes it of so many matrices, with hashes and numbers that compress to nothing."""

    def digest(i: int) -> str:
        return f"{i:064x}"

    def target(i: int) -> TargetRecord:
        numbers = [float(f"{1e-6 + i * 1e-9 + j * 1e-8:.3g}") for j in range(rank)]
        gaps, known = [float(f"{1 + value:.3g}") for value in numbers], TopKRecord("likely", 0.0123, 1e-6)
        certificate = CertificateRecord("lanczos", 3, True, numbers, gaps, known)
        name, file = f"model.layers.{i % 64}.mlp.experts.{i}.up_proj.weight", f"model-{i % files}.safetensors"
        sample = (digest(i), digest(i + 1), 0.25)
        return TargetRecord(
            name, file, "BF16", [64, 64], "matrix", None, rank, 0.5, 2.0, 1.0, *sample, digest(i), [certificate], []
        )

    shards = []
    for i in range(files):
        weights = FileRecord(f"model-{i}.safetensors", 1, digest(i))
        shards.append(ShardRecord(weights, weights, FileRecord(f"surgery/factors-{i}.safetensors", 1, digest(i))))
    options = Options(rank)
    source = SourceRecord("folder", None, None)
    targets = [target(i) for i in range(count)]
    return Manifest(1, "surgery", "2", "cpu", "residual", source, options, digest(0), [], shards, [], [], targets, [])


def _peak(call: Callable[[], object]) -> int:
    """Bytes that the interpreter takes on the way, besides those that it has."""
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
        del result
        return peak
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_what_a_manifest_takes_for_each_target_is_counted(rank: int, tmp_path: Path) -> None:
    """Writing and reading it, which is where a run's memory is at its largest for many small targets."""
    small, large = (_manifest(count, rank) for count in (300, 1200))
    added = large.targets[len(small.targets) :]
    counted = known_bytes(added, len(added))
    folders = [tmp_path / "small", tmp_path / "large"]
    for manifest, folder in zip((small, large), folders, strict=True):
        manifest.write(folder)
        assert Manifest.read(folder) == manifest
    written = [_peak(lambda m=m, f=f: m.write(f)) for m, f in zip((small, large), folders, strict=True)]
    read = [_peak(lambda f=f: Manifest.read(f)) for f in folders]
    text = (folders[1] / "surgery/manifest.json").stat().st_size - (folders[0] / "surgery/manifest.json").stat().st_size
    assert written[1] - written[0] < 3.5 * text
    # Beside the records, which are there when it is written, and the interpreter's own waste: half of what is counted.
    assert read[1] - read[0] < counted / 2


class _Sent(LocalEngine):
    """Does each job as another process would: from what is sent to it, which is kept."""

    def run(self, jobs: ShardJobs[Any], which: Sequence[int], memory: Memory) -> Generator[tuple[int, Any], None, None]:
        self.sent = {index: pickle.dumps(jobs.remote(index)) for index in which}
        with Lane(torch.device("cpu"), memory) as lane:
            for index, job in self.sent.items():
                yield index, pickle.loads(job)(lane, f"{index}")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> _Sent:
    engine = _Sent("cpu", None, None, None)
    monkeypatch.setattr("surgery.run.run.engine_of", lambda *_: nullcontext(engine))
    return engine


@pytest.mark.filterwarnings("ignore::surgery.SurgeryWarning")
def test_a_job_elsewhere_gets_what_its_weight_file_takes_and_no_more(
    factorized: dict[int, Path], tmp_path: Path, sent: _Sent
) -> None:
    largest = {}
    for files, home in factorized.items():
        surgery.fold(home / "factorized", home / "trained.safetensors", tmp_path / f"{files}")
        largest[files] = max(map(len, sent.sent.values()))
        with pytest.MonkeyPatch.context() as here:
            here.setattr("surgery.run.run.engine_of", engine_of)
            surgery.fold(home / "factorized", home / "trained.safetensors", tmp_path / f"{files} here", device="cpu")
        assert files_of(tmp_path / f"{files}") == files_of(tmp_path / f"{files} here")
    assert largest[6] < 1.05 * largest[2]


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_job_elsewhere_gets_the_scales_of_weights_in_other_files(dequantize: bool, tmp_path: Path, sent: _Sent) -> None:
    base = quantize_model(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "base", apart=True)
    manifest = surgery.factorize(base, tmp_path / "f", rank=4, exclude=["*down_proj*"]).manifest
    scales = {target.key: torch.full(target.scales_shape, 1.25) for target in manifest.targets}
    options: dict[str, Any] = {"base": base, "dequantize": dequantize}
    surgery.fold(tmp_path / "f", scales, tmp_path / "sent", **options)
    with pytest.MonkeyPatch.context() as here:
        here.setattr("surgery.run.run.engine_of", engine_of)
        surgery.fold(tmp_path / "f", scales, tmp_path / "here", device="cpu", **options)
    assert files_of(tmp_path / "sent") == files_of(tmp_path / "here")


@pytest.mark.filterwarnings("ignore::surgery.SurgeryWarning")
def test_a_job_elsewhere_gets_the_targets_whose_aliases_are_in_its_file(tmp_path: Path, sent: _Sent) -> None:
    model = tmp_path / "m"
    save_llama(model, torch.bfloat16, shard_size="20KB", tie_word_embeddings=True)
    entries = json.loads((model / "model.safetensors.index.json").read_text())
    last = f"model-{len(set(entries['weight_map'].values())) + 1:05d}-of-x.safetensors"
    embedding = load_file(model / entries["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    save_file({"lm_head.weight": embedding}, model / last)
    entries["weight_map"]["lm_head.weight"] = last
    (model / "model.safetensors.index.json").write_text(json.dumps(entries))
    manifest = surgery.factorize(model, tmp_path / "f", rank=2, include=["*embed_tokens*", "*q_proj*"]).manifest
    assert [alias.shard for target in manifest.targets for alias in target.aliases] == [last]
    scales = {target.key: torch.full(target.scales_shape, 1.25) for target in manifest.targets}
    surgery.fold(tmp_path / "f", scales, tmp_path / "sent")
    with pytest.MonkeyPatch.context() as here:
        here.setattr("surgery.run.run.engine_of", engine_of)
        surgery.fold(tmp_path / "f", scales, tmp_path / "here", device="cpu")
    assert files_of(tmp_path / "sent") == files_of(tmp_path / "here")


def test_copies_in_a_model_of_an_unknown_class_are_told_once_each(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    save_file({f"layers.{i}.up.weight": weight.clone() for i in range(24)}, tmp_path / "m/model.safetensors")
    told = Silent()
    surgery.plan(tmp_path / "m", rank=2, progress=told)
    assert [note for note in told.notes if "(23 such pairs)" in note]


def test_targets_of_a_weight_file_and_their_aliases() -> None:
    manifest = _manifest(9, 1, files=3)
    tied = dataclasses.replace(manifest.targets[0], aliases=[Alias("head", "model-2.safetensors")])
    manifest = dataclasses.replace(manifest, targets=[tied, *manifest.targets[1:]])
    for file in ("model-0.safetensors", "model-2.safetensors", "other"):
        there = [target for target in manifest.targets if target.shard == file]
        assert manifest.targets_of(file) == there
        edited = {target.tensor for target in there} | ({"head"} if file == "model-2.safetensors" else set())
        assert set(manifest.edited_in(file)) == edited
    assert manifest.edited_in("model-2.safetensors")["head"] == tied


def test_copies_of_a_block_are_not_held_against_each_other_pair_by_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a mixture that was made of a dense model: every expert begins as the same weights."""
    import transformers

    from surgery.planning import aliases

    between = aliases._Ties.between
    asked: dict[int, int] = {}
    for experts in (4, 16):
        config = transformers.MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_local_experts=experts,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
        )
        model = transformers.MixtralForCausalLM(config)
        for parameter in (part for name, part in model.named_parameters() if ".experts." in name):
            with torch.no_grad():
                parameter.copy_(parameter[:1].clone().expand_as(parameter))
        model.save_pretrained(tmp_path / f"{experts}")
        calls: list[tuple[str, str]] = []
        monkeypatch.setattr(
            aliases._Ties, "between", lambda self, *pair, calls=calls: calls.append(pair) or between(self, *pair)
        )
        steps = surgery.plan(tmp_path / f"{experts}", rank=2)
        assert sum("experts" in target.tensor for target in steps.targets) == 3 * experts
        asked[experts] = len(calls)
    assert asked[16] <= asked[4]
