"""Results that go to the hub while they are made: the real client against a hub on this machine, and what comes back."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import surgery
from surgery.cli.main import main
from surgery.errors import OutputError, SurgeryError
from surgery.progress import Silent
from surgery.publish import upload
from tests.loopback_hub import WRITING_TOKEN, LoopbackHub, Repo
from tests.models import files_of, save_llama, tensors_of

pytestmark = [
    # The client sends a file in a way that its HTTP library would have otherwise.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # PEFT asks transformers for an attribute that has a new name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What is said of an upload, where a test does not listen.
    pytest.mark.filterwarnings(
        "ignore:uploaded to |.* is already complete|the repository .* exists already:surgery.errors.SurgeryWarning"
    ),
]

CARD = "---\nlicense: apache-2.0\n---\n\n# The source's own card\n"
SCALES = "surgery/scales.safetensors"


@pytest.fixture(autouse=True)
def _token_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITING_TOKEN)
    monkeypatch.setattr(upload, "_SECONDS_TO_SETTLE", 0.1)
    monkeypatch.setattr(upload, "_SECONDS_BETWEEN_COMMITS", 0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a dozen weight files or so, with a card."""
    folder = save_llama(tmp_path_factory.mktemp("model") / "m", torch.bfloat16, shard_size="14KB", num_hidden_layers=4)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def trained(factorized: Path) -> dict[str, torch.Tensor]:
    """Scales of which one target's are still 1."""
    generator = torch.Generator().manual_seed(1)
    scales = load_file(factorized / SCALES)
    first = min(scales)
    return {
        key: value if key == first else 1 + 0.5 * torch.randn(value.shape, generator=generator) for key, value in scales.items()
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def downloaded(name: str, folder: Path) -> dict[str, bytes]:
    """The files of a repository, as its users get them; without those that the hub and its client put there."""
    huggingface_hub.snapshot_download(name, local_dir=folder)
    shutil.rmtree(folder / ".cache")
    (folder / ".gitattributes").unlink(missing_ok=True)
    return files_of(folder)


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "README.md"}


def front_matter(repo: Repo) -> dict[str, object]:
    found = re.match(r"---\n(.*?)\n---\n", (repo.folder / "README.md").read_text(), re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def looks_whole(files: dict[str, str]) -> bool:
    """Whether a loader, ``surgery fold`` or PEFT would take the files for something finished."""
    return bool({"config.json", "surgery/manifest.json", "adapter_config.json"} & files.keys())


def weight_files(out: Path) -> dict[str, str]:
    """sha256 of residuals and factors."""
    return {name: sha256(data) for name, data in files_of(out).items() if name.endswith(".safetensors") and name != SCALES}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("carded", [True, False])
def test_what_comes_back_is_what_was_made(hub: LoopbackHub, shards: Path, tmp_path: Path, private: bool, carded: bool) -> None:
    """It verifies, and folds to the source's files; its own card is in the place of the source's."""
    shutil.copytree(shards, tmp_path / "m")
    if not carded:
        (tmp_path / "m/README.md").unlink()
    name, progress = f"acme/f-{private}-{carded}", Silent()
    manifest = surgery.factorize(
        tmp_path / "m", tmp_path / "f", rank=4, push_to_hub=name, **({} if private else {"private": False}), progress=progress
    ).manifest
    repo = hub.repos[name]
    assert repo.private is private
    assert progress.notes[-1] == f"uploaded to {hub.url}/{name}" + (" (private)" if private else "")
    ours, theirs = files_of(tmp_path / "f"), downloaded(name, tmp_path / "back")
    assert theirs.keys() == ours.keys() | {"README.md"}
    differing = {file for file in ours if ours[file] != theirs[file]}
    # The manifest of what is here speaks of the source's card, which is not there.
    assert differing == ({"README.md", "surgery/manifest.json"} if carded else set())
    assert not carded or ours["README.md"] == CARD.encode()
    card = theirs["README.md"].decode()
    assert ("# The source's own card" in card) is carded
    assert front_matter(repo).get("license") == ("apache-2.0" if carded else None)
    assert "surgery" in front_matter(repo)["tags"]
    assert "# Unfinished" not in card
    report = surgery.verify(tmp_path / "back")
    assert (report.ok, report.targets) == (True, len(manifest.targets))
    surgery.fold(tmp_path / "back", tmp_path / "back" / SCALES, tmp_path / "folded")
    assert files_of(tmp_path / "folded") == without_card(files_of(tmp_path / "m"))


class _Patient(Silent):
    """When the run comes to its last weight file, waits until this many commits have been made, so the run is not over."""

    def __init__(self, hub: LoopbackHub, name: str, last: set[str], commits: int, *, then_stop: bool = False) -> None:
        super().__init__()
        self.waited = False
        self._hub, self._name, self._last, self._commits, self._then_stop = hub, name, last, commits, then_stop

    def item(self, name: str) -> None:
        if name in self._last and not self.waited:
            self.waited = True
            end = time.monotonic() + 10
            while len(self._hub.repos[self._name].history) < self._commits:
                assert time.monotonic() < end, "no commit has been made while the run goes on"
                time.sleep(0.01)
            if self._then_stop:
                raise KeyboardInterrupt


def last_targets(model: Path) -> set[str]:
    steps = surgery.plan(model, rank=4)
    return {target.tensor for target in next(shard for shard in reversed(steps.shards) if shard.targets).targets}


def test_each_shard_is_uploaded_while_the_others_are_made(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    # All but those that may be in hand when the last one is.
    early = len(surgery.plan(shards, rank=4).shards) - 3
    assert early > 4
    progress = _Patient(hub, "acme/meanwhile", last_targets(shards), early)
    manifest = surgery.factorize(shards, tmp_path / "f", rank=4, push_to_hub="acme/meanwhile", progress=progress).manifest
    assert progress.waited
    *history, last = hub.repos["acme/meanwhile"].history
    added, before = [], {".gitattributes", "README.md"}
    for commit in history:
        assert not looks_whole(commit.files)
        added.append(commit.files.keys() - before)
        before |= commit.files.keys()
    # Each commit brings a shard: what is left of its weights together with their factors.
    expected = [{r.file for r in (shard.residual, shard.factors) if r is not None} for shard in manifest.shards]
    assert sorted(map(sorted, added)) == sorted(map(sorted, expected))
    assert looks_whole(last.files)
    assert {name: last.files[name] for name in weight_files(tmp_path / "f")} == weight_files(tmp_path / "f")


class _StopWhileUploading(Silent):
    """Interrupts while all that is left is to wait for the upload."""

    def start(self, label: str, total_bytes: int) -> None:
        if label == "uploading":
            raise KeyboardInterrupt


def test_interrupted_while_a_complete_result_is_uploaded(
    hub: LoopbackHub, llama: Path, factorized: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The hint speaks of the upload, of all that can be uploaded; once that is complete there is none."""
    f = Path(shutil.copytree(factorized, tmp_path / "f"))
    surgery.fold(f, trained, tmp_path / "o")
    calls = {
        "factorize": lambda **options: surgery.factorize(llama, f, rank=4, **options),
        "fold": lambda **options: surgery.fold(f, trained, tmp_path / "o", **options),
        "export": lambda **options: surgery.export(f, trained, tmp_path / "a", **options),
    }
    for name, call in calls.items():
        said = _StopWhileUploading()
        with pytest.raises(KeyboardInterrupt):
            call(push_to_hub=f"acme/late-{name}", progress=said)
        hint = f"stopped before the upload to acme/late-{name} was complete; the same command continues from there"
        assert said.notes[-1] == hint
        assert not any(looks_whole(commit.files) for commit in hub.repos[f"acme/late-{name}"].history)
        call(push_to_hub=f"acme/late-{name}", progress=Silent())
        assert looks_whole(hub.repos[f"acme/late-{name}"].history[-1].files)


def test_interrupted_run_leaves_no_model_and_goes_on(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    name, stop = "acme/stopped", _Patient(hub, "acme/stopped", last_targets(shards), 3, then_stop=True)
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(shards, tmp_path / "f", rank=5, push_to_hub=name, progress=stop)
    repo = hub.repos[name]
    there = repo.history[-1].files
    assert not looks_whole(there)
    assert "# Unfinished" in (repo.folder / "README.md").read_text()
    finished = {file for file in there if file.endswith(".safetensors")}
    assert finished
    modified = {file: (tmp_path / "f" / file).stat().st_mtime_ns for file in finished}
    downloaded(name, tmp_path / "half")
    with pytest.raises(SurgeryError, match=r"manifest\.json"):
        surgery.fold(tmp_path / "half", tmp_path / "half" / SCALES, tmp_path / "x")
    with pytest.raises(ValueError, match=r"config\.json"):
        transformers.AutoModel.from_pretrained(tmp_path / "half")

    for value in there.values():
        hub.blobs.pop(value, None)  # or the hub would not want them a second time anyway
    before, again = len(hub.received), Silent()
    surgery.factorize(shards, tmp_path / "f", rank=5, push_to_hub=name, progress=again)
    assert any(note.startswith("continuing after") for note in again.notes)
    assert {file: (tmp_path / "f" / file).stat().st_mtime_ns for file in finished} == modified
    received = hub.received[before:]
    assert received
    assert set(received).isdisjoint(there.values())
    assert {file: repo.history[-1].files[file] for file in weight_files(tmp_path / "f")} == weight_files(tmp_path / "f")
    assert "# Unfinished" not in (repo.folder / "README.md").read_text()
    downloaded(name, tmp_path / "back")
    assert surgery.verify(tmp_path / "back").ok
    surgery.fold(tmp_path / "back", tmp_path / "back" / SCALES, tmp_path / "folded")
    assert files_of(tmp_path / "folded") == without_card(files_of(shards))


def test_what_is_complete_already_is_uploaded(
    hub: LoopbackHub, llama: Path, factorized: Path, tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    shutil.copytree(factorized, tmp_path / "f")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*")}
    progress = Silent()
    surgery.factorize(llama, tmp_path / "f", rank=4, push_to_hub="acme/afterwards", progress=progress)
    assert f"{tmp_path / 'f'} is already complete" in progress.notes
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*")} == before
    assert without_card(downloaded("acme/afterwards", tmp_path / "back")) == files_of(factorized)
    # And once more: there is nothing to commit.
    commits = len(hub.repos["acme/afterwards"].history)
    surgery.factorize(llama, tmp_path / "f", rank=4, push_to_hub="acme/afterwards")
    assert len(hub.repos["acme/afterwards"].history) == commits

    surgery.fold(factorized, trained, tmp_path / "o")
    surgery.fold(factorized, trained, tmp_path / "o", push_to_hub="acme/folded-afterwards")
    assert without_card(downloaded("acme/folded-afterwards", tmp_path / "o2")) == files_of(tmp_path / "o")


def test_from_hub_to_hub(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    """On the command line: the model comes file by file, and goes so; nothing of it stays in the cache."""
    hub.publish("acme/whence", shards)
    done = CliRunner().invoke(
        main,
        ["factorize", "acme/whence", "--rank", "6", "--stream", "--push-to-hub", "acme/whither", "-o", str(tmp_path / "f")],
        catch_exceptions=False,
    )
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"note: uploaded to {hub.url}/acme/whither (private)\n" in done.stderr
    assert hub.repos["acme/whither"].private
    assert front_matter(hub.repos["acme/whither"])["base_model"] == "acme/whence"
    cached = [path.name for path in shards.iterdir() if huggingface_hub.try_to_load_from_cache("acme/whence", path.name)]
    assert "config.json" in cached
    assert not any(name.endswith(".safetensors") for name in cached)
    downloaded("acme/whither", tmp_path / "back")
    assert surgery.verify(tmp_path / "back").ok
    surgery.fold(tmp_path / "back", tmp_path / "back" / SCALES, tmp_path / "folded")
    assert files_of(tmp_path / "folded") == without_card(files_of(shards))
    surgery.factorize(shards, tmp_path / "truth", rank=6)
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "truth")


@pytest.mark.parametrize("command", ["factorize", "fold", "export"])
def test_no_token_is_told_before_any_work(
    hub: LoopbackHub, llama: Path, factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    arguments = [llama, "--rank", 4] if command == "factorize" else [factorized, factorized / SCALES]
    arguments = [command, *arguments, "--push-to-hub", "acme/refused", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: acme/refused cannot be uploaded to without a token")
    assert "try:      hf auth login" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "acme/refused" not in hub.repos


def test_a_model_of_somebody_else_is_not_replaced(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    """Told before any work as well."""
    repo = hub.publish("acme/precious-model", shutil.copytree(llama, tmp_path / "precious"))
    before = files_of(repo.folder)
    with pytest.raises(OutputError, match="holds a model that surgery has not uploaded"):
        surgery.factorize(llama, tmp_path / "f", rank=4, push_to_hub="acme/precious-model")
    assert files_of(repo.folder) == before
    assert not (tmp_path / "f").exists()


def test_folded_model(
    hub: LoopbackHub, llama: Path, factorized: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    surgery.fold(factorized, trained, tmp_path / "o", push_to_hub="acme/folded", private=False)
    repo = hub.repos["acme/folded"]
    assert not repo.private
    *history, last = repo.history
    assert len(history) == len(list(llama.glob("*.safetensors")))
    assert not any(looks_whole(commit.files) for commit in history)
    assert looks_whole(last.files)
    assert without_card(downloaded("acme/folded", tmp_path / "back")) == files_of(tmp_path / "o")
    changed = {
        name for name, tensor in tensors_of(tmp_path / "back").items() if not torch.equal(tensor, tensors_of(llama)[name])
    }
    assert changed == set(trained) - {min(trained)}
    card = (tmp_path / "back/README.md").read_text()
    assert "13 of\n14 targets" in card
    assert "LlamaForCausalLM.from_pretrained('acme/folded')" in card
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    # Scales that are all 1 take its place, and the card says so.
    done = len(repo.history)
    surgery.fold(factorized, factorized / SCALES, tmp_path / "same", push_to_hub="acme/folded")
    *meanwhile, last = repo.history[done:]
    assert meanwhile
    assert not any(looks_whole(commit.files) for commit in meanwhile)
    assert looks_whole(last.files)
    assert without_card(downloaded("acme/folded", tmp_path / "back2")) == files_of(llama)
    assert "scales that are all 1" in (tmp_path / "back2/README.md").read_text()


def test_folded_model_with_a_card_of_its_own(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    surgery.factorize(shards, tmp_path / "f", rank=2)
    surgery.fold(tmp_path / "f", tmp_path / "f" / SCALES, tmp_path / "o", push_to_hub="acme/folded-carded")
    assert files_of(tmp_path / "o") == files_of(shards)
    back = downloaded("acme/folded-carded", tmp_path / "back")
    assert without_card(back) == without_card(files_of(shards))
    assert back["README.md"].decode().endswith("## Card of the original model\n\n# The source's own card\n")
    assert front_matter(hub.repos["acme/folded-carded"])["license"] == "apache-2.0"


@pytest.mark.parametrize("license_", ["MIT", "brand-new-1.0", "home-made", "bad[license]"])
def test_the_hub_says_which_licenses_it_takes(hub: LoopbackHub, llama: Path, tmp_path: Path, license_: str) -> None:
    """One that it refuses, and nothing else, is left out; also where it has to be asked twice."""
    model = Path(shutil.copytree(llama, tmp_path / "m"))
    (model / "README.md").write_text(f"---\nlicense: '{license_}'\nlanguage: [en, de]\n---\nIts text.\n")
    name = f"acme/licensed-{len(license_)}"
    hub.fail_next(1, 503, "/api/validate-yaml")
    surgery.factorize(model, tmp_path / "f", rank=2, push_to_hub=name)
    metadata = front_matter(hub.repos[name])
    kept = {} if license_ in ("home-made", "bad[license]") else {"license": license_.lower()}
    assert metadata == {**kept, "language": ["en", "de"], "tags": ["surgery"]}
    card = (hub.repos[name].folder / "README.md").read_text()
    assert card.endswith("\n\n## Card of the original model\n\nIts text.\n")
    again = Silent()
    surgery.factorize(model, tmp_path / "f", rank=2, push_to_hub=name, progress=again)
    assert (hub.repos[name].folder / "README.md").read_text() == card


def test_an_adapter_whose_upload_failed_is_uploaded_by_the_same_command(
    hub: LoopbackHub, factorized: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    hub.fail_next(1, 403, "/commit/")
    with pytest.raises(OutputError, match="may not be written to"):
        surgery.export(factorized, trained, tmp_path / "lora", push_to_hub="acme/again")
    surgery.export(factorized, trained, tmp_path / "lora", push_to_hub="acme/again")
    assert without_card(downloaded("acme/again", tmp_path / "back")) == files_of(tmp_path / "lora")
    with pytest.raises(OutputError, match="is there already"):
        surgery.export(factorized, factorized / SCALES, tmp_path / "lora", push_to_hub="acme/never")
    assert "acme/never" not in hub.repos


def test_cores(hub: LoopbackHub, llama: Path, factorized: Path, tmp_path: Path) -> None:
    """A factorized checkpoint with cores, a model that cores were folded into, and an adapter of them: each card says so."""
    generator = torch.Generator().manual_seed(1)
    cores = {key: torch.eye(4) + 0.1 * torch.randn(4, 4, generator=generator) for key in load_file(factorized / SCALES)}
    cores[min(cores)] = torch.eye(4)
    formula = "W + U diag(√s) (C - I) diag(√s) Vᵀ"

    def card(name: str) -> str:
        """Its text, in one line."""
        return " ".join((hub.repos[name].folder / "README.md").read_text().split())

    surgery.factorize(llama, tmp_path / "f", rank=4, train="core", push_to_hub="acme/with-cores")
    text = card("acme/with-cores")
    assert "the core C, a small matrix between them, 224 numbers in all, is what can be trained" in text
    assert f"`{formula}`" in text
    assert "- Trainable numbers in cores: 224" in text
    assert 'surgery.attach(model, "factorized", train="core")' in text
    assert "Cores that are all the identity give the original weights back" in text
    assert without_card(downloaded("acme/with-cores", tmp_path / "back")) == files_of(tmp_path / "f")
    surgery.fold(tmp_path / "back", tmp_path / "back" / SCALES, tmp_path / "folded")
    assert files_of(tmp_path / "folded") == files_of(llama)
    # A complete result of the other kind: file and card are those of what is asked for.
    surgery.factorize(llama, tmp_path / "f", rank=4, push_to_hub="acme/with-cores", progress=Silent())
    assert "one scale for each of them, 56 in all" in card("acme/with-cores")
    assert {value.ndim for value in load_file(hub.repos["acme/with-cores"].folder / SCALES).values()} == {1}

    surgery.fold(factorized, cores, tmp_path / "o", push_to_hub="acme/folded-cores")
    text = card("acme/folded-cores")
    assert f"with trained cores folded into its weights by surgery: 13 of 14 targets have become `{formula}`" in text
    assert "- Trainable numbers in cores: 224" in text
    untouched = {key: torch.eye(4) for key in cores}
    surgery.fold(factorized, untouched, tmp_path / "same", push_to_hub="acme/folded-cores")
    assert "put together again by surgery, with cores that are all the identity." in card("acme/folded-cores")

    surgery.export(factorized, cores, tmp_path / "lora", push_to_hub="acme/lora-of-cores")
    text = card("acme/lora-of-cores")
    assert (
        "Trained cores between the top singular directions of A model, exported by surgery as a LoRA adapter of rank 4" in text
    )
    assert "`B = U diag(√s) (C - I) diag(√s)`" in text
    assert without_card(downloaded("acme/lora-of-cores", tmp_path / "back2")) == files_of(tmp_path / "lora")


def test_adapter(hub: LoopbackHub, llama: Path, factorized: Path, trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    surgery.export(factorized, trained, tmp_path / "lora", push_to_hub="acme/lora")
    repo = hub.repos["acme/lora"]
    assert repo.private
    assert [looks_whole(commit.files) for commit in repo.history] == [True]
    back = downloaded("acme/lora", tmp_path / "back")
    assert without_card(back) == files_of(tmp_path / "lora")
    assert front_matter(repo)["library_name"] == "peft"
    assert json.loads(back["adapter_config.json"])["r"] == 4

    surgery.fold(factorized, trained, tmp_path / "o")

    def output(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.arange(20)[None]).logits

    def load(folder: Path) -> transformers.LlamaForCausalLM:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    original, folded = output(load(llama)), output(load(tmp_path / "o"))
    adapted = output(peft.PeftModel.from_pretrained(load(llama), tmp_path / "back"))
    # The folded weights are bfloat16, the adapted ones are not rounded.
    assert (adapted - folded).abs().max() < 0.1 * (original - folded).abs().max()


def test_what_replaces_another_result_is_uploaded_first(
    hub: LoopbackHub, factorized: Path, tmp_path: Path, trained: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the upload fails the earlier result is still here, and the same command goes on; it may be repeated."""
    out, name = tmp_path / "o", "acme/replaced-here"
    surgery.fold(factorized, factorized / SCALES, out)
    before = files_of(out)
    with monkeypatch.context() as patched:
        patched.setattr(upload.Upload, "finish", lambda *_, **__: (_ for _ in ()).throw(OutputError("the hub is gone")))
        with pytest.raises(OutputError, match="the hub is gone"):
            surgery.fold(factorized, trained, out, push_to_hub=name, overwrite=True)
    assert {file: data for file, data in files_of(out).items() if not file.startswith(".surgery/")} == before
    surgery.fold(factorized, trained, out, push_to_hub=name, overwrite=True)
    surgery.fold(factorized, trained, tmp_path / "alone")
    assert files_of(out) == files_of(tmp_path / "alone")
    assert without_card(downloaded(name, tmp_path / "back")) == without_card(files_of(out))
