"""Results on their way to the hub, through the real client, against a hub on this machine that takes uploads."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import surgery
from surgery.errors import OutputError, ReadError
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import SourceRecord
from surgery.progress import Progress, heard
from surgery.publish import upload
from surgery.publish.adapter_cards import adapter_card
from surgery.publish.card import factorized_card, folded_card, published
from surgery.publish.card_parts import without_license
from surgery.publish.told import ExportedUpdate, FoldedChanges
from surgery.publish.upload import Upload
from tests.loopback_hub import READING_TOKEN, WRITING_TOKEN, LoopbackHub, Repo
from tests.models import files_of

# The client sends a file in a way that its HTTP library would have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\ntags:\n- surgery\n---\n\n# Whole\n"
SMALL = {"config.json": b"{}", "surgery/manifest.json": b'{"made": "up"}'}


@pytest.fixture(autouse=True)
def _token_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITING_TOKEN)
    monkeypatch.setattr(upload, "_SECONDS_TO_SETTLE", 0.1)
    monkeypatch.setattr(upload, "_SECONDS_BETWEEN_COMMITS", 0.0)


def weights(folder: Path, seed: str, count: int = 3) -> dict[str, Path]:
    """Files that the hub stores as LFS, by their names; other contents for another seed."""
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest() * 300)
    return {name: folder / name for name in names}


def push(name: str, files: Mapping[str, Path], small: Mapping[str, Path | bytes] = SMALL, **options: bool) -> str:
    with Upload.open(name, **options) as target:
        for file, path in files.items():
            target.submit(path, file, sha256(path.read_bytes()))
        return target.finish(small, CARD)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hashes(files: Mapping[str, Path | bytes]) -> dict[str, str]:
    return {name: sha256(data if isinstance(data, bytes) else data.read_bytes()) for name, data in files.items()}


def looks_whole(files: Mapping[str, str]) -> bool:
    return bool({"config.json", "surgery/manifest.json", "adapter_config.json"} & files.keys())


def head(repo: Repo) -> dict[str, str]:
    """The files of the repository, but for the one that the hub puts there."""
    return {name: value for name, value in repo.history[-1].files.items() if name != ".gitattributes"}


def test_new_repository_is_private_and_holds_the_same_bytes(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "a")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files.values()}
    assert push("acme/new", files) == f"{hub.url}/acme/new"
    repo = hub.repos["acme/new"]
    assert repo.private
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files.values()} == before
    huggingface_hub.snapshot_download("acme/new", local_dir=tmp_path / "back")
    back = {name: data for name, data in files_of(tmp_path / "back").items() if not name.startswith(".")}
    assert back == {**{name: path.read_bytes() for name, path in files.items()}, **SMALL, "README.md": CARD.encode()}
    assert [commit.message for commit in repo.history] == [*(f"Add {name}" for name in files), "Complete the upload"]
    # Until the last commit nobody takes it for a model, and it says why.
    assert not any(looks_whole(commit.files) for commit in repo.history[:-1])
    assert all(commit.files["README.md"] == sha256(upload._UNFINISHED) for commit in repo.history[:-1])


@pytest.mark.parametrize("private", [True, False])
def test_visibility(hub: LoopbackHub, tmp_path: Path, private: bool) -> None:
    push(f"acme/new-{private}", {}, private=private)
    assert hub.repos[f"acme/new-{private}"].private == private
    # What is there stays as it is, whatever is asked for.
    there = hub.create(f"acme/there-{private}", private=not private)
    with Upload.open(f"acme/there-{private}", private=private) as target:
        assert target.private is (not private)
    assert there.private is (not private)
    assert there is hub.repos[f"acme/there-{private}"]


def test_name_without_an_owner(hub: LoopbackHub) -> None:
    with Upload.open("ownerless") as target:
        assert target.repo_id == "acme/ownerless"
        assert target.finish(SMALL, CARD) == f"{hub.url}/acme/ownerless"


def test_files_of_a_shard_come_together(hub: LoopbackHub, tmp_path: Path) -> None:
    (shard, path), (_, other), _ = weights(tmp_path / "w", "a").items()
    with Upload.open("acme/together") as target:
        target.submit_all([(path, shard, None), (other, "surgery/factors-00001-of-00001.safetensors", None)])
        target.finish(SMALL, CARD)
    first, *_ = hub.repos["acme/together"].history
    assert {shard, "surgery/factors-00001-of-00001.safetensors"} <= first.files.keys()


def test_rerun_uploads_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "a")
    push("acme/rerun", files)
    commits, requests = len(hub.repos["acme/rerun"].history), len(hub.requests)
    push("acme/rerun", files)
    with Upload.open("acme/rerun") as target:  # nor when the hashes are not known
        for name, path in files.items():
            target.submit(path, name)
        target.finish(SMALL, CARD)
    assert len(hub.repos["acme/rerun"].history) == commits
    # Nor are the files read again to ask about their contents.
    assert not [path for _, path, _ in hub.requests[requests:] if "/preupload/" in path or "/lfs/" in path]


def test_interrupted_upload_goes_on(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "interrupted")
    name, path = next(iter(files.items()))
    with Upload.open("acme/interrupted") as target:
        target.submit(path, name)
    assert not looks_whole(head(hub.repos["acme/interrupted"]))
    received = len(hub.received)
    push("acme/interrupted", files)
    assert len(hub.received) == received + 2
    assert head(hub.repos["acme/interrupted"]) == hashes({**files, **SMALL, "README.md": CARD.encode()})


def test_commits_are_not_made_too_often(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_SECONDS_BETWEEN_COMMITS", 60.0)
    files = weights(tmp_path / "w", "a", 5)
    start = time.monotonic()
    push("acme/pace", files)
    assert time.monotonic() - start < 30
    messages = [commit.message for commit in hub.repos["acme/pace"].history]
    first, second, *_ = list(files)[1:]
    assert messages == [f"Add {next(iter(files))}", f"Add {first}, {second} and 2 more", "Complete the upload"]


def test_what_waits_is_committed_when_its_time_has_come(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing follows it: the next shard of a large model may take longer than a commit may wait."""
    monkeypatch.setattr(upload, "_SECONDS_BETWEEN_COMMITS", 0.5)
    files = weights(tmp_path / "w", "a", 2)
    with Upload.open("acme/due") as target:
        for name, path in files.items():
            target.submit(path, name)
        repo, until = hub.repos["acme/due"], time.monotonic() + 60
        while len(repo.history) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert [commit.message for commit in repo.history] == [f"Add {name}" for name in files]
        assert hashes(files).items() <= head(repo).items()


@pytest.mark.parametrize(
    ("part", "status"), [("/paths-info/", 500), ("/preupload/", 503), ("/lfs/", 503), ("/commit/", 503), ("/commit/", 429)]
)
def test_passing_failures_are_waited_out(hub: LoopbackHub, tmp_path: Path, part: str, status: int) -> None:
    name = f"acme/failing-{part.strip('/')}-{status}"
    files = weights(tmp_path / "w", name, 2)
    hub.fail_next(1, status, part)
    push(name, files)
    assert hub.failing(part) is None  # it has failed, once
    assert head(hub.repos[name]) == hashes({**files, **SMALL, "README.md": CARD.encode()})


def test_commits_whose_answers_are_lost_are_not_made_twice(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "a", 1)
    hub.fail_next(2, 504, "/acme/lost/commit/", done_all_the_same=True)  # the weights', then the last
    push("acme/lost", files)
    repo = hub.repos["acme/lost"]
    assert [commit.message for commit in repo.history] == [f"Add {next(iter(files))}", "Complete the upload"]
    assert head(repo) == hashes({**files, **SMALL, "README.md": CARD.encode()})


def test_lasting_failures_are_raised_where_the_next_file_is_submitted(hub: LoopbackHub, tmp_path: Path) -> None:
    (name, path), (other, second), _ = weights(tmp_path / "w", "a").items()
    hub.fail_next(1000, 503, "/acme/down/commit/")
    with pytest.raises(OutputError, match="acme/down cannot be uploaded to") as caught:
        with Upload.open("acme/down") as target:
            target.submit(path, name)
            target._thread.join()
            target.submit(second, other)
    assert "503" in str(caught.value)
    assert "not uploaded twice" in str(caught.value)
    with pytest.raises(OutputError, match="acme/down cannot be uploaded to"), Upload.open("acme/down") as target:
        target.submit(path, name)  # raised on leaving
    with pytest.raises(OutputError, match="acme/down cannot be uploaded to"), Upload.open("acme/down") as target:
        target.submit(path, name)
        target.finish(SMALL, CARD)
    assert hub.repos["acme/down"].history == []


def test_token_that_may_not_write(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("acme/readable", private=False)
    monkeypatch.setenv("HF_TOKEN", READING_TOKEN)
    for name in ("acme/readable", "acme/not-to-be-made"):
        with pytest.raises(OutputError, match=f"{name} may not be written to with your token") as caught:
            Upload.open(name)
        assert "hf auth login" in str(caught.value)
    assert "acme/not-to-be-made" not in hub.repos
    # Taken away while the run goes on: not tried again and again.
    monkeypatch.setenv("HF_TOKEN", WRITING_TOKEN)
    with pytest.raises(OutputError, match="may not be written to"), Upload.open("acme/readable") as target:
        monkeypatch.setenv("HF_TOKEN", READING_TOKEN)
        before = len(hub.requests)
        for name, path in weights(tmp_path / "w", "a").items():
            target.submit(path, name)
    assert len(hub.requests) == before + 1


def test_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match="cannot be uploaded to without a token") as caught:
        Upload.open("acme/anonymous")
    assert "hf auth login, or set HF_TOKEN" in str(caught.value)


def test_unknown_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_from_elsewhere")
    with pytest.raises(OutputError, match="does not know your token"):
        Upload.open("acme/stranger")


@pytest.mark.parametrize("name", ["a/b/c", "acme/two words", "acme/..", "-acme/x", "", "acme/x.git", "../x"])
def test_bad_names(hub: LoopbackHub, name: str) -> None:
    before = len(hub.requests)
    with pytest.raises(OutputError, match="is no valid repo id") as caught:
        Upload.open(name)
    assert "owner/name" in str(caught.value)
    assert len(hub.requests) == before


def test_hub_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match="acme/down-hub cannot be reached"):
        Upload.open("acme/down-hub")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="the client is offline") as caught:
        Upload.open("acme/offline-upload")
    assert "unset HF_HUB_OFFLINE" in str(caught.value)


def test_other_result_is_replaced_without_a_mixed_one_in_between(hub: LoopbackHub, tmp_path: Path) -> None:
    old = weights(tmp_path / "old", "old", 4)
    push("acme/replaced", {**old, "surgery/factors-00001-of-00004.safetensors": old["model-00001-of-00004.safetensors"]})
    repo = hub.repos["acme/replaced"]
    (repo.folder / "samples.txt").write_text("somebody's own")
    (repo.folder / "text_encoder").mkdir()
    (repo.folder / "text_encoder/model.safetensors").write_bytes(b"of the old one")
    (repo.folder / "model.safetensors.index.json").write_text("{}")
    (repo.folder / "surgery/report.html").write_text("of the old one")
    (repo.folder / "adapter_config.json").write_text("{}")
    done = len(repo.history)
    new = weights(tmp_path / "new", "new", 2)
    small = {"config.json": b'{"new": 1}'}
    push("acme/replaced", new, small)
    first, *_, last = repo.history[done:]
    assert first.files.keys() >= old.keys() | {"model-00001-of-00002.safetensors"}
    assert [looks_whole(commit.files) for commit in repo.history[done:]] == [False, False, True]
    final = hashes({**new, **small, "README.md": CARD.encode(), "samples.txt": b"somebody's own"})
    assert {name: value for name, value in last.files.items() if name != ".gitattributes"} == final


def test_small_change_is_one_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "a")
    push("acme/small-change", files)
    repo = hub.repos["acme/small-change"]
    before = len(repo.history)
    push("acme/small-change", files, {**SMALL, "tokenizer.json": b"{}"})
    assert [commit.message for commit in repo.history[before:]] == ["Complete the upload"]
    assert head(repo) == hashes({**files, **SMALL, "tokenizer.json": b"{}", "README.md": CARD.encode()})


def test_weights_among_the_last_files_replace_others_in_one_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    for seed in ("one", "two"):
        path = weights(tmp_path / "w", seed, 1)["model-00001-of-00001.safetensors"]
        files = {"adapter_model.safetensors": path, "adapter_config.json": b"{}"}
        push("acme/adapter", {}, files)
    repo = hub.repos["acme/adapter"]
    assert [looks_whole(commit.files) for commit in repo.history] == [True, True]
    assert head(repo) == hashes({**files, "README.md": CARD.encode()})


def test_model_of_another_origin_is_not_replaced(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    repo = hub.publish("acme/precious", tmp_path / "m")
    with pytest.raises(OutputError, match="acme/precious holds a model that surgery has not uploaded") as caught:
        Upload.open("acme/precious")
    assert "config.json" in str(caught.value)
    assert repo.history == []
    # One that is told to be replaceable is.
    (repo.folder / "README.md").write_text("---\ntags: [surgery]\n---\n")
    push("acme/precious", {})
    assert head(repo).keys() == {
        "README.md",
        "tokenizer.json",
        "generation_config.json",
        "additional_chat_templates/notes.jinja",
        *SMALL,
    }


def test_what_git_ignores_is_uploaded(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = hub.create("acme/ignoring", private=True)
    (repo.folder / ".gitignore").write_text("*.safetensors\n*.json\n")
    files = weights(tmp_path / "w", "a")
    push("acme/ignoring", files)
    assert head(repo).keys() == files.keys() | SMALL.keys() | {"README.md", ".gitignore"}


def test_failing_run_leaves_at_once_and_commits_nothing_more(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "left")
    hub.gate.clear()
    try:
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt), Upload.open("acme/left") as target:
            for name, path in files.items():
                target.submit(path, name)
            raise KeyboardInterrupt
        assert time.monotonic() - start < 5
    finally:
        hub.gate.set()
    target._thread.join(timeout=10)
    assert not target._thread.is_alive()
    assert hub.repos["acme/left"].history == []


def test_change_by_somebody_else_is_found_at_the_end(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "a")
    with pytest.raises(OutputError, match="has been changed by somebody else") as caught, Upload.open("acme/shared") as target:
        for name, path in files.items():
            target.submit(path, name)
        target._queue.put(None)
        target._thread.join()
        hub.repos["acme/shared"].apply("Mine", {"model-00002-of-00003.safetensors": b"other weights"})
        target.finish(SMALL, CARD)
    assert "model-00002-of-00003.safetensors" in str(caught.value)
    assert not looks_whole(head(hub.repos["acme/shared"]))
    # A change of something else is none of our business.
    with Upload.open("acme/shared") as target:
        for name, path in files.items():
            target.submit(path, name)
        hub.repos["acme/shared"].apply("Mine", {"samples.txt": b"x"})
        target.finish(SMALL, CARD)
    assert head(hub.repos["acme/shared"]) == hashes({**files, **SMALL, "README.md": CARD.encode(), "samples.txt": b"x"})


def test_change_by_somebody_else_at_the_last_moment(hub: LoopbackHub, tmp_path: Path) -> None:
    files = weights(tmp_path / "w", "a")
    with Upload.open("acme/race") as target:
        for name, path in files.items():
            target.submit(path, name)
        # Between the look at what is there and the last commit.
        hub.meanwhile["/acme/race/tree/"] = lambda: hub.repos["acme/race"].apply("Mine", dict.fromkeys(files, b"others"))
        with pytest.raises(OutputError, match="has been changed by somebody else"):
            target.finish(SMALL, CARD)
    assert not looks_whole(head(hub.repos["acme/race"]))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"gone\.safetensors: cannot be read"), Upload.open("acme/gone") as target:
        target.submit(tmp_path / "gone.safetensors", "gone.safetensors")
    with pytest.raises(OutputError, match="the hub does not accept this file"), Upload.open("acme/gone") as target:
        target.finish({".git/config": b""}, CARD)


def test_card_that_the_hub_refuses(hub: LoopbackHub) -> None:
    with pytest.raises(OutputError, match="cannot be uploaded to") as caught, Upload.open("acme/bad-card") as target:
        target.finish(SMALL, "---\nlicense: home-made\n---\n")
    assert '"license" must be one of' in str(caught.value)
    assert hub.repos["acme/bad-card"].history == []


def test_progress_counts_what_finish_waits_for(hub: LoopbackHub, tmp_path: Path) -> None:
    class Counting(surgery.progress.Silent):
        total = done = 0

        def start(self, label: str, total_bytes: int) -> None:
            self.total += total_bytes

        def advance(self, n_bytes: int) -> None:
            self.done += n_bytes

    files = weights(tmp_path / "w", "counted")
    progress = Counting()
    hub.gate.clear()
    try:
        with Upload.open("acme/counted") as target:
            for name, path in files.items():
                target.submit(path, name)
            time.sleep(0.1)
            hub.gate.set()
            _finished(target, progress=progress)
    finally:
        hub.gate.set()
    assert progress.total == progress.done
    assert progress.total <= sum(path.stat().st_size for path in files.values())


@heard
def _finished(target: Upload, *, progress: Progress) -> str:
    return target.finish(SMALL, CARD)


# The cards.


@pytest.fixture(scope="module")
def source(hub: LoopbackHub, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a card, on the hub as acme/tiny."""
    folder = tmp_path_factory.mktemp("source") / "m"
    shutil.copytree(llama, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n- de\n---\n\n# Tiny\n\nA *tiny* model.\n")
    hub.publish("acme/tiny", folder)
    return folder


@pytest.fixture(scope="module")
def factorized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("factorized") / "f"
    surgery.factorize("acme/tiny", out, rank=4)
    return out


def parts(card: str) -> tuple[dict[str, object], str]:
    """Front matter, by the plain YAML library, and text."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2]


def test_factorized_card(hub: LoopbackHub, source: Path, factorized: Path) -> None:
    manifest = Manifest.read(factorized)
    metadata, text = parts(factorized_card(manifest, "acme/tiny-f", original=(source / "README.md").read_text()))
    assert metadata == {"base_model": "acme/tiny", "license": "apache-2.0", "language": ["en", "de"], "tags": ["surgery"]}
    worst = max(max(c.residual) for target in manifest.targets for c in target.certificates)
    for fact in (
        f"`acme/tiny` at commit `{hub.repos['acme/tiny'].commit}`",
        "Targets: 14 (14 matrices), rank 4",
        "Trainable scales: 56",
        f"at most {worst:.1e} of the largest singular value",
        "Lossless: yes",
        "Layout: residual",
        "By themselves the weights here are another model",
        f"`{manifest.tool}`",
        "hf download acme/tiny-f --local-dir factorized",
        "surgery fold factorized scales.safetensors",
        "## Card of the original model\n\n# Tiny\n\nA *tiny* model.",
    ):
        assert fact in text
    assert text.count("license") == 0  # the front matter is not quoted


def test_factorized_card_of_other_kinds(source: Path, tmp_path: Path) -> None:
    plain = surgery.factorize(source, tmp_path / "plain", energy=0.5, max_rank=8, correction=False).manifest
    metadata, text = parts(factorized_card(plain, None))
    assert metadata == {"tags": ["surgery"]}
    ranks = [target.rank for target in plain.targets]
    for fact in ("a local folder", f"rank {min(ranks)} to {max(ranks)}, as it takes to hold 0.5", "Lossless: no", "last bits"):
        assert fact in text
    assert "hf download" not in text
    assert str(source) not in text
    overlay = surgery.factorize("acme/tiny", tmp_path / "overlay", rank=2, layout="overlay").manifest
    metadata, text = parts(factorized_card(overlay, "acme/x"))
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("acme/tiny", "adapter")
    assert "Layout: overlay" in text
    assert "another model" not in text
    assert "fetch them at the commit above" in text


def test_folded_and_adapter_card(source: Path, factorized: Path) -> None:
    manifest, original = Manifest.read(factorized), (source / "README.md").read_text()
    card = folded_card(manifest, "acme/tuned", FoldedChanges(5, adapted=3), architecture="LlamaForCausalLM", original=original)
    metadata, text = parts(card)
    assert metadata["base_model_relation"] == "finetune"
    assert (metadata["library_name"], metadata["license"]) == ("transformers", "apache-2.0")
    assert "5 of\n14 targets" in text
    assert "added to 3 tensors" in text
    assert "from transformers import LlamaForCausalLM\n" in text
    assert "LlamaForCausalLM.from_pretrained('acme/tuned')" in text
    untouched, text = parts(folded_card(manifest, "acme/tuned", FoldedChanges(0), architecture="os; print('no name')"))
    assert "base_model_relation" not in untouched
    assert "bit for bit" in text
    assert "from transformers import AutoModel\n" in text

    metadata, text = parts(adapter_card(manifest, "acme/lora", ExportedUpdate(14, 4), original=original))
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("peft", "adapter")
    assert (metadata["base_model"], metadata["language"]) == ("acme/tiny", ["en", "de"])
    assert "rank 4 for 14 modules" in text
    assert f"from_pretrained('acme/tiny', revision='{manifest.source.commit}')" in text
    assert "PeftModel.from_pretrained(model, 'acme/lora')" in text
    assert "A *tiny* model" not in text


NASTY = [
    'a: b\n- c\n---\n# "hello"',
    "`code` ``more`` <script>alert(1)</script>",
    "x' && rm -rf ~; '",
    "\ud800\u202e\x00{[%&*!|>",
    "no",
    "..",
]


def test_cards_without_a_license_are_the_same_but_for_it(factorized: Path) -> None:
    manifest = Manifest.read(factorized)
    front = "language: [en, 'no']\n"
    plain = factorized_card(manifest, "acme/x", original=f"---\n{front}---\nTöxt --- \n---\n")
    for license_ in ("license: mit\n", "license: other\nlicense_name: home-made\nlicense_link: LICENSE\n"):
        licensed = factorized_card(manifest, "acme/x", original=f"---\n{license_}{front}---\nTöxt --- \n---\n")
        assert licensed != plain
        assert without_license(licensed) == without_license(plain) == plain


@pytest.mark.parametrize("name", NASTY)
def test_nasty_names_break_no_card(factorized: Path, name: str) -> None:
    manifest = Manifest.read(factorized)
    manifest = dataclasses.replace(manifest, source=SourceRecord("hub", name, name, name), tool=name, torch=name, device=name)
    valid = name == "no"
    original = f"---\nlicense: {name!r}\nlanguage: [{name!r}, en, 3, [x]]\nlicense_name: {name!r}\n---\n{name}"
    for card in (
        factorized_card(manifest, name, original=original),
        folded_card(manifest, name, FoldedChanges(1), architecture=name, original=original),
        adapter_card(manifest, name, ExportedUpdate(1, 1), original=original),
    ):
        metadata, text = parts(card.encode().decode())
        assert metadata.keys() <= {
            "tags",
            "language",
            "library_name",
            *(["license"] if valid else []),  # the hub is asked whether it takes it
            *(["base_model", "base_model_relation"] if valid else []),
        }
        assert metadata["language"] == (["no", "en"] if valid else ["en"])
        own = text.partition("## Card of the original model")[0]
        commands = "\n".join(re.findall(r"```(?:sh|python)\n(.*?)```", own, re.DOTALL))
        assert "rm -rf" not in re.sub(r"subfolder=(\"[^\"]*\"|'[^']*')", "", commands)
        # Each of the facts is still one line.
        assert len(re.findall(r"^- (?:Source|Targets|Factorized with): .+$", own, re.MULTILINE)) == 3
        assert not re.search(r"^(?:# \"hello\"|- c)$", own, re.MULTILINE)


@pytest.mark.parametrize(
    "original",
    [
        "",
        "---\n{[\n---\nText",
        "---\n- a list\n---\nText",
        "---\n&a [*a]\n---\nText",
        "---\n" + "[" * 5000 + "\n---\nText",
        "Text",
    ],
)
def test_damaged_cards_of_the_source(factorized: Path, original: str) -> None:
    metadata, text = parts(factorized_card(Manifest.read(factorized), "acme/x", original=original))
    assert metadata == {"base_model": "acme/tiny", "tags": ["surgery"]}
    assert text.endswith("## Card of the original model\n\nText\n") == bool(original)


def test_pushed_checkpoint_can_be_used_from_the_hub(hub: LoopbackHub, source: Path, factorized: Path, tmp_path: Path) -> None:
    manifest = published(Manifest.read(factorized))
    manifest.write(tmp_path / "manifest")
    small = {record.file: factorized / record.file for record in manifest.files}
    small["surgery/scales.safetensors"] = factorized / "surgery/scales.safetensors"
    small["surgery/manifest.json"] = tmp_path / "manifest/surgery/manifest.json"
    with Upload.open("acme/tiny-f") as target:
        for shard in manifest.shards:
            records = [record for record in (shard.residual, shard.factors) if record is not None]
            target.submit_all((factorized / record.file, record.file, record.sha256) for record in records)
        card = factorized_card(manifest, target.repo_id, original=(factorized / "README.md").read_text())
        target.finish(small, card)
    huggingface_hub.snapshot_download("acme/tiny-f", local_dir=tmp_path / "back")
    assert surgery.verify(tmp_path / "back").ok
    surgery.fold(tmp_path / "back", tmp_path / "back/surgery/scales.safetensors", tmp_path / "folded")
    folded = files_of(tmp_path / "folded")
    assert folded == {name: data for name, data in files_of(source).items() if name != "README.md"}
