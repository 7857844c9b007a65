"""Commands run in children whose system fails at a moment that is chosen, and what is left of them.

A process that uses this must be one of its own, single-threaded but for the hub, in which torch has computed nothing: it forks.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import importlib
import json
import os
import re
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tests.forks  # noqa: F401
from surgery.cli.main import main as surgery_command
from surgery.format.manifest import Manifest
from surgery.names import SCALES_FILE
from surgery.publish import upload
from surgery.solvers.processor import processor
from tests.failing.system import System
from tests.loopback_hub import WRITING_TOKEN, LoopbackHub
from tests.models import files_of, save_llama

#: Seconds after which a command hangs. The slowest takes two, and the hub's client waits for half a minute before it gives up.
LIMIT = 60
#: What a child exits with where an exception leaves the command, which for a user is a traceback.
_ESCAPED = 70
#: What ``verify`` exits with where something does not hold.
FOUND = 3
_REPO = "acme/trial"


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong.

    Attributes:
        operations, at, error, goes_on: see ``System.arm``.
    """

    operations: tuple[str, ...]
    at: int
    error: int
    goes_on: bool = False

    def __str__(self) -> str:
        what = "killed before" if not self.error else errno.errorcode[self.error] + (" from" if self.goes_on else " at")
        return f"{what} {'|'.join(self.operations)} {self.at}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command that writes to the folder ``out``.

    Attributes:
        name: for the table.
        arguments: of the command line; ``OUT`` stands for the folder.
        markers: files that make what is there look finished.
        earlier: a folder with what ``out`` holds before.
        pushes: whether it uploads to the repository ``acme/trial``.
        in_parts: whether each file takes the place of the earlier one by itself, and it may end with what it has found.
    """

    name: str
    arguments: tuple[str, ...]
    markers: tuple[str, ...]
    earlier: Path | None = None
    pushes: bool = False
    in_parts: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of a child: its exit code (negative: the signal), what it said, what its system counted, what it imported."""

    code: int
    said: str
    fallen: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


class Finding(AssertionError):
    """What must not be."""


class Bench:
    """A folder with a model and all that is made of it, and trials of commands on these.

    Args:
        folder: empty; its files are those that count.
        system: below this process.
        hub: where results are pushed to.
    """

    def __init__(self, folder: Path, system: System, hub: LoopbackHub) -> None:
        self.folder = folder.resolve()
        self._system, self._hub = system, hub
        self._temporary = self.folder / "tmp"
        self._temporary.mkdir(parents=True)
        os.environ["TMPDIR"] = str(self._temporary)
        os.environ["HF_TOKEN"] = WRITING_TOKEN
        upload._PAUSES, upload._SECONDS_BETWEEN_COMMITS = (0.01, 0.01), 0.0  # type: ignore[assignment,misc]
        self.inputs = self.folder / "inputs"
        #: Where results are written.
        self.place = self.folder
        self.commands = {command.name: command for command in self._prepared()}
        self._inputs_before = _stamps(self.inputs)
        self._truths: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {}

    def _prepared(self) -> list[Command]:
        inputs, shape = self.inputs, {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 61}
        model = save_llama(inputs / "model", torch.bfloat16, shard_size="22KB", **shape)
        tuned = Path(shutil.copytree(model, inputs / "tuned"))
        for path in tuned.glob("*.safetensors"):
            save_file({name: tensor * 1.125 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        other = inputs / "other"
        other.mkdir()
        weights = {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        save_file(weights, other / "model.safetensors")
        shutil.copy(model / "config.json", other)
        (other / "vocab.json").write_text("{}")
        f = inputs / "f"
        at_rank = ("--rank", "4", "--device", "cpu")
        self._must_run("factorize", str(model), "-o", str(f), *at_rank)
        ones, scales = load_file(f / "surgery/scales.safetensors"), []
        metadata = {"format": "pt"}
        for factor in (1.5, 0.75):
            scales.append(str(inputs / f"scales {factor}.safetensors"))
            save_file({name: value * factor for name, value in ones.items()}, scales[-1], metadata=metadata)
        fold = ("fold", str(f), scales[0], "-o", "OUT", "--device", "cpu")
        factorize = ("factorize", str(model), "-o", "OUT", *at_rank)
        manifest, config = ("surgery/manifest.json",), ("config.json",)
        return [
            Command("factorize", factorize, manifest),
            Command("fold", fold, config),
            Command("fold --overwrite", (*fold, "--overwrite"), config, other),
            Command(
                "spectra",
                ("spectra", str(model), str(tuned), "-o", "OUT", "--top", "8", "--device", "cpu"),
                ("spectra.json",),
            ),
            Command(
                "recommend",
                ("recommend", str(model), "--budget", "200", "-o", "OUT/recipe.toml", "--device", "cpu", "--max-rank", "16"),
                ("recipe.toml",),
            ),
            Command(
                "extract",
                ("extract", str(model), str(tuned), "-o", "OUT", "--rank", "4", "--device", "cpu"),
                ("extraction.json",),
            ),
            Command("export", ("export", str(f), scales[0], "-o", "OUT"), ("adapter_config.json",)),
            Command(
                "project", ("project", str(f), str(tuned), "-o", "OUT/p.safetensors", "--device", "cpu"), ("p.safetensors",)
            ),
            Command("blend", ("blend", *scales, "-o", "OUT/b.safetensors"), ("b.safetensors",)),
            Command("scales", ("scales", "show", scales[0]), ()),
            Command(
                "verify --repair",
                ("verify", "OUT", "--repair", "--base", str(model), "--device", "cpu"),
                (),
                _damaged(f, inputs / "damaged"),
                in_parts=True,
            ),
            Command("push factorize", (*factorize, "--push-to-hub", _REPO), manifest, pushes=True),
            Command("push fold", (*fold, "--push-to-hub", _REPO), config, pushes=True),
            Command("push export", ("export", str(f), scales[0], "-o", "OUT", "--push-to-hub", _REPO), (), pushes=True),
        ]

    def _must_run(self, *arguments: str) -> None:
        outcome = self.run(arguments)
        if outcome.code:
            raise Finding(f"{arguments[0]}, undisturbed: exit code {outcome.code}\n{outcome.said}")

    def run(self, arguments: tuple[str, ...], fault: Fault | None = None, before: Callable[[], object] = bool) -> Outcome:
        """The command in a child, which calls ``before`` first."""
        said, saying = _pipe()
        told, telling = _pipe()
        child = os.fork()
        if child == 0:
            self._in_child(arguments, fault, before, saying, telling)
        os.close(saying)
        os.close(telling)
        watched = os.pidfd_open(child)
        in_time = bool(select.select([watched], [], [], LIMIT)[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(watched)
        texts = []
        for number in (said, told):
            with open(number, errors="replace") as pipe:
                texts.append(pipe.read())
        if not in_time:
            raise Finding(f"hangs\n{texts[0][-4000:]}")
        return Outcome(os.waitstatus_to_exitcode(status), texts[0], **json.loads(texts[1] or "{}"))

    def _in_child(
        self, arguments: tuple[str, ...], fault: Fault | None, before: Callable[[], object], log: int, telling: int
    ) -> None:
        code = _ESCAPED
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            sys.modules["matplotlib"] = None  # type: ignore[assignment]  # which reads hundreds of files of its own
            threading.excepthook = lambda it: print("THREAD EXCEPTION", it.exc_type, it.exc_value, flush=True)
            sys.unraisablehook = lambda it: print("UNRAISABLE", it.exc_type, it.exc_value, it.object, flush=True)
            faulthandler.dump_traceback_later(LIMIT - 5, file=log)
            torch.set_num_threads(1)
            processor()  # oneDNN makes code for its first products, and crashes where it gets no memory for that
            before()
            if fault is None:
                self._system.arm(self.folder)
            else:
                self._system.arm(self.folder, fault.operations, fault.at, fault.error, goes_on=fault.goes_on)
            try:
                surgery_command.main(list(arguments), prog_name="surgery")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            for thread in threading.enumerate():  # which Python waits for at its end
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            self._system.disarm()
            told = {"fallen": self._system.fallen(), "counts": self._system.counts(), "modules": list(sys.modules)}
            os.write(telling, json.dumps(told).encode())
        except BaseException:
            self._system.disarm()
            traceback.print_exc()
        finally:
            os._exit(code)

    def truth(self, command: Command) -> tuple[dict[str, bytes], dict[str, bytes], Outcome]:
        """What an undisturbed run leaves in its folder and on the hub, and what it counted."""
        for _ in range(2):
            out = self._out(command)
            outcome = self.run(self._arguments(command, out))
            if outcome.code:
                raise Finding(f"{command.name}, undisturbed: exit code {outcome.code}\n{outcome.said}")
            for module in outcome.modules:  # here, and not in each child: the second one counts what is no import
                with suppress(ImportError):
                    importlib.import_module(module)
        self._truths[command.name] = files_of(out) if out.exists() else {}, self._uploaded()
        return *self._truths[command.name], outcome

    def _out(self, command: Command) -> Path:
        """The folder of a command, with what is there before it."""
        out = self.place / "out"
        shutil.rmtree(out, ignore_errors=True)
        if command.earlier is not None:
            shutil.copytree(command.earlier, out)
        if _REPO in self._hub.repos:
            shutil.rmtree(self._hub.repos.pop(_REPO).folder)
        return out

    @staticmethod
    def _arguments(command: Command, out: Path) -> tuple[str, ...]:
        return tuple(argument.replace("OUT", str(out)) for argument in command.arguments)

    def _uploaded(self) -> dict[str, bytes]:
        return files_of(self._hub.repos[_REPO].folder) if _REPO in self._hub.repos else {}

    def trial(
        self,
        command: Command,
        fault: Fault | None = None,
        before: Callable[[], object] = bool,
        after: Callable[[], object] = bool,
    ) -> str:
        """Let a command fail, look at what it says and leaves, and let it be run again.

        Args:
            command: which.
            fault: what its system does.
            before: called in the child before the command: takes something from it.
            after: called when it has ended: gives it back.

        Returns:
            What became of it: ``did not come``, ``right``, ``refused`` or ``killed``.

        Raises:
            Finding: something is as it must not be.
        """
        out = self._out(command)
        arguments = self._arguments(command, out)
        outcome = self.run(arguments, fault, before)
        after()
        # A file that cannot be removed stays.
        may_leave = outcome.code < 0 or (fault is not None and ("unlink" in fault.operations or fault.goes_on))
        self._look(command, out, outcome, may_leave=may_leave)
        if outcome.code == 0:
            if (
                fault is not None and (out / ".surgery").exists()
            ):  # the hidden folder, which could not be removed and is no harm
                self._is_whole(command, out, but=".surgery/")
                self.run(arguments)
            self._is_whole(command, out)
            return "did not come" if fault is not None and not outcome.fallen else "right"
        is_there = outcome.code < 0 and not command.pushes and out.exists() and _result_in(out) == self._truths[command.name][0]
        again = self.run(arguments)
        if again.code and not (is_there and "is there already" in again.said):  # killed as the last thing it did
            raise Finding(f"the same command fails as well: {again.code}\n{again.said}\nbefore:\n{outcome.said}")
        self._is_whole(command, out)
        return "refused" if outcome.code > 0 else "killed"

    def _look(self, command: Command, out: Path, outcome: Outcome, *, may_leave: bool) -> None:
        said = outcome.said
        if outcome.code not in (0, 1, -signal.SIGKILL) and not (command.in_parts and outcome.code == FOUND):
            raise Finding(f"exit code {outcome.code}\n{said}")
        if any(word in said for word in ("Traceback", "THREAD EXCEPTION", "UNRAISABLE")):
            raise Finding(f"a traceback\n{said}")
        if outcome.code == 1:
            error = said[said.find("Error: ") :]
            if not error.startswith("Error: ") or "\n  try:" not in error:
                raise Finding(f"no error that says what to do\n{said}")
        if outcome.code == FOUND and re.search(r"\); [a-z]", said) is None:
            raise Finding(f"nothing of what the system has said, or not what to do\n{said}")
        truth, uploaded = self._truths[command.name]
        before = None if command.earlier is None else files_of(command.earlier)
        left, result = (files_of(out), _result_in(out)) if out.exists() else ({}, {})
        if any(name in left for name in command.markers) and result not in (truth, before):
            raise Finding(f"looks whole and is not\n{said}")
        if command.in_parts and before is not None:
            whole = {name: data for name, data in result.items() if not name.endswith(".partial")}
            parts = [name for name, data in whole.items() if data not in (before.get(name), truth.get(name))]
            if parts or before.keys() - result.keys():
                raise Finding(f"neither as they were nor as they are to be: {parts}, {before.keys() - result.keys()}\n{said}")
        elif before is not None and result not in (before, truth) and not (out / ".surgery").is_dir():
            raise Finding(f"the earlier result is gone, and nothing to go on with\n{said}")
        if not may_leave and any(name.endswith(".partial") for name in left):
            raise Finding(f"partial files are left: {[name for name in left if name.endswith('.partial')]}\n{said}")
        self._temporary_is_empty(said, may_leave=may_leave)
        if _stamps(self.inputs) != self._inputs_before:
            raise Finding("an input has been written to")
        for commit in self._hub.repos[_REPO].history if command.pushes and _REPO in self._hub.repos else ():
            whole = any(name in commit.files for name in ("config.json", "surgery/manifest.json", "adapter_config.json"))
            if whole and commit.files.keys() != uploaded.keys():
                raise Finding(f"the repository looks whole and is not\n{said}")

    def _temporary_is_empty(self, said: str, *, may_leave: bool) -> None:
        left = list(self._temporary.iterdir())
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if left and not may_leave:
            raise Finding(f"temporary files are left: {left}\n{said}")

    def _is_whole(self, command: Command, out: Path, but: str | None = None) -> None:
        truth, uploaded = self._truths[command.name]
        found = files_of(out) if out.exists() else {}
        found = {name: data for name, data in found.items() if but is None or not name.startswith(but)}
        if found != truth:
            differing = {name for name in truth.keys() | found.keys() if truth.get(name) != found.get(name)}
            raise Finding(f"not what an undisturbed run gives: {sorted(differing)}")
        if command.pushes and self._uploaded() != uploaded:
            theirs = self._uploaded()
            differing = {name for name in uploaded.keys() | theirs.keys() if uploaded.get(name) != theirs.get(name)}
            raise Finding(f"the repository is not what an undisturbed run gives: {sorted(differing)}")


def _result_in(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(out).items() if not name.startswith(".surgery/")}


def _pipe() -> tuple[int, int]:
    """One that holds all that a child says: no limit holds for it, as one would for a file."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    return ends


def _damaged(factorized: Path, folder: Path) -> Path:
    """A copy with a residual in which a bit is flipped, and without the factors of another shard, a config and the scales."""
    shutil.copytree(factorized, folder)
    first, second = [shard for shard in Manifest.read(factorized).shards if shard.residual and shard.factors][:2]
    residual = folder / first.residual.file
    data = bytearray(residual.read_bytes())
    data[-7] ^= 4
    residual.write_bytes(data)
    for file in (second.factors.file, "config.json", SCALES_FILE):
        (folder / file).unlink()
    return folder


def _stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    found = [(str(path), path.lstat()) for path in sorted(folder.rglob("*"))]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found]


def kind_of(finding: Finding) -> str:
    """What findings of one cause have in common: the place that a traceback ends at, or the first line."""
    lines = str(finding).splitlines()
    places = re.findall(r'File ".*?/(surgery/[^"]*)", line (\d+)', str(finding))
    last = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)), "")
    place = ":".join(places[-1]) if places else ""
    return f"{lines[0]} {place} {last}"[:300]
