"""Every command on a system that fails or kills it at the n-th call, or gives too little, and on a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery.cli.bar import Bar
from surgery.errors import OutputError, ReadError, ResourceError, naming_system_errors
from surgery.files.access import read_errors, write_errors
from tests.failing.system import compiler, preloaded

ROOT = Path(__file__).parents[2]
SLOW = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler for the library that makes a system fail")


def told(arguments: list[str], under: tuple[str, ...] = ()) -> dict[str, int]:
    """The last line of a sweep: how many trials there were, and of what outcome."""
    done = preloaded(arguments, under, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    last: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return last


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--most", "12", "--every", "120", "--but", "extract,export,push export"], id="some"),
        pytest.param([], id="all", marks=SLOW),
    ],
)
def test_the_nth_operation_fails(options: list[str], tmp_path: Path) -> None:
    counts = told(["tests.failing", str(tmp_path / "bench"), *options])
    assert counts["trials"] >= 12
    assert min(counts["right"], counts["refused"]) > 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_too_little(tmp_path: Path) -> None:
    """Open files, address space, sizes of files, threads."""
    counts = told(["tests.failing.limits", str(tmp_path / "bench")])
    assert counts["refused"] > 0
    assert counts["right"] > 0


def _may_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


@needs_compiler
@pytest.mark.skipif(not _may_mount(), reason="no user namespace in which a disk may be mounted")
@pytest.mark.parametrize(
    "options",
    [pytest.param(["--steps", "2", "project"], id="some"), pytest.param([], id="all", marks=SLOW)],
)
def test_a_disk_that_is_full(options: list[str], tmp_path: Path) -> None:
    """In bytes and in files; then there is room, and the same command goes on."""
    counts = told(["tests.failing.limits", str(tmp_path / "bench"), "--disk", *options], under=("unshare", "-rm"))
    assert counts["refused"] > 0
    assert counts["right"] > 0


@pytest.mark.parametrize(
    ("number", "what_to_do"),
    [
        (errno.EACCES, "ls -l"),
        (errno.EIO, "dmesg"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "--max-memory"),
        (errno.ESTALE, "mount it again"),
        (errno.ENXIO, "run the same command again"),
    ],
)
def test_what_to_do_is_told(number: int, what_to_do: str) -> None:
    for kind, told_by in (
        (ReadError, read_errors(Path("a"))),
        (OutputError, write_errors(Path("a"))),
        (ReadError, naming_system_errors()),
    ):
        with pytest.raises(kind) as caught, told_by:
            raise OSError(number, os.strerror(number), "a")
        assert str(caught.value).startswith("a: ")
        assert what_to_do in str(caught.value.hint)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_can_be_written_soon(number: int) -> None:
    with pytest.raises(OutputError, match="then run the same command again"), write_errors(Path("a")):
        raise OSError(number, os.strerror(number), "a")


def _of_torch() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def _of_python() -> None:
    bytes(1 << 60)


@pytest.mark.parametrize("lacking", [_of_torch, _of_python])
def test_too_little_memory_is_an_error_of_ours(lacking: object) -> None:
    with pytest.raises(ResourceError, match="not enough memory") as caught, naming_system_errors():
        lacking()  # type: ignore[operator]
    assert "--max-memory" in str(caught.value.hint)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "error", [RuntimeError("another"), BrokenPipeError(errno.EPIPE, "Broken pipe"), ImportError("no module")]
)
def test_what_is_not_of_the_system_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_system_errors():
        raise error
    assert caught.value is error


def test_a_bar_without_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who has to wait long sees less."""

    def failing(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", failing)
    bar = Bar(quiet=False)
    bar.start("factorizing", 10)
    bar.item("a")
    bar.advance(10)
    bar.finish()
