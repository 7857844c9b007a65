"""Writing behind, past the system's cache: what arrives, how, and what happens when it does not."""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import OutputError
from surgery.format import files
from surgery.format.files import FileWriter

CHUNK = 2 << 20
SIZES = [0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 4097]


class Watched(io.FileIO):
    """A file that keeps how it was written: (past the cache, bytes)."""

    taken: Callable[[int], int] = staticmethod(lambda size: size)
    direct_fails = False

    def __init__(self, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.log: list[tuple[bool, int]] = []

    def write(self, data: Any) -> int:
        direct = bool(fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT)
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

    monkeypatch.setattr(files, "open", opened, raising=False)
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
    assert "goes on where it stopped" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(files, "open", lambda path, mode, buffering: builtins.open("/dev/full", "wb", 0), raising=False)
    for size in (1, 5 * CHUNK):
        with pytest.raises(OutputError, match="No space left"), FileWriter(tmp_path / "full") as writer:
            writer.write(bytes(size))
            writer.commit("full")


def test_leaving_early_stops_the_thread(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FileWriter(tmp_path / "x") as writer:
        writer.write(bytes(3 * CHUNK + 1))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
