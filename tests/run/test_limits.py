"""--max-memory, --device and --profile: what a run may take, and where its time goes."""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.device import choose_devices
from surgery.errors import OptionError
from surgery.timing import Timing, timed
from tests.loopback_hub import LoopbackHub
from tests.measure import measured_peak
from tests.models import files_of
from tests.pretend_gpu import pretend_gpu

SCALES = "surgery/scales.safetensors"


@contextmanager
def cores(count: int) -> Iterator[None]:
    """On a CPU a run takes as many cores as torch has threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


# Memory.


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six weights of some 25 MB each."""
    folder = tmp_path_factory.mktemp("heavy") / "m"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3072, 8, generator=generator), torch.randn(8, 4200, generator=generator)
    weight = left @ right + 0.01 * torch.randn(3072, 4200, generator=generator)
    tensors = {f"layers.{i}.mlp.up.weight": (weight * (i + 1)).bfloat16() for i in range(6)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def workers(model: Path, limit: int | None) -> int:
    return surgery.plan(model, rank=4, device="cpu", max_memory=limit).memory.workers


def needed(model: Path, count: int) -> int:
    """What a run with so many workers is said to take."""
    with cores(count):
        memory = surgery.plan(model, rank=4, device="cpu", max_memory=10**12).memory
    assert memory.workers == count
    return memory.peak_bytes


def test_a_limit_is_kept_by_fewer_workers(heavy: Path) -> None:
    one, two, eight = (needed(heavy, count) for count in (1, 2, 8))
    assert one < two < eight
    with cores(8):
        assert workers(heavy, eight) == 8
        assert workers(heavy, eight - 1) == 7
        assert workers(heavy, two) == 2
        assert workers(heavy, two - 1) == 1
        assert workers(heavy, one) == 1
    with pytest.raises(OptionError, match="too small for one matrix at a time"):
        workers(heavy, one - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_within_the_limit_and_the_bytes_are_the_same(heavy: Path, tmp_path: Path) -> None:
    limit = needed(heavy, 1)
    call = "surgery.factorize({!r}, {!r}, rank=4, device='cpu', max_memory={!r})"
    generous = measured_peak(call.format(str(heavy), str(tmp_path / "generous"), 10**11), threads=8)
    assert generous > limit  # it is the limit that makes the difference
    assert measured_peak(call.format(str(heavy), str(tmp_path / "f"), limit), threads=8) <= limit
    assert files_of(tmp_path / "f") == files_of(tmp_path / "generous")


def told(error: object) -> int:
    """The bytes that an error says are needed."""
    found = re.search(r"expected: at least ([0-9.]+) (GB|MB)", str(error))
    assert found, error
    return round(float(found[1]) * {"GB": 1e9, "MB": 1e6}[found[2]])


@pytest.mark.parametrize("rows", [2048, 3072, 5120, 7168, 9216, 11264, 13312, 15360])
def test_the_figure_that_is_told_is_enough(tmp_path: Path, rows: int) -> None:
    """Whatever it is rounded to."""
    model = hollow(tmp_path / "m", rows, 4096)
    with pytest.raises(OptionError, match="too small for one matrix at a time") as caught:
        surgery.plan(model, device="cpu", max_memory=10**8)
    assert f"layers.0.mlp.up.weight [{rows}, 4096]" in str(caught.value)
    enough = told(caught.value)
    assert surgery.plan(model, device="cpu", max_memory=enough).memory.peak_bytes <= enough
    with pytest.raises(OptionError):
        surgery.plan(model, device="cpu", max_memory=enough - 20_000_000)


@pytest.mark.parametrize("command", ["factorize", "fold"])
def test_too_little_is_told_before_any_work(llama: Path, factorized: Path, tmp_path: Path, command: str) -> None:
    arguments: list[object] = [llama, "--rank", 4] if command == "factorize" else [factorized, factorized / SCALES]
    arguments = [command, *arguments, "-o", tmp_path / "out", "--device", "cpu", "--max-memory"]
    done = run(*arguments, "0.1GB")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: the memory allowed is too small for one matrix at a time\n  got:      100 MB\n")
    assert "allow more with --max-memory" in done.stderr
    assert not (tmp_path / "out").exists()
    # The figure that is told is enough, for one worker.
    with cores(4):
        for limit, count in {f"{told(done.stderr) / 1e9:g}GB": 1, "1TB": 4}.items():
            profile = json.loads(run(*arguments, limit, "--overwrite", "--profile", "--json").stdout)["profile"]
            assert profile["threads"]["worker"] == count


def test_neither_cores_nor_limits_change_a_byte(mixed: Path, tmp_path: Path) -> None:
    """Of manifests as well."""
    results, folded = {}, {}
    limits = {1: None, 2: None, 3: needed(mixed, 2), 4: 10**12}
    expected = {1: 1, 2: 2, 3: 2, 4: 4}
    for count, limit in limits.items():
        with cores(count):
            if limit is not None:
                assert workers(mixed, limit) == expected[count]
            out = tmp_path / f"f{count}"
            surgery.factorize(mixed, out, rank=4, device="cpu", max_memory=limit)
            scales = {key: 1.5 * value for key, value in load_file(out / SCALES).items()}
            surgery.fold(out, scales, tmp_path / f"o{count}", device="cpu", max_memory=limit)
        results[count], folded[count] = files_of(out), files_of(tmp_path / f"o{count}")
    assert {"surgery/manifest.json", SCALES} < results[1].keys()
    for count in (2, 3, 4):
        assert results[count] == results[1]
        assert folded[count] == folded[1]
    assert folded[1].keys() == files_of(mixed).keys()
    assert folded[1] != files_of(mixed)


def hollow(folder: Path, rows: int, columns: int) -> Path:
    """A model with one matrix that takes no room on the disk: what a plan needs is its header."""
    folder.mkdir()
    n_bytes = 4 * rows * columns
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, n_bytes]}
    header = json.dumps({"layers.0.mlp.up.weight": entry}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + n_bytes)
    return folder


def test_sizes_on_the_command_line(tmp_path: Path) -> None:
    """How a size is understood is seen from what is said of one that is too small."""
    model = hollow(tmp_path / "m", 2**16, 2**16)
    sizes = {
        "8GB": "8 GB",
        "500MB": "500 MB",
        "7.5GiB": "8.05 GB",
        "7500000000": "7.5 GB",
        "7.5 GB": "7.5 GB",
        "512mib": "536.87 MB",
        "3g": "3 GB",
        "2000000KB": "2 GB",
        "0.001T": "1 GB",
        "10MB": "10 MB",
        "2.5kB": "2.5 kB",
        "999": "999 B",
    }
    understood = {}
    for size in sizes:
        done = run("plan", model, "--device", "cpu", "--max-memory", size)
        assert (done.exit_code, done.stdout) == (1, "")
        understood[size] = re.findall(r"got: +(.+)\n", done.stderr)[0]
    assert understood == sizes
    assert run("plan", model, "--device", "cpu", "--max-memory", "1TB").exit_code == 0


@pytest.mark.parametrize("option", ["--max-memory", "--max-device-memory"])
@pytest.mark.parametrize(
    "size", ["eight", "", "8XB", "-1GB", "1e9", "8GBps", "GB", ".", "8 9GB", "0x10", "nan", "8,5GB", "٣GB"]
)
def test_what_is_no_size_is_a_usage_error(llama: Path, tmp_path: Path, option: str, size: str) -> None:
    done = run("factorize", llama, "-o", tmp_path / "f", f"{option}={size}")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"'{option}': {size!r} is no size such as 8GB, 500MB or 7.5GiB" in done.stderr
    assert not (tmp_path / "f").exists()


# Devices.


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cpu,cpu", "cpu,gpu", "", "cpu,", "all,cpu", "meta", "cuda:-1", "cuda;0"])
def test_devices_that_make_no_sense_anywhere(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        choose_devices(name)
    assert "got:" in str(caught.value)
    assert "try:" in str(caught.value) or "expected:" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda(llama: Path, tmp_path: Path) -> None:
    assert choose_devices("cpu") == [torch.device("cpu")]
    for name in ("all", "cuda:0", "cuda:0,cuda:1", "cpu,cuda:0"):
        done = run("factorize", llama, "-o", tmp_path / "f", "--device", name)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "--device auto takes a device that is there" in done.stderr
        assert not (tmp_path / "f").exists()


@pretend_gpu(cards=("Pretended",) * 3)
def test_several_cuda_devices() -> None:
    every = [torch.device("cuda", i) for i in range(3)]
    assert choose_devices("all") == every
    assert choose_devices("cuda:2, cuda:0") == [every[2], every[0]]
    for name in ("cuda:0,cuda:0", "cuda:0,cpu", "cuda:1,cuda:2,cuda:1", "cuda,cuda:0", "cuda,cuda"):
        with pytest.raises(OptionError, match="cannot be used together") as caught:
            choose_devices(name)
        assert "different CUDA devices: cuda:0,cuda:1" in str(caught.value)
    with pytest.raises(OptionError, match="cuda:3 is not there"):
        choose_devices("cuda:0,cuda:3")


# Profiles.


def shares(table: str) -> dict[str, dict[str, int]]:
    """By kind of thread and stage the per cent of a profile's table."""
    heading, _, *lines = table.splitlines()
    assert heading.split() == ["threads", "stage", "seconds", "of", "its", "time"]
    found: dict[str, dict[str, int]] = {}
    kind = ""
    for line in lines:
        if (row := re.fullmatch(r"(.*\S)? +(\w+) +([0-9]+\.[0-9]{2}) +([0-9]+) %", line)) is None:
            continue
        kind = row[1] or kind
        found.setdefault(kind, {})[row[2]] = int(row[4])
    return found


def test_profile_as_a_table(mixed: Path, tmp_path: Path) -> None:
    with cores(2):
        start = time.perf_counter()
        done = run("factorize", mixed, "-o", tmp_path / "f", "--rank", 4, "--device", "cpu", "--profile")
        seconds = time.perf_counter() - start
    assert done.exit_code == 0
    found = shares(done.stdout)
    assert found.keys() == {"reader", "2 workers", "2 writers"}
    assert {"svd", "residual", "correction", "wait"} <= found["2 workers"].keys()
    assert {"read", "hash", "wait"} == found["reader"].keys()
    assert {"hash", "write", "wait"} == found["2 writers"].keys()
    for stages in found.values():
        assert abs(sum(stages.values()) - 100) <= len(stages)  # each is rounded
    assert sum(found["2 workers"][stage] for stage in ("svd", "residual", "correction")) > 20
    last = re.fullmatch(r"([0-9.]+) s at the weight files, mostly .*; ([0-9.]+) s in all", done.stdout.splitlines()[-1])
    assert last
    assert float(last[1]) <= float(last[2]) + 0.05 <= seconds + 0.1
    # What is no data is where it always is.
    assert "25 matrices at rank 4" in done.stderr

    done = run("fold", tmp_path / "f", tmp_path / "f" / SCALES, "-o", tmp_path / "o", "--device", "cpu", "--profile")
    found = shares(done.stdout)
    assert "fold" in next(stages for kind, stages in found.items() if "worker" in kind)
    assert all(abs(sum(stages.values()) - 100) <= len(stages) for stages in found.values())


@pytest.mark.parametrize("command", ["factorize", "fold"])
def test_profile_as_json(mixed: Path, tmp_path: Path, command: str) -> None:
    with cores(2):
        arguments: list[object] = ["factorize", mixed, "-o", tmp_path / "f", "--rank", 4]
        if command == "fold":
            assert run(*arguments).exit_code == 0
            arguments = ["fold", tmp_path / "f", tmp_path / "f" / SCALES, "-o", tmp_path / "o"]
        done = run(*arguments, "--device", "cpu", "--profile", "--json")
    report = json.loads(done.stdout)
    profile = report["profile"]
    assert 0 < profile["seconds"] <= report["seconds"]
    assert profile["threads"] == {"download": 1, "reader": 1, "worker": 2, "writer": 2}
    assert profile["stages"].keys() == {"reader", "worker", "writer"}
    for kind, stages in profile["stages"].items():
        assert abs(sum(stages.values()) - profile["threads"][kind] * profile["seconds"]) < 0.01
        assert all(seconds >= 0 for seconds in stages.values())
    assert "profile" not in json.loads(run(*arguments, "--device", "cpu", "--json", "--overwrite").stdout)


def test_profile_of_downloads(hub: LoopbackHub, llama: Path, tmp_path: Path) -> None:
    hub.publish("acme/profiled", llama)
    stream = ("--stream", "--device", "cpu", "--profile", "--json")
    done = run("factorize", "acme/profiled", "-o", tmp_path / "f", "--rank", 4, "--layout", "overlay", *stream)
    assert json.loads(done.stdout)["profile"]["stages"]["download"]["download"] > 0
    done = run("fold", tmp_path / "f", tmp_path / "f" / SCALES, "-o", tmp_path / "o", *stream)
    assert json.loads(done.stdout)["profile"]["stages"]["download"]["download"] > 0
    assert files_of(tmp_path / "o") == files_of(llama)


def test_profile_of_nothing_to_do(llama: Path, factorized: Path) -> None:
    done = run("factorize", llama, "-o", factorized, "--rank", 4, "--profile")
    assert (done.exit_code, done.stdout) == (0, "nothing to show: no shard was worked on\n")


def test_stages_within_others_are_counted_for_themselves_alone() -> None:
    timing = Timing()
    timing.watch("worker")
    start = time.perf_counter()
    with timed("svd"):
        time.sleep(0.02)
        with timed("copy"):
            time.sleep(0.04)
            with timed("svd"):
                time.sleep(0.01)
            time.sleep(0.04)
        time.sleep(0.02)
        with pytest.raises(ValueError), timed("hash"):
            time.sleep(0.03)
            raise ValueError  # what fails has taken its time as well
    elapsed = time.perf_counter() - start
    seconds = timing.seconds
    assert seconds.keys() == {("worker", "svd"), ("worker", "copy"), ("worker", "hash")}
    assert seconds["worker", "svd"] >= 0.05
    assert seconds["worker", "copy"] >= 0.08
    assert seconds["worker", "hash"] >= 0.03
    assert 0.95 * elapsed < sum(seconds.values()) <= elapsed


def test_only_threads_that_are_watched_count() -> None:
    timing = Timing()

    def work(kind: str | None) -> None:
        if kind is not None:
            timing.watch(kind)
        with timed("hash"):
            time.sleep(0.01)

    for kind in ("reader", None, "writer", "writer"):
        thread = threading.Thread(target=work, args=(kind,))
        thread.start()
        thread.join()
    assert timing.seconds.keys() == {("reader", "hash"), ("writer", "hash")}
    assert timing.seconds["writer", "hash"] >= 0.02
    # A thread that goes on with another run counts there from then on.
    other = Timing()

    def both() -> None:
        work("reader")
        before.update(timing.seconds)
        other.watch("worker")
        with timed("svd"):
            pass

    before: dict[tuple[str, str], float] = {}
    thread = threading.Thread(target=both)
    thread.start()
    thread.join()
    assert timing.seconds == before
    assert other.seconds.keys() == {("worker", "svd")}
