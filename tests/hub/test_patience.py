"""Downloads over a hub that fails, breaks off, stalls and refuses, through the real client; copies that are not what it has."""

from __future__ import annotations

import email.utils
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pytest
import torch
from filelock import FileLock

import surgery
from surgery.errors import FormatError, OutputError, ReadError, SourceError, SurgeryError
from surgery.files.watch import Watch
from surgery.format.safetensors import ShardReader
from surgery.hub import client_cache, patience, repository
from surgery.hub import hub_client as client
from surgery.hub.patience import Dropped, Patience
from surgery.progress import Silent
from surgery.source.open import open_source
from surgery.source.stream import streamed
from tests.loopback_hub import Fault, LoopbackHub
from tests.models import files_of, save_llama

CACHE = Path(os.environ["HF_HOME"]) / "hub"

#: One of each kind of failure that passes.
PASSING = [
    *(Fault(status) for status in (408, 429, 500, 502, 503, 504)),
    Fault(503, {"Retry-After": "0"}),
    Fault(429, {"Retry-After": email.utils.formatdate(0, usegmt=True)}),
    *(Fault(after=after, how=how) for how in ("cut", "reset", "chunked", "quiet") for after in (0, 1, 700)),
    Fault(after=700, how="stall"),
]


@pytest.fixture(autouse=True)
def _short_timeouts(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if "stall" in request.node.name:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(patience, "GIVE_UP_AFTER", 5.0)
    hub.over.clear()
    yield
    hub.over.set()
    hub._faults.clear()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many weight files."""
    return save_llama(tmp_path_factory.mktemp("model") / "m", torch.bfloat16, shard_size="14KB", num_hidden_layers=4)


def _name(fault: Fault) -> str:
    return f"{fault.status or fault.how}-{fault.after}-{len(fault.headers)}"


@pytest.mark.parametrize("fault", PASSING, ids=_name)
def test_what_passes_is_waited_out(hub: LoopbackHub, tmp_path: Path, fault: Fault, request: pytest.FixtureRequest) -> None:
    """For headers, small files and weight files alike: of the requests for each the first and the third fail."""
    name, raw = f"acme/passes-{request.node.callspec.id}", _large(tmp_path / "m", 1)
    hub.publish(name, tmp_path / "m")
    for part in ("config.json", "model.safetensors"):
        hub.disturb(f"{name}/resolve/{hub.repos[name].commit}/{part}", [fault, None, fault])
    source = open_source(name)
    assert source.header("model.safetensors").file_bytes == len(raw)
    assert source.fetch("model.safetensors").read_bytes() == raw
    assert source.fetch("config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_schedule_of_failures_gives_the_same_bytes(
    hub: LoopbackHub, shards: Path, tmp_path: Path, seed: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "GIVE_UP_FIRST_AFTER", 5.0)  # of which a busy machine may need a part
    name = f"acme/schedule-{seed}-{stream}"
    hub.publish(name, shards).page_size = 3
    rng = random.Random(seed)
    kinds = [fault for fault in PASSING if fault.how != "stall"]
    hub.disturb(f"{name}/", [rng.choice(kinds) if rng.random() < 0.4 else None for _ in range(3000)])
    surgery.factorize(name, tmp_path / "f", rank=2, stream=stream, progress=Silent())
    hub._faults.clear()
    hub.publish(f"{name}-calm", shards)
    surgery.factorize(f"{name}-calm", tmp_path / "calm", rank=2, progress=Silent())
    ours, calm = files_of(tmp_path / "f"), files_of(tmp_path / "calm")
    assert {key: data for key, data in ours.items() if "manifest" not in key} == {
        key: data for key, data in calm.items() if "manifest" not in key
    }


def _large(folder: Path, megabytes: int = 8) -> bytes:
    data = bytes(4 * 1000 * 1000 * megabytes // 4)
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(data), len(data))
    raw = len(header).to_bytes(8, "little") + header + data
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(raw)
    (folder / "config.json").write_text("{}")
    return raw


@pytest.mark.parametrize("how", ["cut", "reset", "chunked", "quiet", "stall"])
@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_large_file_is_gone_on_with(hub: LoopbackHub, tmp_path: Path, how: str, ignores_ranges: bool) -> None:
    raw = _large(tmp_path / "m")
    name = f"acme/resumed-{how}-{ignores_ranges}"
    hub.publish(name, tmp_path / "m").ignores_ranges = ignores_ranges
    source = open_source(name)
    before = len(hub.requests)
    hub.disturb("model.safetensors", [Fault(after=5_000_000, how=how), Fault(503), None])
    assert source.fetch("model.safetensors").read_bytes() == raw
    sent = [count for method, path, count in hub.requests[before:] if "model.safetensors" in path]
    # The server tells what it would send; of the first answer five million bytes have come.
    assert len(sent) == 3 or how == "stall"  # where a machine that is busy may seem to stall as well
    if not ignores_ranges and how not in ("reset",):  # what is on its way is lost with the connection
        assert sent[-1] <= len(raw) - 4_000_000


def test_what_an_earlier_start_has_fetched_is_not_fetched_again(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = _large(tmp_path / "m")
    hub.publish("acme/started", tmp_path / "m")
    monkeypatch.setattr(patience, "GIVE_UP_AFTER", 0.05)
    hub.disturb("model.safetensors", [Fault(after=6_000_000), *[Fault(503)] * 1000])
    with pytest.raises(SourceError, match=r"acme/started cannot be fetched from the hub: model.safetensors") as caught:
        open_source("acme/started").fetch("model.safetensors")
    assert "503" in str(caught.value)
    assert "tried" in str(caught.value)
    assert "not fetched twice" in str(caught.value)
    hub._faults.clear()
    before = len(hub.requests)
    assert open_source("acme/started").fetch("model.safetensors").read_bytes() == raw
    assert sum(count for _, path, count in hub.requests[before:] if "safetensors" in path) <= len(raw) - 5_000_000


def test_attempts_do_not_multiply(hub: LoopbackHub, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own attempts would come on top of ours."""
    hub.publish("acme/asked-once", llama)
    waits: list[float] = []
    monkeypatch.setattr(patience, "_wait", lambda seconds, dropped: waits.append(seconds))
    source = open_source("acme/asked-once")
    hub.disturb("tokenizer.json", [Fault(503)] * 4)
    before = len(hub.requests)
    source.fetch("tokenizer.json")
    assert len([path for _, path, _ in hub.requests[before:] if "tokenizer.json" in path]) == 5
    assert len(waits) == 4


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Fault(401), "expired or been revoked"),
        (Fault(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "expired or been revoked"),
        (Fault(403), "may not be read with your token any more"),
        (Fault(403, {"X-Error-Code": "GatedRepo"}), "has become gated"),
        (Fault(404, {"X-Error-Code": "RepoNotFound"}), "is not there any more"),
        (Fault(404, {"X-Error-Code": "EntryNotFound"}), "lacks a file that its listing named"),
        (Fault(400), "cannot be fetched"),
    ],
)
@pytest.mark.parametrize("part", ["tokenizer.json", "00002-of"])
def test_refusals_in_the_midst_are_told_at_once(
    hub: LoopbackHub, llama: Path, tmp_path: Path, fault: Fault, what: str, part: str, request: pytest.FixtureRequest
) -> None:
    name = f"acme/refused-{abs(hash(request.node.callspec.id))}"
    hub.publish(name, llama)
    hub.disturb(part, [fault] * 100)
    before = len(hub.requests)
    with pytest.raises(SourceError, match=what) as caught:
        surgery.factorize(name, tmp_path / "f", rank=2, stream=True, progress=Silent())
    message = str(caught.value)
    assert part in message
    assert "run the same command again" in message
    assert fault.status not in (401, 403) or "hf auth login" in message
    assert len([path for _, path, _ in hub.requests[before:] if part in path]) == 1
    hub._faults.clear()
    surgery.factorize(name, tmp_path / "f", rank=2, stream=True, progress=Silent())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 503])
def test_refusals_of_a_place_that_the_hub_sends_us_to(hub: LoopbackHub, llama: Path, tmp_path: Path, status: int) -> None:
    """Its addresses are good for a while, and know no token: a new one is asked for."""
    name, place = f"acme/elsewhere-{status}", LoopbackHub()
    repo = hub.publish(name, llama)
    place.publish(name, llama)
    file = sorted(llama.glob("*.safetensors"))[1].name
    moved = Fault(302, {"Location": f"{place.url}/{name}/resolve/{repo.commit}/{file}"})
    hub.disturb(file, [moved] * 1000)
    place.disturb(file, [Fault(status), None, *[Fault(status)] * 1000])
    with pytest.raises(SourceError) as caught:
        surgery.factorize(name, tmp_path / "f", rank=2, progress=Silent())
    assert "token" not in str(caught.value)
    assert "tried" in str(caught.value)
    place.disturb(file, [Fault(status)] * 2)
    surgery.factorize(name, tmp_path / "f", rank=2, progress=Silent())


def _failing(status: int, **headers: str) -> Exception:
    response = client.http.Response(status, headers=headers, request=client.http.Request("GET", "http://127.0.0.1"))
    return huggingface_hub.errors.HfHubHTTPError(f"{status} Server Error", response=response)


class _Clock:
    """Time that passes by waiting alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 1000.0, list[float]()
        monkeypatch.setattr(patience, "_now", lambda: self.now)
        monkeypatch.setattr(patience, "_wait", self._wait)
        for name, value in (("FIRST_PAUSE", 1.0), ("LONGEST_PAUSE", 60.0), ("GIVE_UP_AFTER", 900.0)):
            monkeypatch.setattr(patience, name, value)

    def _wait(self, seconds: float, dropped: threading.Event | None) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


def _give_up(error: Exception) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        Patience(lambda text, is_long: None).run(call)


def test_pauses_grow_and_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    error = _failing(503)
    _give_up(error)
    assert 780 < sum(clock.waits) <= 900
    for number, pause in enumerate(clock.waits):
        assert 0.75 * min(2**number, 60) <= pause <= 1.25 * min(2**number, 60)
    assert len(set(clock.waits)) == len(clock.waits)
    assert error.__notes__ == [f"tried {len(clock.waits) + 1} times in {sum(clock.waits) / 60:.0f} min"]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "0"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=7;t=55'}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "Wed, 99 Oct 2026 99:28:00 GMT"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({}, None),
    ],
)
def test_what_the_hub_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert patience.asked_for(_failing(429, **headers)) == seconds


def test_a_date_without_a_clock_beside_it() -> None:
    asked = patience.asked_for(_failing(503, **{"Retry-After": email.utils.formatdate(time.time() + 40, usegmt=True)}))
    assert asked is not None
    assert 35 < asked <= 40


def test_the_hub_is_left_alone_for_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    _give_up(_failing(429, **{"Retry-After": "100"}))
    assert clock.waits == [100.0] * 9 + [100.0]  # and one longer than the rest of the time
    clock.waits.clear()
    _give_up(_failing(429, **{"Retry-After": "3600"}))
    assert clock.waits == [3600.0]
    clock.waits.clear()
    error = _failing(429, **{"Retry-After": "90000"})
    _give_up(error)
    assert clock.waits == []
    assert error.__notes__ == ["the hub asks to come back in 25.0 h"]


def test_time_counts_from_the_last_success(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    patient = Patience(lambda text, is_long: None)
    for _ in range(100):
        patient.failed(_failing(503))
        clock.now += 600
        patient.succeeded()
    assert all(pause <= 1.25 for pause in clock.waits)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 410, 416, 451, 501, 505])
def test_what_does_not_pass(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    clock = _Clock(monkeypatch)
    _give_up(_failing(status))
    assert clock.waits == []


def test_whoever_waits_is_told(hub: LoopbackHub, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    hub.publish("acme/told", llama)
    items: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "item", items.append)
    hub.disturb("tokenizer.json", [Fault(503), Fault(429, {"Retry-After": "70"})])
    surgery.factorize("acme/told", Path(os.environ["HF_HOME"]) / "told", rank=2, progress=progress)
    assert "tokenizer.json: the hub answers 503; attempt 2 in 1 s" in items
    assert "tokenizer.json: the hub answers 429; attempt 3 in 70 s" in items
    assert sum("makes surgery wait for tokenizer.json" in note for note in progress.notes) == 1
    assert 70.0 in clock.waits


def test_waiting_ends_when_nobody_wants_it() -> None:
    dropped = threading.Event()
    patient = Patience(lambda text, is_long: dropped.set(), dropped)
    start = time.monotonic()
    with pytest.raises(Dropped):
        patient.failed(_failing(429, **{"Retry-After": "600"}))
    assert time.monotonic() - start < 10


def test_files_that_another_process_is_fetching(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    """Neither waits for the other, nor writes to what the other is putting together."""
    repo = hub.publish("acme/at-once", llama)
    with ExitStack() as others:
        for of in repository.list_files("acme/at-once", repo.commit).values():
            client_cache.lock_path("acme/at-once", of).parent.mkdir(parents=True, exist_ok=True)
            others.enter_context(FileLock(client_cache.lock_path("acme/at-once", of), timeout=0))
            client_cache.blob_path("acme/at-once", of).parent.mkdir(parents=True, exist_ok=True)
            client_cache.blob_path("acme/at-once", of).with_name(f"{of.hash}.surgery.incomplete").write_bytes(b"the other's")
        surgery.factorize("acme/at-once", tmp_path / "f", rank=2)
    left = list((CACHE / "models--acme--at-once/blobs").glob("*.incomplete"))
    assert len(left) == len(files_of(llama))
    assert {path.read_bytes() for path in left} == {b"the other's"}
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(llama)


def test_ctrl_c_while_waiting_ends_at_once(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    """Of a child, in which nothing makes the waiting shorter, while a shard is fetched in a thread."""
    hub.publish("acme/gone-on-with", llama)
    asked = threading.Event()
    hub.disturb("00002-of", _asking(asked, 2))
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "surgery",
            "factorize",
            "acme/gone-on-with",
            "--rank",
            "2",
            "--stream",
            "-o",
            str(tmp_path / "f"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asked.wait(60)
    time.sleep(0.5)
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert child.returncode == 130, errors
    assert "Traceback" not in errors


def _asking(asked: threading.Event, fail_from: int) -> Iterator[Fault | None]:
    for number in range(1, 1000):
        if number < fail_from:
            yield None
            continue
        asked.set()
        yield Fault(503, {"Retry-After": "600"})


def test_the_first_question_is_short_where_the_cache_can_do_without(
    hub: LoopbackHub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("acme/first", llama)
    surgery.factorize("acme/first", tmp_path / "a", rank=2)
    clock = _Clock(monkeypatch)
    for revision in (None, hub.repos["acme/first"].commit):
        hub.disturb("/acme/first/", [Fault(503)] * 1000)
        hub.disturb("acme/first", [Fault(503)] * 1000)
        before, progress = len(hub.requests), Silent()
        surgery.plan("acme/first", rank=2, revision=revision, progress=progress)
        assert "taken from the local cache" in "\n".join(progress.notes)
        assert len(hub.requests) == before + 1
    assert clock.waits == []
    # Without a cache a hub that is busy is asked again, for a minute.
    monkeypatch.setattr(patience, "GIVE_UP_FIRST_AFTER", 60.0)
    hub.publish("acme/unknown", llama)
    hub.disturb("acme/unknown", [Fault(503)] * 3)
    assert surgery.plan("acme/unknown", rank=2, progress=Silent()).targets
    hub.disturb("acme/unknown", [Fault(503)] * 3000)
    del clock.waits[:]
    hub.publish("acme/unknown-too", llama)
    with pytest.raises(SourceError, match=r"cannot be fetched from the hub\n.*503.*; tried \d+ times in \d+ s"):
        surgery.plan("acme/unknown-too", rank=2, progress=Silent())
    assert 20 < sum(clock.waits) <= 60


@pytest.mark.parametrize("fault", [Fault(503), Fault(after=20), Fault(after=0, how="reset"), Fault(after=9, how="chunked")])
def test_pages_of_a_listing(hub: LoopbackHub, shards: Path, fault: Fault, request: pytest.FixtureRequest) -> None:
    name = f"acme/pages-{request.node.name.partition('[')[2][:-1]}"
    hub.publish(name, shards).page_size = 2
    hub.disturb("cursor=1", [fault])
    hub.disturb("cursor=4", [fault, fault])
    assert len(surgery.plan(name, rank=2, progress=Silent()).shards) == len(list(shards.glob("*.safetensors")))


# -- what comes, and what lies here, is what the hub has ------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["tokenizer.json", "config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_small_file_that_is_changed_on_its_way(
    hub: LoopbackHub, llama: Path, tmp_path: Path, victim: str, stream: bool
) -> None:
    name = f"acme/on-its-way-{victim}-{stream}"
    hub.publish(name, llama).corrupted.add(victim)
    with pytest.raises(SourceError, match="is not the file that the hub has") as caught:
        surgery.factorize(name, tmp_path / "f", rank=2, stream=stream, progress=Silent())
    assert victim in str(caught.value)
    assert not (tmp_path / "f/config.json").exists()
    hub.repos[name].corrupted.clear()  # nothing damaged has been kept
    surgery.factorize(name, tmp_path / "f", rank=2, stream=stream, progress=Silent())


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_client_fetches_in_its_own_way_is_held_to_its_hash_too(
    hub: LoopbackHub, shards: Path, tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the hub's store of chunks; here the client falls back to plain requests."""
    monkeypatch.setattr(repository, "has_xet", lambda: True)
    name = f"acme/chunks-{stream}"
    repo = hub.publish(name, shards)
    repo.by_xet = True
    victim = sorted(shards.glob("*.safetensors"))[2].name
    repo.corrupted.add(victim)
    with pytest.raises(SourceError, match=f"{victim}: the download is not the file that the hub has"):
        surgery.factorize(name, tmp_path / "f", rank=2, stream=stream, progress=Silent())
    fetched = repository.download_by_xet

    def right_from_the_second_on(*args: object) -> Path:
        path = fetched(*args)
        repo.corrupted.clear()
        return path

    monkeypatch.setattr(repository, "download_by_xet", right_from_the_second_on)
    surgery.factorize(name, tmp_path / "f", rank=2, stream=stream, progress=Silent())
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", progress=Silent())
    assert files_of(tmp_path / "back") == files_of(shards)


@pytest.mark.parametrize(
    ("victim", "change"),
    [
        ("tokenizer.json", "a bit"),
        ("tokenizer.json", "empty"),
        ("config.json", "a bit"),
        ("generation_config.json", "shorter"),
        ("model.safetensors.index.json", "a bit"),
        ("shard", "a bit"),
    ],
)
@pytest.mark.parametrize("way", ["online", "stream", "offline"])
def test_a_copy_in_the_cache_that_is_damaged(
    hub: LoopbackHub, llama: Path, tmp_path: Path, victim: str, way: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"acme/damaged-{victim}-{way}-{change.replace(' ', '-')}"
    repo = hub.publish(name, llama)
    huggingface_hub.snapshot_download(name)
    if victim == "shard":
        victim = sorted(llama.glob("*.safetensors"))[1].name
    blob = (CACHE / f"models--{name.replace('/', '--')}" / "snapshots" / repo.commit / victim).resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes({"a bit": bytes(data), "shorter": bytes(data[:-1]), "empty": b""}[change])
    if way == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="is not the file that the hub has") as caught:
        surgery.factorize(name, tmp_path / "f", rank=2, stream=way == "stream", progress=Silent())
    assert f"{victim} --revision {repo.commit} --force-download" in str(caught.value)
    assert not (tmp_path / "f/config.json").exists()
    # What it says to do is what helps.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.hf_hub_download(name, victim, revision=repo.commit, force_download=True)
    surgery.factorize(name, tmp_path / "f", rank=2, progress=Silent())


def test_spectra_and_projections_read_no_damaged_copy(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    repo = hub.publish("acme/compared", llama)
    huggingface_hub.snapshot_download("acme/compared")
    victim = sorted(llama.glob("*.safetensors"))[1].name
    blob = (CACHE / "models--acme--compared" / "snapshots" / repo.commit / victim).resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(bytes(data))
    surgery.factorize(llama, tmp_path / "f", rank=2)
    with pytest.raises(SourceError, match=f"{victim} is not the file that the hub has"):
        surgery.spectra("acme/compared", top=2)
    with pytest.raises(SourceError, match=f"{victim} is not the file that the hub has"):
        surgery.project(tmp_path / "f", "acme/compared", tmp_path / "scales.safetensors")


# -- the cache is emptied meanwhile ---------------------------------------------------------------------------------------


class _Prune(Silent):
    """Removes the cache of a model, once, when a tensor or a file is worked on."""

    def __init__(self, folder: Path, at: str) -> None:
        super().__init__()
        self._folder, self._at, self.done = folder, at, False

    def item(self, name: str) -> None:
        if name.endswith(self._at) and not self.done:
            self.done = True
            shutil.rmtree(self._folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("at", "part", "stream"),
    [
        ("layers.0.self_attn.q_proj.weight", "blobs", False),
        ("layers.1.mlp.up_proj.weight", "", False),
        ("layers.1.mlp.up_proj.weight", "", True),
        ("layers.2.mlp.up_proj.weight", "snapshots", False),
        ("tokenizer.json", "", False),
        ("config.json", "blobs", False),
    ],
)
def test_a_cache_that_is_pruned_meanwhile(
    hub: LoopbackHub, shards: Path, tmp_path: Path, at: str, part: str, stream: bool
) -> None:
    """The run comes to its end, or says what to do; and that helps."""
    name = f"acme/pruned-{at}-{part or 'all'}-{stream}"
    hub.publish(name, shards)
    huggingface_hub.snapshot_download(name)
    progress = _Prune(CACHE / f"models--{name.replace('/', '--')}" / part, at)
    for last in (False, True):
        try:
            surgery.factorize(name, tmp_path / "f", rank=2, layout="overlay", stream=stream, progress=progress)
        except SurgeryError as error:
            if last:
                raise
            assert "it is no longer in the hub's cache; run the same command again" in str(error)  # noqa: PT017
    assert progress.done
    assert not stream or not [path for path in progress._folder.rglob("*.safetensors") if path.is_file()]
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", stream=stream, progress=Silent())
    assert files_of(tmp_path / "back") == files_of(shards)


def test_a_file_that_is_removed_while_it_is_open(llama: Path, tmp_path: Path) -> None:
    """What a hash pins may go, and come again; but not change."""
    shard = sorted(llama.glob("*.safetensors"))[0]
    for pinned, change in ((True, "removed"), (True, "replaced"), (True, "written"), (False, "removed"), (False, "replaced")):
        path = Path(shutil.copy(shard, tmp_path / f"{pinned}-{change}"))
        watch = Watch(pinned=pinned)
        with ShardReader(path, watch=watch) as reader:
            if change == "written":
                path.write_bytes(shard.read_bytes() + b"!")
            else:
                path.unlink()
            if change == "replaced":
                shutil.copy(shard, path)
            if pinned and change != "written":
                reader.check_unchanged()
                watch.check()
            else:
                with pytest.raises((FormatError, ReadError)):
                    reader.check_unchanged()


# -- room for all of it ---------------------------------------------------------------------------------------------------


def test_what_is_here_needs_no_room(hub: LoopbackHub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another commit, or from a start that broke off."""
    name = "acme/here"
    repo = hub.publish(name, shards)
    first = sorted(shards.glob("*.safetensors"))[0]
    hub.disturb(first.name, [None, Fault(after=first.stat().st_size // 2), *[Fault(503)] * 1000])
    with pytest.raises(SourceError):
        surgery.factorize(name, tmp_path / "f", rank=2, progress=Silent())
    hub._faults.clear()
    blobs = CACHE / "models--acme--here" / "blobs"
    assert list(blobs.glob("*.incomplete"))
    here = sum(path.stat().st_size for path in blobs.iterdir())
    model = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    assert surgery.plan(name, rank=2, progress=Silent()).download_bytes == model - here
    huggingface_hub.snapshot_download(name)
    repo.commit = repo.branches["main"] = "c" * 40
    steps = surgery.plan(name, rank=2, progress=Silent())
    assert (steps.download_bytes, steps.temporary_bytes) == (0, 0)
    real, before = shutil.disk_usage(tmp_path), len(hub.requests)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(real)(real.total, real.used, steps.bytes_written + 1))
    surgery.factorize(name, tmp_path / "g", rank=2, progress=Silent())
    assert not [path for method, path, _ in hub.requests[before:] if path.endswith("tokenizer.json")]


def test_room_for_what_passes_is_not_room_for_what_stays(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    """Small files of a streamed model go into the hub's cache, which may be on another disk."""
    hub.publish("acme/passes", shards)
    source = streamed(open_source("acme/passes"), tmp_path / "here", 2)
    sizes = {path.name: path.stat().st_size for path in shards.glob("*.safetensors")}
    along = sum(source.size(file) for file in source.selection.others)
    read = sum(
        source.size(file)
        for file in source.selection.others
        if client_cache.blob_path("acme/passes", source._files[file]).exists()
    )
    assert along > read > 0
    most = sum(sorted(sizes.values())[-2:])
    assert source.room_to_fetch() == {tmp_path / "here": most, CACHE: along - read}
    (tmp_path / "here").mkdir()
    name, half = max(sizes, key=lambda name: sizes[name]), max(sizes.values()) // 2
    (tmp_path / "here" / f"{name}.incomplete").write_bytes(bytes(half))
    assert source.room_to_fetch() == {tmp_path / "here": most - half, CACHE: along - read}


@pytest.mark.parametrize("command", ["factorize", "stream", "fold", "fold stream"])
def test_room_on_one_disk_is_counted_in_sum(
    hub: LoopbackHub, shards: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough for the download alone, and for the result alone, is not enough for both."""
    name = f"acme/room-{command.replace(' ', '-')}"
    hub.publish(name, shards)
    steps = surgery.plan(name, rank=2, stream="stream" in command, progress=Silent())
    result, download = steps.bytes_written, steps.temporary_bytes
    if "fold" in command:
        surgery.factorize(name, tmp_path / "f", rank=2, layout="overlay", stream=True, progress=Silent())
        result = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
        download = max(download, steps.temporary_bytes)
    real = shutil.disk_usage(tmp_path)
    most = max(result, download) + min(result, download) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(real)(real.total, real.used, most))
    stream = "stream" in command
    with pytest.raises(OutputError, match="is too small") as caught:
        if "fold" in command:
            scales = tmp_path / "f/surgery/scales.safetensors"
            surgery.fold(tmp_path / "f", scales, tmp_path / "out", stream=stream, progress=Silent())
        else:
            surgery.factorize(name, tmp_path / "out", rank=2, stream=stream, progress=Silent())
    message = str(caught.value)
    assert "for the result" in message
    assert ("weight files that pass through" if stream else "HF_HOME on another disk") in message
    assert stream or "--stream" in message
