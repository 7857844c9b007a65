"""Runs factorize and fold in children that are killed, and looks at what they leave.

    python -m tests.faults MODEL FOLDER TRIALS SEED

MODEL is factorized and folded into folders within FOLDER, empty ones and such as hold an earlier result. A child is killed
with SIGKILL just before the n-th time that it changes a file or folder (opens one for writing, renames, removes, makes), for
TRIALS values of n spread over all there are, and at as many random moments. After each kill the result must be unfinished, and
seen as such, or complete and right, or the earlier one, whole; then the same call, killed once more and started a third time,
must give what an undisturbed one gives, and leave nothing else. Prints the number of trials of each kind. Forks, and so must be
a process of its own in which torch has not computed anything.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import surgery
import surgery.commands.factorize
import surgery.commands.fold
import tests.forks  # noqa: F401
from tests.models import files_of  # and with it transformers: here, and not in each child

Call = Callable[[Path], object]
#: Audit events of changes to the file system, and which of their arguments are paths.
_CHANGES = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "shutil.rmtree": (0,)}


def run(
    call: Call, out: Path, *, kill_at: int = 0, kill_after: float = 0.0, by: signal.Signals = signal.SIGKILL
) -> tuple[bool, int]:
    """Whether a child that makes the call came to its end, and how many changes it made if it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event == "open":
                flags = arguments[2]
                touches = (
                    isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and str(arguments[0]).startswith(str(out))
                )
            else:
                touches = event in _CHANGES and any(str(arguments[i]).startswith(str(out)) for i in _CHANGES[event])
            if touches:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), by)

        status = 1
        try:
            torch.set_num_threads(1)
            sys.addaudithook(watch)
            call(out)
            os.write(writing, str(count).encode())
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    if kill_after:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 130:
        return False, 0
    if os.WEXITSTATUS(status) != 0:
        raise AssertionError("the child failed, see its traceback")
    return True, int(said)


def trial(
    call: Call, out: Path, earlier: Path | None, truth: dict[str, bytes], marker: str, kills: list[dict[str, Any]]
) -> int:
    """Kill the call again and again, look at what is there after each kill, and let it finish; how many kills came."""
    shutil.rmtree(out, ignore_errors=True)
    if earlier is not None:
        shutil.copytree(earlier, out)
    before = files_of(earlier) if earlier is not None else None
    count = 0
    for kill in [*kills, {}]:
        if run(call, out, **kill)[0]:
            break
        count += 1
        left = files_of(out) if out.exists() else {}
        if marker in left:  # then it must be all there, whatever else lies about
            result = {name: data for name, data in left.items() if not name.startswith(".surgery/")}
            assert result in (truth, before), f"after {kills}: {marker} is there, and something is wrong"
        elif before is not None:
            assert (out / ".surgery").exists(), f"after {kills}: the earlier result is gone, and nothing to go on with"
    found = files_of(out)
    assert found.keys() == truth.keys(), f"after {kills}: {sorted(found.keys() ^ truth.keys())}"
    assert found == truth, f"after {kills}: {[name for name in truth if truth[name] != found[name]]}"
    return count


def main(model: Path, folder: Path, trials: int, seed: int) -> None:
    chance = random.Random(seed)
    factorized = folder / "truth f"

    def factorize(out: Path) -> None:
        surgery.factorize(model, out, rank=4, device="cpu")

    def fold(out: Path, *, overwrite: bool = False) -> None:
        manifest = surgery.Manifest.read(factorized)
        scales = {target.key: torch.full(target.scales_shape, 1.5) for target in manifest.targets}
        surgery.fold(factorized, scales, out, overwrite=overwrite, device="cpu")

    def fold_anew(out: Path) -> None:
        fold(out, overwrite=True)

    # Another model: one weight file, other files beside it.
    other = folder / "other"
    other.mkdir()
    weights = {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    save_file(weights, other / "model.safetensors")
    shutil.copy(model / "config.json", other)
    for name in ("generation_config.json", "chat_template.jinja", "vocab.json"):
        (other / name).write_text("{}")

    for name, call, marker, before in (
        ("factorize", factorize, "surgery/manifest.json", None),
        ("fold", fold, "config.json", None),
        ("fold anew", fold_anew, "config.json", other),
    ):
        start = time.perf_counter()
        truth_folder = factorized if name == "factorize" else folder / f"truth {name}"
        if before is not None:
            shutil.copytree(before, truth_folder)
        _, changes = run(call, truth_folder)
        seconds = time.perf_counter() - start
        truth, out = files_of(truth_folder), folder / name
        some = trials if before is None else max(2, trials // 2)  # tests/run/test_overwrite.py stops at each step of replacing
        count = min(some, changes)
        steps = [1 + i * changes // count for i in range(count)]
        kills = 0
        for step in steps:
            kills += trial(call, out, before, truth, marker, [{"kill_at": step}, {"kill_at": chance.randint(1, changes)}])
        for _ in range(some):
            kills += trial(call, out, before, truth, marker, [{"kill_after": chance.uniform(0, seconds)} for _ in range(2)])
        if before is not None:
            assert truth == files_of(folder / f"truth {name.removesuffix(' anew')}")
        print(f"{name}: {changes} changes, {len(steps)} of them and {some} random moments tried, {kills} kills")
        assert kills >= len(steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
