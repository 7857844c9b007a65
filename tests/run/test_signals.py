"""Signals that ask the command to stop: Ctrl-C, SIGTERM, and the SIGHUP of a connection that is lost, on a real terminal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

import surgery
from tests.models import files_of, realistic

if not hasattr(signal, "SIGHUP"):
    pytest.skip("signals of POSIX", allow_module_level=True)

pty = pytest.importorskip("pty")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards, each of which takes long enough to be stopped in."""
    folder = tmp_path_factory.mktemp("m") / "m"
    folder.mkdir()
    for i in range(8):
        weights = {f"layers.{i}.a{j}.weight": realistic(512, 600, seed=10 * i + j) for j in range(2)}
        save_file(weights, folder / f"part-{i}.safetensors")
    return folder


@pytest.fixture(scope="module")
def truth(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run gives."""
    out = tmp_path_factory.mktemp("truth") / "f"
    surgery.factorize(model, out, device="cpu")
    return files_of(out)


def _command(model: Path, out: Path) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), "factorize", str(model), "-o", str(out), "--device", "cpu"]


def _under_way(out: Path, is_over: Callable[[], bool], shards: int = 1) -> None:
    """Wait until a run has finished so many shards."""
    deadline = time.monotonic() + 100
    while len(list((out / ".surgery").glob("0*.json"))) < shards:
        assert time.monotonic() < deadline
        assert not is_over()
        time.sleep(0.005)


def _exit_code(child: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the command did not end")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def _goes_on(model: Path, out: Path, truth: dict[str, bytes]) -> None:
    assert not list(out.rglob("*.partial"))
    assert not (out / "surgery/manifest.json").exists()
    done = subprocess.run(_command(model, out), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "continuing after" in done.stderr
    assert files_of(out) == truth


def _on_a_terminal(command: list[str], *, before: str = "") -> tuple[int, int]:
    """A command as the leader of a session with a terminal of its own: its number, and our end of the terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("sh", ["sh", "-c", f"{before}exec {shlex.join(command)}"])
    return child, terminal


def test_a_terminal_that_is_closed(model: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """The system sends SIGHUP, and all that is written from then on fails with EIO. The end is the stop's all the same."""
    out = tmp_path / "f"
    child, terminal = _on_a_terminal(_command(model, out))
    _under_way(out, lambda: False)
    os.close(terminal)
    assert _exit_code(child) == 129
    _goes_on(model, out, truth)


def test_a_connection_that_is_lost_is_told_in_a_log(model: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """Where stderr is no terminal somebody can read it afterwards."""
    out, log = tmp_path / "f", tmp_path / "log"
    child, terminal = _on_a_terminal(_command(model, out), before=f"exec 2> {shlex.quote(str(log))}; ")
    _under_way(out, lambda: False)
    os.close(terminal)
    assert _exit_code(child) == 129
    said = log.read_text()
    assert "the same command continues from there" in said
    assert said.endswith("Interrupted.\n")
    assert "Traceback" not in said
    _goes_on(model, out, truth)


@pytest.mark.parametrize("how", ["ignored", "nohup"])
def test_what_is_ignored_at_the_beginning_stays_so(how: str, model: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """Under nohup, or behind a trap, the run outlives its terminal, comes to its end, and has no error to tell."""
    out = tmp_path / "f"
    command, before = _command(model, out), f"cd {shlex.quote(str(tmp_path))}; "
    if how == "nohup":
        command.insert(0, how)
    else:
        before += "trap '' HUP; "
    child, terminal = _on_a_terminal(command, before=before)
    _under_way(out, lambda: False)
    os.close(terminal)
    assert _exit_code(child) == 0
    assert files_of(out) == truth


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGHUP, signal.SIGHUP],
        [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM],
        [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
    ],
)
def test_more_than_one(numbers: list[signal.Signals], model: Path, truth: dict[str, bytes], tmp_path: Path) -> None:
    """Those that come while the run cleans up change nothing of its end."""
    out = tmp_path / "f"
    running = subprocess.Popen(_command(model, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _under_way(out, lambda: running.poll() is not None)
    for number in numbers:
        running.send_signal(number)
    stdout, stderr = running.communicate(timeout=60)
    # Which of several at a time is seen first is Python's affair. One that comes when all is said and done kills as ever.
    assert running.returncode in {code for number in numbers for code in (128 + number, -number)}
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "the same command continues from there" in stderr
    _goes_on(model, out, truth)


def test_ctrl_c_again_and_again(tmp_path: Path) -> None:
    """While a clean-up hangs the second one is told how to stop at once, and the third one does; nothing else stops it."""
    program = (
        "import sys, time, threading\n"
        "import surgery.format.manifest as manifest\n"
        "def wait(*_):\n"
        "    try:\n        print('waiting', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('cleaning up', flush=True)\n        time.sleep(60)\n"
        "manifest.Manifest.read = wait\n"
        "from surgery.cli.main import main\n"
        f"main(['inspect', {str(tmp_path)!r}])\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, bufsize=0
    )
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.readline() == "waiting\n"
    running.send_signal(signal.SIGINT)
    assert running.stdout.readline() == "cleaning up\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        running.send_signal(number)
    assert running.stderr.readline() == "\n"
    assert running.stderr.readline() == "Stopping. This may take a moment; press Ctrl-C again to stop at once.\n"
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130


def test_a_command_that_writes_nothing(tmp_path: Path) -> None:
    """It ends in the same way."""
    program = (
        "import sys, time\n"
        "import surgery.format.manifest as manifest\n"
        "def wait(*_):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "manifest.Manifest.read = wait\n"
        "from surgery.cli.main import main\n"
        f"main(['inspect', {str(tmp_path)!r}])\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "waiting\n"
    running.send_signal(signal.SIGHUP)
    _, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (129, "Interrupted.\n")
