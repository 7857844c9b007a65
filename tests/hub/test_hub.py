"""Models from the hub, through the real client, against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import surgery
from surgery.errors import FormatError, OutputError, SourceError
from surgery.source.folder import FolderSource
from surgery.source.open import open_source
from tests.loopback_hub import Fault, LoopbackHub
from tests.models import files_of


def test_round_trip_is_pinned_and_byte_exact(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    repo = hub.publish("acme/round-trip", llama)
    manifest = surgery.factorize("acme/round-trip", tmp_path / "f", rank=4).manifest
    assert (manifest.source.kind, manifest.source.repo_id, manifest.source.commit) == ("hub", "acme/round-trip", repo.commit)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "folded")
    assert files_of(tmp_path / "folded") == files_of(llama)
    fetched = [path for _, path, _ in hub.requests if "/acme/round-trip/resolve/" in path]
    assert fetched
    assert all(f"/resolve/{repo.commit}/" in path for path in fetched)


def test_overlay_finds_its_base_by_itself(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    hub.publish("acme/overlay", llama)
    surgery.factorize("acme/overlay", tmp_path / "f", rank=4, layout="overlay")
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "folded")
    assert files_of(tmp_path / "folded") == files_of(llama)


def test_plan_reads_headers_only(hub: LoopbackHub, llama: Path) -> None:
    hub.publish("acme/plan", llama)
    before = len(hub.requests)
    steps = surgery.plan("acme/plan", rank=4)
    local = surgery.plan(llama, rank=4)
    assert [t.tensor for t in steps.targets] == [t.tensor for t in local.targets]
    assert steps.bytes_written == local.bytes_written
    # The client reads the first 100 kB of a shard; these tiny ones are smaller. No whole-file download is made.
    gets = [path for method, path, _ in hub.requests[before:] if method == "GET" and path.endswith(".safetensors")]
    assert len(gets) == len({*gets}) == len(steps.shards)
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--acme--plan"
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("ignores_ranges", [False, True])
@pytest.mark.parametrize("length", [80, 99_984, 99_992, 99_996, 100_000, 100_008, 250_000])
def test_a_header_of_any_length_is_read_and_little_else(
    hub: LoopbackHub, tmp_path: Path, length: int, ignores_ranges: bool
) -> None:
    name = f"acme/header-{length}-{ignores_ranges}"
    described = json.dumps({"w": {"dtype": "F32", "shape": [400, 400], "data_offsets": [0, 640_000]}}).encode()
    raw = length.to_bytes(8, "little") + described.ljust(length)
    (tmp_path / "model.safetensors").write_bytes(raw + bytes(640_000))
    repo = hub.publish(name, tmp_path)
    repo.ignores_ranges = ignores_ranges
    before = len(hub.requests)
    header = open_source(name).header("model.safetensors")
    assert (header.raw, header.tensors) == (raw, FolderSource(tmp_path).header("model.safetensors").tensors)
    fetched = [count for method, path, count in hub.requests[before:] if path.endswith(".safetensors")]
    assert ignores_ranges or sum(fetched) <= 100_000 + (8 + length if length > 99_992 else 0)


def test_a_plan_asks_for_no_file_that_it_does_not_read(hub: LoopbackHub, llama: Path) -> None:
    hub.publish("acme/asks", llama)
    before = len(hub.requests)
    surgery.plan("acme/asks", rank=4)
    asked = [(method, path.rpartition("/")[2]) for method, path, _ in hub.requests[before:] if "/resolve/" in path]
    read = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert {name for method, name in asked if not name.endswith(".safetensors")} <= read
    assert not [name for method, name in asked if method == "HEAD" and name.endswith(".safetensors")]


def test_subfolder_of_a_pipeline(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(llama, pipeline / "text_encoder")
    (pipeline / "model_index.json").write_text("{}")
    hub.publish("acme/pipeline", pipeline)
    with pytest.raises(SourceError, match="in its subfolders") as caught:
        surgery.plan("acme/pipeline")
    assert "--subfolder text_encoder" in str(caught.value)
    with pytest.raises(SourceError, match="has no subfolder 'unet'"):
        surgery.plan("acme/pipeline", subfolder="unet")
    manifest = surgery.factorize("acme/pipeline", tmp_path / "f", rank=4, subfolder="text_encoder", layout="overlay").manifest
    assert (manifest.source.repo_id, manifest.source.subfolder) == ("acme/pipeline", "text_encoder")
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(llama)


def test_revision(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    repo = hub.publish("acme/revisions", llama)
    repo.branches["v2"] = repo.commit
    assert surgery.factorize("acme/revisions", tmp_path / "f", rank=2, revision="v2").manifest.source.commit == repo.commit
    with pytest.raises(SourceError, match="no such revision"):
        surgery.plan("acme/revisions", revision="v3")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "gated"),
        (403, "DisabledRepo", "disabled"),
        (404, "RepoNotFound", "does not exist"),
        (500, "", "cannot be"),
    ],
)
def test_refusals_are_explained(hub: LoopbackHub, status: int, code: str, message: str) -> None:
    name = f"acme/refused-{status}-{code or 'x'}"
    hub.refuse(name, status, code)
    with pytest.raises(SourceError, match=message) as caught:
        surgery.plan(name)
    assert name in str(caught.value)
    assert "try:" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "headers", "what", "hint"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "expired or been revoked", "unset HF_TOKEN"),
        (401, {"X-Error-Message": "Invalid username or password."}, "expired or been revoked", "hf auth login"),
        (403, {"X-Error-Message": "Please enable access in your fine-grained token settings"}, "fine-grained", "hf auth login"),
        (400, {}, "cannot be fetched from the hub", "try again later"),
    ],
)
def test_refusals_of_the_first_question(
    hub: LoopbackHub, llama: Path, status: int, headers: dict[str, str], what: str, hint: str
) -> None:
    """Also of a public model, where a token that is no good is sent along."""
    hub.publish("acme/first-refused", llama)
    hub.disturb("api/models/acme/first-refused", [Fault(status, headers)])
    with pytest.raises(SourceError, match=what) as caught:
        surgery.plan("acme/first-refused", rank=2)
    assert hint in str(caught.value)
    assert surgery.plan("acme/first-refused", rank=2).targets


def test_missing_repository(hub: LoopbackHub) -> None:
    with pytest.raises(SourceError, match=r"acme/nowhere does not exist on the hub"):
        surgery.plan("acme/nowhere")


def test_pickle_only_repository_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    (tmp_path / "config.json").write_text("{}")
    hub.publish("acme/pickle", tmp_path)
    with pytest.raises(SourceError, match="pickle checkpoint, which is never opened"):
        surgery.plan("acme/pickle")
    assert not [path for method, path, _ in hub.requests if method == "GET" and path.endswith("pytorch_model.bin")]


def test_factorized_repository_is_refused(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=2)
    hub.publish("acme/factorized", tmp_path / "f")
    with pytest.raises(SourceError, match="acme/factorized is itself a factorized checkpoint"):
        surgery.plan("acme/factorized")


def test_cache_on_a_disk_that_is_too_small(
    hub: LoopbackHub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("acme/large", llama)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(real)(real.total, real.used, 10_000))
    with pytest.raises(OutputError, match=r"hub is too small"):
        surgery.factorize("acme/large", tmp_path / "f", rank=2)


def test_garbage_shard(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    shard.write_bytes(b"\xff" * 4096)
    hub.publish("acme/garbage", tmp_path / "m")
    with pytest.raises((SourceError, FormatError), match="header"):
        surgery.plan("acme/garbage")


def _run(model: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from surgery.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "factorize", model, "--rank", "2", "--json", "-o", str(out)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_offline_works_from_the_cache_and_says_so_without(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    hub.publish("acme/offline", llama)
    surgery.factorize("acme/offline", tmp_path / "online", rank=2)

    done = _run("acme/offline", tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "offline")
    assert files_of(tmp_path / "offline") == files_of(tmp_path / "online")

    missing = _run("acme/never-fetched", tmp_path / "x", HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert "acme/never-fetched is neither a folder here nor (all) in the local cache" in missing.stderr
    assert "unset HF_HUB_OFFLINE" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_hub_that_is_down(tmp_path: Path) -> None:
    done = _run("acme/down", tmp_path / "x", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "acme/down cannot be reached on the hub, and is neither a folder here" in done.stderr
    assert "if it is a local folder, check the name; else connect" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_cache_is_never_the_output(hub: LoopbackHub, llama: Path) -> None:
    hub.publish("acme/cached", llama)
    surgery.plan("acme/cached", rank=4)
    cache = Path(os.environ["HF_HOME"]) / "hub"
    for out in (cache / "models--acme--cached/snapshots/x", cache / "inside", cache):
        with pytest.raises(OutputError, match="one lies in the other"):
            surgery.factorize("acme/cached", out, rank=4, overwrite=True)
