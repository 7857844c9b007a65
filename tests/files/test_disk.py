"""Writing behind, past the system's cache: what arrives, how, and what happens when it does not."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import itertools
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import OutputError
from surgery.files import file_writer
from surgery.files.file_writer import FileWriter, write_file
from surgery.format.safetensors import TensorFileWriter

fcntl = pytest.importorskip("fcntl")
CHUNK = 2 << 20
SYNCED = 32 << 20
SIZES = [0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 4097, SYNCED + CHUNK]


class Watched(io.FileIO):
    """A file that keeps how it was written: (past the cache, bytes)."""

    taken: Callable[[int], int] = staticmethod(lambda size: size)
    direct_fails = False
    start = 0

    def __init__(self, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.seek(self.start)
        self.log: list[tuple[bool, int]] = []

    def write(self, data: Any) -> int:
        direct = bool(fcntl.fcntl(self, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
        if direct and self.direct_fails:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        written = super().write(data[: self.taken(len(data))]) or 0
        self.log.append((direct, written))
        return written


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    """The kind of file that a FileWriter opens; a class of its own for every test."""
    kind = type("Watched", (Watched,), {})

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        return kind(path, mode.replace("b", "")) if "x" in mode else builtins.open(path, mode, buffering)

    monkeypatch.setattr(file_writer, "open", opened, raising=False)
    return kind


def write_in_pieces(path: Path, data: bytes, seed: int = 0, *, read_soon: bool = False) -> list[tuple[bool, int]]:
    """Through a FileWriter, in pieces of all sizes; how they were written."""
    chance = random.Random(seed)
    with FileWriter(path, read_soon=read_soon) as writer:
        done = 0
        while done < len(data):
            piece = chance.choice([1, 1000, 1 << 16, 1 << 20, 3 * CHUNK])
            writer.write(data[done : done + piece])
            done += piece
        record = writer.commit(path.name)
    assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    log: list[tuple[bool, int]] = writer.file.log  # type: ignore[attr-defined]
    return log


@pytest.mark.parametrize("read_soon", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_arrives(size: int, read_soon: bool, tmp_path: Path, watched: type[Watched]) -> None:
    data = random.Random(size).randbytes(size)
    folders = [tmp_path, *([shared] if (shared := Path("/dev/shm")).is_dir() else [])]
    for folder in folders:
        path = folder / f"surgery-test-{os.getpid()}.bin"
        try:
            log = write_in_pieces(path, data, read_soon=read_soon)
            assert path.read_bytes() == data
        finally:
            path.unlink(missing_ok=True)
        if read_soon:
            assert not any(direct for direct, _ in log)
        assert all(written % 4096 == 0 for direct, written in log if direct)


def test_whole_chunks_go_past_the_cache(tmp_path: Path, watched: type[Watched]) -> None:
    with open(tmp_path / "probe", "wb", buffering=0) as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETFL, fcntl.fcntl(probe, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no O_DIRECT")
    assert write_in_pieces(tmp_path / "x", bytes(2 * CHUNK + 10)) == [(True, CHUNK), (True, CHUNK), (False, 10)]


def test_a_file_system_that_takes_the_flag_but_not_the_writes(tmp_path: Path, watched: type[Watched]) -> None:
    watched.direct_fails = True
    data = random.Random(1).randbytes(3 * CHUNK + 5)
    log = write_in_pieces(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data
    assert not any(direct for direct, _ in log)


@pytest.mark.parametrize("limit", [10_000, 3 * 4096, CHUNK - 4096])
def test_short_writes(limit: int, tmp_path: Path, watched: type[Watched]) -> None:
    watched.taken = staticmethod(lambda size: min(size, limit))
    data = random.Random(2).randbytes(2 * CHUNK + 12345)
    write_in_pieces(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("good", range(5))
def test_a_write_that_fails_behind(good: int, tmp_path: Path, watched: type[Watched]) -> None:
    """Told at one of the next writes or at the end, whichever comes first, and nobody waits for ever."""
    writes = itertools.count()

    def taken(size: int) -> int:
        if next(writes) == good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return size

    watched.taken = staticmethod(taken)
    with pytest.raises(OutputError, match="No space left") as raised:
        write_in_pieces(tmp_path / "x", bytes(4 * CHUNK + 1))
    assert "continues where it stopped" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(file_writer, "open", lambda path, mode, buffering: builtins.open("/dev/full", "wb", 0), raising=False)
    for size in (1, 5 * CHUNK):
        with pytest.raises(OutputError, match="No space left"), FileWriter(tmp_path / "full") as writer:
            writer.write(bytes(size))
            writer.commit("full")


def test_leaving_early_stops_the_thread(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FileWriter(tmp_path / "x") as writer:
        writer.write(bytes(3 * CHUNK + 1))
        assert "surgery-disk" in [thread.name for thread in threading.enumerate()]
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    assert "surgery-disk" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ValueError, match="has been finished"):
        writer.write(b"x")


def test_from_a_place_within_a_page(tmp_path: Path, watched: type[Watched]) -> None:
    watched.start = 100
    data = random.Random(3).randbytes(2 * CHUNK + 5)
    log = write_in_pieces(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == bytes(100) + data
    assert not any(direct for direct, _ in log)


@pytest.mark.parametrize("read_soon", [False, True])
def test_a_sync_that_fails_behind(read_soon: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FileWriter(tmp_path / "x", read_soon=read_soon) as writer:
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(OutputError, match="Input/output error"):
            writer.write(bytes(SYNCED + 3 * CHUNK))
            pytest.fail("the next bytes were taken")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_sync_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not known to stay is not left: a file that was told to have failed must not be found there."""
    sync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        write_file(tmp_path / "x", b"whole")
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what it is about is told: the file that is in place is no failure, and a failure stays what it is."""
    unlink, armed = Path.unlink, []

    def failing(path: Path, missing_ok: bool = False) -> None:
        if armed:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    with FileWriter(tmp_path / "x") as writer:
        writer.write(b"whole")
        writer.commit("x")
        armed.append(True)
    armed.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(KeyError), FileWriter(tmp_path / "y"):
        armed.append(True)
        raise KeyError


@pytest.mark.parametrize("chunks", [1, 3])
def test_what_is_no_error_of_the_disk(chunks: int, tmp_path: Path, watched: type[Watched]) -> None:
    """Whatever happens in the thread is told, and never a file that looks whole."""

    def taken(size: int) -> int:
        raise MemoryError("no room")

    watched.taken = staticmethod(taken)
    with pytest.raises(MemoryError, match="no room"):
        write_in_pieces(tmp_path / "x", bytes(chunks * CHUNK + 10))
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start new thread"), FileWriter(tmp_path / "x") as writer:
        writer.write(bytes(CHUNK))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of Python, stopped between a call and its result
def test_ctrl_c_at_any_moment(tmp_path: Path) -> None:
    """Also while the file is being opened, before ``with`` has it in hand."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    path, stops, moments, takes = tmp_path / "x", 0, random.Random(1), 1e-3
    timer, handler = signal.setitimer(signal.ITIMER_REAL, 0), signal.signal(signal.SIGALRM, stop)
    try:
        while stops < 500:
            path.unlink(missing_ok=True)
            begun = time.perf_counter()
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, takes))
                try:
                    write_file(path, b"whole")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                takes = (takes + time.perf_counter() - begun) / 2
            except KeyboardInterrupt:
                stops += 1
            assert [file.name for file in tmp_path.iterdir()] in ([], ["x"])
            assert not path.exists() or path.read_bytes() == b"whole"
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # the test's own time limit


def test_a_header_that_is_taken_bit_by_bit(tmp_path: Path, watched: type[Watched]) -> None:
    """The header is written last: what the disk does not take of it must not be left out."""
    watched.taken = staticmethod(lambda size: min(size, 100))
    tensors = {f"{i}": torch.full((3,), float(i)) for i in range(50)}
    with TensorFileWriter(tmp_path / "x", tensors) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        record = writer.commit("x")
    assert record.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "x").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
