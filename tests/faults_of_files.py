"""Stops the commands that write a few files, or one, at each of their changes to the file system, and looks at what they leave.

    python -m tests.faults_of_files MODEL TUNED FOLDER TRIALS [COMMAND ...]

Each of ``spectra``, ``recommend``, ``project``, ``blend`` and ``export`` is stopped just before the n-th time that it changes
a file or folder, by SIGKILL and by Ctrl-C, for TRIALS values of n spread over all there are, in an empty folder and in one
with an earlier result that it is to replace. What is there then is the earlier result, whole, or nothing that could be taken
for a result, or the new one; the same call, killed once more and started a third time, makes the new one, and nothing else is
left. Prints the number of stops. Names of commands after TRIALS leave the others out. Forks, as ``tests.faults`` does.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import surgery
from surgery.errors import OutputError
from surgery.progress import Silent
from tests.faults import run
from tests.models import files_of

Write = Callable[[Path, bool], object]


def _calls(model: Path, tuned: Path, factorized: Path) -> dict[str, tuple[Write, str]]:
    """By name: what writes into a folder, replacing what is there or not, and the file that comes last."""
    quiet = Silent()
    scales = {target.key: torch.full(target.scales_shape, 1.5) for target in surgery.Manifest.read(factorized).targets}
    some = ["*q_proj*"]

    def spectra(out: Path, overwrite: bool) -> None:
        surgery.spectra(model, tuned, out=out, top=4, include=some, device="cpu", overwrite=overwrite, progress=quiet)

    def recommend(out: Path, overwrite: bool) -> None:
        file = out / "new" / "r.toml"
        surgery.recommend(
            model, budget=9, max_rank=4, include=some, out=file, device="cpu", overwrite=overwrite, progress=quiet
        )

    def project(out: Path, overwrite: bool) -> None:
        surgery.project(factorized, tuned, out / "s.safetensors", device="cpu", overwrite=overwrite, progress=quiet)

    def blend(out: Path, overwrite: bool) -> None:
        own = factorized / "surgery/scales.safetensors"
        surgery.blend([own, own], out / "s.safetensors", weights=[1, 2], overwrite=overwrite, progress=quiet)

    def export(out: Path, overwrite: bool) -> None:
        surgery.export(factorized, scales, out, overwrite=overwrite, progress=quiet)

    return {
        "spectra": (spectra, "spectra.json"),
        "recommend": (recommend, "new/r.toml"),
        "project": (project, "s.safetensors"),
        "blend": (blend, "s.safetensors"),
        "export": (export, "adapter_config.json"),
    }


def _again(write: Write, overwrite: bool) -> Callable[[Path], object]:
    """The call, for which a result that is there already is one."""

    def call(out: Path) -> None:
        with contextlib.suppress(*(() if overwrite else (OutputError,))):
            write(out, overwrite)

    return call


def main(model: Path, tuned: Path, folder: Path, trials: int, names: list[str]) -> None:
    factorized = folder / "f"
    assert run(lambda out: surgery.factorize(model, out, rank=2, recipe="attention", device="cpu"), factorized)[0]
    calls = _calls(model, tuned, factorized)
    for name, (write, last) in ((name, calls[name]) for name in names or calls):
        for overwrite in (False, True):
            earlier, truth_folder, out = (folder / f"{name} {overwrite} {what}" for what in ("earlier", "truth", "out"))
            earlier.mkdir()
            (earlier / "mine.txt").write_text("mine")
            if overwrite:
                (earlier / last).parent.mkdir(exist_ok=True)
                (earlier / last).write_text("earlier")
            shutil.copytree(earlier, truth_folder)
            finished, changes = run(lambda out, write=write, overwrite=overwrite: write(out, overwrite), truth_folder)
            assert finished
            before, truth, stops = files_of(earlier), files_of(truth_folder), 0
            count = min(trials, changes)
            for step in sorted({1 + i * changes // count for i in range(count)} | {changes}):
                for by in (signal.SIGKILL, signal.SIGINT):
                    shutil.rmtree(out, ignore_errors=True)
                    shutil.copytree(earlier, out)
                    where = f"{name}, {overwrite=}, {by.name} at {step} of {changes}"
                    call = _again(write, overwrite)
                    stops += not run(call, out, kill_at=step, by=by)[0]
                    left = files_of(out)
                    assert left["mine.txt"] == b"mine", where
                    if last in left:
                        made = {
                            file: data
                            for file, data in left.items()
                            if not file.startswith(".surgery/") and not file.endswith(".partial")
                        }
                        assert made in (truth, before), f"{where}: {last} is there, and something is wrong: {sorted(made)}"
                    if by is signal.SIGINT:
                        assert not [file for file in left if file.endswith(".partial")], f"{where}: {sorted(left)}"
                    stops += by is signal.SIGKILL and not run(call, out, kill_at=1 + step * 7 % changes)[0]
                    assert run(call, out)[0], where
                    found = files_of(out)
                    assert found == truth, f"{where}: {sorted(found.keys() ^ truth.keys())}"
                    assert not (out / ".surgery").exists(), where
            print(f"{name}{' anew' if overwrite else ''}: {changes} changes, {stops} stops", flush=True)
            assert stops >= count, f"{name}: {stops} stops of {count} tried"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
