"""Models in the hub's cache when the hub cannot be asked: whole, partial, or links to blobs that are gone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

import surgery
from surgery.errors import SourceError
from surgery.progress import Silent
from tests.loopback_hub import LoopbackHub, Repo
from tests.models import files_of

Away = Callable[[Repo], None]
CACHE = Path(os.environ["HF_HOME"]) / "hub"


@pytest.fixture(params=["offline", "dead", "failing", "limited", "portal"])
def away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Away:
    """Makes the hub one that cannot be asked: by the client's own choice, without an answer, or with a useless one."""

    def leave(repo: Repo) -> None:
        if request.param == "offline":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        elif request.param == "dead":
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        else:
            repo.refusal = ({"failing": 503, "limited": 429, "portal": 200}[request.param], "")

    return leave


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def _snapshot(repo_id: str, repo: Repo) -> Path:
    return CACHE / f"models--{repo_id.replace('/', '--')}" / "snapshots" / repo.commit


def _fetch(repo_id: str, *files: str) -> None:
    for file in files:
        huggingface_hub.hf_hub_download(repo_id, file)


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _lose_blobs(snapshot: Path, *names: str) -> None:
    for path in [snapshot / name for name in names] or [path for path in snapshot.rglob("*") if path.is_symlink()]:
        path.resolve().unlink(missing_ok=True)


def test_a_whole_model_is_taken_from_the_cache(
    hub: LoopbackHub, llama: Path, tmp_path: Path, away: Away, request: pytest.FixtureRequest
) -> None:
    name = f"acme/whole-{request.node.callspec.id}"
    repo = hub.publish(name, llama)
    surgery.factorize(name, tmp_path / "online", rank=2)
    away(repo)
    progress = _Notes()
    surgery.factorize(name, tmp_path / "away", rank=2, progress=progress)
    assert files_of(tmp_path / "away") == files_of(tmp_path / "online")
    assert "taken from the local cache" in "\n".join(progress.notes)


def test_what_was_never_fetched_is_missed(hub: LoopbackHub, llama: Path, away: Away, request: pytest.FixtureRequest) -> None:
    name = f"acme/never-{request.node.callspec.id}"
    away(hub.publish(name, llama))
    with pytest.raises(SourceError, match=rf"{name} ") as caught:
        surgery.plan(name)
    assert "try:" in str(caught.value)


@pytest.mark.parametrize("kept", ["config", "index", "a shard", "shards without their index"])
def test_a_partial_model_is_told_by_what_it_lacks(
    hub: LoopbackHub, llama: Path, away: Away, request: pytest.FixtureRequest, kept: str
) -> None:
    name = f"acme/partial-{request.node.callspec.id.replace(' ', '-')}"
    repo = hub.publish(name, llama)
    shards, index = _shards(llama), "model.safetensors.index.json"
    assert len(shards) == 3
    _fetch(
        name,
        *{
            "config": ["config.json"],
            "index": ["config.json", index],
            "a shard": ["config.json", index, shards[1]],
            "shards without their index": ["config.json", *shards[1:]],
        }[kept],
    )
    away(repo)
    with pytest.raises(SourceError, match="the local cache has only a part of it") as caught:
        surgery.plan(name)
    message = str(caught.value)
    assert f"hf download {name}" in message
    lacking = {"config": "*.safetensors", "index": shards[1], "a shard": shards[2]}.get(kept, shards[0])
    assert lacking in message
    assert kept != "a shard" or shards[1] not in message.partition("expected:")[2]


def test_weights_that_were_fetched_without_their_config(
    hub: LoopbackHub, llama: Path, tmp_path: Path, offline: Callable[[], None]
) -> None:
    hub.publish("acme/no-config", llama)
    _fetch("acme/no-config", "model.safetensors.index.json", *_shards(llama))
    offline()
    progress = _Notes()
    surgery.factorize("acme/no-config", tmp_path / "f", rank=2, include=["*_proj*"], progress=progress)
    assert any("config.json is not in it" in note for note in progress.notes)


def test_blobs_that_are_gone(hub: LoopbackHub, llama: Path, tmp_path: Path, away: Away, request: pytest.FixtureRequest) -> None:
    name = f"acme/gone-{request.node.callspec.id}"
    repo = hub.publish(name, llama)
    huggingface_hub.snapshot_download(name)
    snapshot = _snapshot(name, repo)
    _lose_blobs(snapshot)
    assert (snapshot / "config.json").is_symlink()
    away(repo)
    with pytest.raises(SourceError, match="has only a part of it") as caught:
        surgery.plan(name)
    assert "config.json" in str(caught.value)
    assert _shards(llama)[0] in str(caught.value)
    assert f"hf download {name}" in str(caught.value)


@pytest.mark.parametrize("lost", ["all", "a shard", "the tokenizer"])
def test_blobs_that_are_gone_are_fetched_again(hub: LoopbackHub, llama: Path, tmp_path: Path, lost: str) -> None:
    name = f"acme/again-{lost.replace(' ', '-')}"
    repo = hub.publish(name, llama)
    huggingface_hub.snapshot_download(name)
    _lose_blobs(_snapshot(name, repo), *{"all": [], "a shard": _shards(llama)[1:2], "the tokenizer": ["tokenizer.json"]}[lost])
    surgery.factorize(name, tmp_path / "f", rank=2)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(llama)


@pytest.mark.parametrize("lost", ["all", "a shard", "the tokenizer"])
def test_a_local_path_to_links_that_lead_nowhere(hub: LoopbackHub, llama: Path, tmp_path: Path, lost: str) -> None:
    """A snapshot given as a folder, and a folder of links of somebody's own."""
    name = f"acme/path-{lost.replace(' ', '-')}"
    repo = hub.publish(name, llama)
    huggingface_hub.snapshot_download(name)
    snapshot = _snapshot(name, repo)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in snapshot.iterdir():
        (linked / path.name).symlink_to(path.resolve())
    names = {"all": [], "a shard": _shards(llama)[1:2], "the tokenizer": ["tokenizer.json"]}[lost]
    _lose_blobs(snapshot, *names)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    pinned = f" --revision {repo.commit}"
    for folder, revision in ((snapshot, pinned), (link, pinned), (linked, "")):
        with pytest.raises(SourceError, match="is a link that leads nowhere") as caught:
            surgery.plan(folder)
        message = str(caught.value)
        assert message.endswith(f"hf download {name}{revision}")
        for missing in names or ["config.json", *_shards(llama)[:2]]:
            assert missing in message
        count = sum(path.is_symlink() and not path.exists() for path in folder.iterdir())
        assert (f", one of {count} here" in message) == (count > 1)


def test_links_that_lead_nowhere_outside_of_the_cache(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "m")
    for name in _shards(llama)[:2]:
        (model / name).unlink()
        (model / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(SourceError, match="leads nowhere, one of 2 here") as caught:
        surgery.plan(model)
    assert all(name in str(caught.value) for name in _shards(llama)[:2])
    assert "hf download" not in str(caught.value)


def test_another_revision_than_was_fetched(hub: LoopbackHub, llama: Path, offline: Callable[[], None]) -> None:
    repo = hub.publish("acme/revised", llama)
    repo.branches["v2"] = "1" * 40
    huggingface_hub.snapshot_download("acme/revised")
    offline()
    by_branch = surgery.plan("acme/revised", rank=2, progress=Silent())
    assert by_branch == surgery.plan("acme/revised", rank=2, revision=repo.commit, progress=Silent())
    for revision in ("v2", "1" * 40, "../main", "/etc/passwd"):
        with pytest.raises(SourceError, match=r"neither a folder here nor \(all\) in the local cache") as caught:
            surgery.plan("acme/revised", rank=2, revision=revision)
        assert f"hf download acme/revised --revision {revision}" in str(caught.value)


def test_a_branch_that_has_moved_is_known_when_the_hub_is_away(
    hub: LoopbackHub, llama: Path, tmp_path: Path, offline: Callable[[], None]
) -> None:
    """Also by what this project fetched itself, and with the newer commit."""
    folder = shutil.copytree(llama, tmp_path / "m")
    repo = hub.publish("acme/moved", folder)
    surgery.factorize("acme/moved", tmp_path / "first", rank=2)
    repo.apply("another", {"config.json": json.dumps(json.loads((folder / "config.json").read_text()) | {"a": 1}).encode()})
    surgery.factorize("acme/moved", tmp_path / "second", rank=2)
    offline()
    report = surgery.factorize("acme/moved", tmp_path / "third", rank=2, progress=Silent())
    assert report.manifest.source.commit == repo.commit
    assert files_of(tmp_path / "third") == files_of(tmp_path / "second") != files_of(tmp_path / "first")


def test_a_subfolder_that_was_never_fetched(hub: LoopbackHub, llama: Path, tmp_path: Path, offline: Callable[[], None]) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(llama, pipeline / "text_encoder")
    shutil.copytree(llama, pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    hub.publish("acme/parts", pipeline)
    huggingface_hub.snapshot_download("acme/parts", allow_patterns=["text_encoder/*"])
    offline()
    assert surgery.plan("acme/parts", subfolder="text_encoder", rank=2, progress=Silent()).targets
    with pytest.raises(SourceError, match="has only a part of it") as caught:
        surgery.plan("acme/parts", subfolder="transformer")
    assert "acme/parts/transformer" in str(caught.value)


def test_a_cache_that_cannot_be_written_to(
    hub: LoopbackHub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("acme/no-room", llama)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(SourceError, match=r"acme/no-room/config.json cannot be fetched"):
        surgery.plan("acme/no-room")


@pytest.mark.parametrize("why", ["the client is told to make none", "the disk has none"])
def test_a_cache_without_links(
    hub: LoopbackHub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: Callable[[], None], why: str
) -> None:
    """What has been fetched lies in the snapshot itself, where the client finds it, and is found again without the hub."""
    if why != "the disk has none" and not hasattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS"):
        pytest.skip("this client cannot be told to make no links")
    name = f"acme/no-links-{len(why)}"
    repo = hub.publish(name, llama)
    if why == "the disk has none":

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "symlink", refused)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", True)
    surgery.factorize(name, tmp_path / "f", rank=2)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(llama)
    snapshot = _snapshot(name, repo)
    for file in _shards(llama):
        assert (snapshot / file).read_bytes() == (llama / file).read_bytes()
    assert not any(path.is_symlink() for path in snapshot.rglob("*"))
    assert huggingface_hub.try_to_load_from_cache(name, _shards(llama)[0]) == str(snapshot / _shards(llama)[0])
    offline()
    surgery.factorize(name, tmp_path / "g", rank=2, progress=Silent())
    assert (tmp_path / "g" / _shards(llama)[-1]).read_bytes() == (tmp_path / "f" / _shards(llama)[-1]).read_bytes()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "http://[bad", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(SourceError, match="acme/anything cannot be reached"):
        surgery.plan("acme/anything")
