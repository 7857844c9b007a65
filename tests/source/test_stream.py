"""Hub models streamed: each weight file fetched, used and dropped, with never more than two on the disk."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import OptionError, OutputError, SourceError, SurgeryWarning
from surgery.names import STREAM_DIR
from surgery.progress import Silent
from tests.loopback_hub import LoopbackHub
from tests.models import files_of, save_llama
from tests.stopping import StopAt


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many weight files."""
    return save_llama(tmp_path_factory.mktemp("model") / "m", torch.bfloat16, shard_size="14KB", num_hidden_layers=4)


@contextmanager
def most_at_a_time(folder: Path) -> Iterator[list[int]]:
    """The largest number of weight files that were seen in a folder meanwhile, whole or in part."""
    most, over = [0], threading.Event()

    def listed() -> set[Path]:
        return {*folder.glob("*.safetensors"), *folder.rglob("*.incomplete")}

    def look() -> None:
        while not over.is_set():
            with suppress(OSError):  # what is listed may be gone by then
                # A listing takes a while: of what is in two, all was there at the moment between them.
                most[0] = max(most[0], len(listed() & listed()))
            time.sleep(0.0005)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize("layout", ["residual", "overlay"])
def test_two_files_at_a_time_and_the_same_bytes(
    hub: LoopbackHub, shards: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"acme/stream-{layout}"
    hub.publish(name, shards)
    with most_at_a_time(tmp_path / "f" / STREAM_DIR) as most:
        manifest = surgery.factorize(name, tmp_path / "f", rank=4, layout=layout, stream=True).manifest
    assert len(manifest.shards) > 6
    assert 1 <= most[0] <= 2
    assert not (tmp_path / "f/.surgery").exists()
    # The cache has got the small files only.
    assert not [path for path in _cached(name) if path.suffix == ".safetensors"]
    if layout == "overlay":
        with most_at_a_time(tmp_path / "back" / STREAM_DIR) as most:
            surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", stream=True)
        assert 1 <= most[0] <= 2
        assert not [path for path in _cached(name) if path.suffix == ".safetensors"]
    else:
        surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(shards)
    surgery.factorize(name, tmp_path / "kept", rank=4, layout=layout)
    assert files_of(tmp_path / "f") == files_of(tmp_path / "kept")


def _cached(name: str) -> list[Path]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return list((Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").rglob("*"))


def test_goes_on_in_the_middle(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    hub.publish("acme/stream-resumed", shards)
    with pytest.raises(KeyboardInterrupt):
        surgery.factorize(
            "acme/stream-resumed", tmp_path / "f", rank=4, stream=True, progress=StopAt("model.layers.2.mlp.up_proj.weight")
        )
    before = len(hub.requests)
    again = Silent()
    surgery.factorize("acme/stream-resumed", tmp_path / "f", rank=4, stream=True, progress=again)
    assert any("continuing after" in note for note in again.notes)
    # The header of each file is read for the plan; these files are so small that it comes as a whole.
    fetched = [path for method, path, sent in hub.requests[before:] if method == "GET" and sent and ".safetensors" in path]
    finished = int(next(note for note in again.notes if "continuing" in note).split()[2])
    assert finished >= 3
    counts = {index: sum(f"model-{index:05d}-of" in path for path in fetched) for index in range(1, finished + 2)}
    assert sorted(counts.values()) == [1] * finished + [2]
    surgery.factorize(shards, tmp_path / "truth", rank=4)
    ours, truth = files_of(tmp_path / "f"), files_of(tmp_path / "truth")
    assert {name: data for name, data in ours.items() if "manifest" not in name} == {
        name: data for name, data in truth.items() if "manifest" not in name
    }


def test_what_is_cached_is_taken_from_there_and_stays(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    hub.publish("acme/stream-cached", shards)
    surgery.factorize("acme/stream-cached", tmp_path / "a", rank=4)
    before = len(hub.requests)
    surgery.factorize("acme/stream-cached", tmp_path / "b", rank=4, stream=True)
    assert not [path for method, path, sent in hub.requests[before:] if method == "GET" and sent and ".safetensors" in path]
    assert [path for path in _cached("acme/stream-cached") if path.suffix == ".safetensors"]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_download_is_told_from_the_hash_of_the_hub(
    hub: LoopbackHub, shards: Path, tmp_path: Path, stream: bool
) -> None:
    """The bytes on the way are others than those that the hub has told the hash of."""
    name = f"acme/stream-damaged-{stream}"
    shutil.copytree(shards, tmp_path / "m")
    repo = hub.publish(name, tmp_path / "m")
    victim = sorted((tmp_path / "m").glob("*.safetensors"))[3]
    repo.corrupted.add(victim.name)
    with pytest.raises(SourceError, match="is not the file that the hub has") as caught:
        surgery.factorize(name, tmp_path / "f", rank=4, stream=stream)
    assert victim.name in str(caught.value)
    assert not (tmp_path / "f/config.json").exists()
    if stream:  # what is damaged has not been kept
        repo.corrupted.clear()
        with pytest.warns(SurgeryWarning, match="continuing after"):
            surgery.factorize(name, tmp_path / "f", rank=4, stream=True)
        surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
        assert files_of(tmp_path / "back") == files_of(shards)


def test_refusals(shards: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="is a local folder: there is nothing to stream"):
        surgery.factorize(shards, tmp_path / "f", rank=4, stream=True)
    surgery.factorize(shards, tmp_path / "own", rank=4)
    with pytest.raises(OptionError, match="--stream is for overlays"):
        surgery.fold(tmp_path / "own", tmp_path / "own/surgery/scales.safetensors", tmp_path / "x", stream=True)
    hub.publish("acme/stream-room", shards)
    steps = surgery.plan("acme/stream-room", rank=4, stream=True)
    sizes = sorted((shard.size for shard in steps.shards), reverse=True)
    small = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    assert sizes[0] + sizes[1] <= steps.temporary_bytes <= sizes[0] + sizes[1] + small
    real = shutil.disk_usage(tmp_path)
    needed = steps.bytes_written + sizes[0] + sizes[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(real)(real.total, real.used, needed - 1000))
    with pytest.raises(OutputError, match="too small"):
        surgery.factorize("acme/stream-room", tmp_path / "f", rank=4, stream=True)
