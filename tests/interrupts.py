"""Interrupts runs at each moment, and looks at whether the hint to go on comes exactly when there is something to go on with.

    python -m tests.interrupts FOLDER STRIDE

A moment is a change to a file or folder of the output, or a call of the progress. Each STRIDE-th one of five kinds of run is
tried: a factorize run, one that goes on with another, a fold, a fold that replaces another, an extraction. After each the same
call must give what an undisturbed one gives, after as many shards as were told. Prints the number of moments. Leaves a hook,
and so must be a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import surgery
from surgery.progress import Silent
from tests.sealing import MANIFEST

_CHANGES = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "shutil.rmtree": (0,)}
_HINT = re.compile(r"stopped after (\d+) shards?; the (same command|command that started it) continues from there")


class _Moments:
    """Counts moments, and interrupts at one of them."""

    def __init__(self) -> None:
        self.out, self.at, self.count = Path("/nowhere"), 0, 0

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            is_change = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            paths = arguments[:1] if is_change else ()
        else:
            paths = tuple(arguments[i] for i in _CHANGES.get(event, ()))
        if any(str(path).startswith(str(self.out)) for path in paths):
            self.come()

    def come(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


class _Progress(Silent):
    """What is called when there is something to tell is a moment too."""

    def __init__(self, moments: _Moments) -> None:
        super().__init__()
        self._moments = moments

    def start(self, label: str, total_bytes: int) -> None:
        self._moments.come()

    def item(self, name: str) -> None:
        self._moments.come()

    def advance(self, n_bytes: int) -> None:
        self._moments.come()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _sweep(moments: _Moments, call: Callable[[Path, Silent], object], before: Path | None, folder: Path, stride: int) -> int:
    """How many moments there are."""
    truth, out = folder / "truth", folder / "out"

    def prepared(where: Path) -> None:
        shutil.rmtree(where, ignore_errors=True)
        if before is not None:
            shutil.copytree(before, where)

    prepared(truth)
    moments.out, moments.at, moments.count = truth, 0, 0
    call(truth, _Progress(moments))
    total, expected = moments.count, _files(truth)
    for at in range(1, total + 1, stride):
        prepared(out)
        moments.out, moments.at, moments.count = out, at, 0
        said = _Progress(moments)
        with contextlib.suppress(KeyboardInterrupt):
            call(out, said)
        moments.at = 0
        hints = [found for note in said.notes if (found := _HINT.search(note))]
        records = len(list((out / ".surgery").glob("0*.json")))
        has_begun = (out / ".surgery/run.json").is_file()
        is_whole = (out / MANIFEST).is_file()
        assert len(hints) == (has_begun and not is_whole), f"moment {at}: {said.notes}; begun {has_begun}, whole {is_whole}"
        assert hints or not records or _files(out).items() >= expected.items(), f"moment {at}: records, and no hint"
        assert all(int(hint[1]) == records for hint in hints), f"moment {at}: {said.notes}, {records} records"
        again = Silent()
        call(out, again)
        gone_on = [note for note in again.notes if note.startswith("continuing after")]
        if hints and call.__name__ == "factorize":  # a fold says nothing of it, nor does an extraction that is whole
            assert gone_on == [f"continuing after {records} of 3 shards"] * (records > 0), f"moment {at}: {gone_on}"
        assert _files(out) == expected, f"moment {at}: {sorted(_files(out).keys() ^ expected.keys())}"
        assert not (out / ".surgery").exists(), f"moment {at}"
    return total


def main(folder: Path, stride: int) -> None:
    torch.set_num_threads(1)
    model = folder / "m"
    model.mkdir()
    place = {}
    for i in range(3):
        torch.manual_seed(i)
        name, file = f"layers.{i}.up_proj.weight", f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: torch.randn(24, 16)}, model / file, metadata={"format": "pt"})
        place[name] = file
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    made = folder / "made"

    def factorize(out: Path, progress: Silent) -> None:
        surgery.factorize(model, out, rank=2, device="cpu", progress=progress)

    def fold(out: Path, progress: Silent) -> None:
        scales = {name: torch.full((2,), 1.5) for name in place}
        surgery.fold(made, scales, out, device="cpu", overwrite=(out / "earlier").exists(), progress=progress)

    def extract(out: Path, progress: Silent) -> None:
        surgery.extract(model, tuned, out, rank=2, device="cpu", progress=progress)

    factorize(made, Silent())
    tuned = folder / "tuned"
    surgery.fold(made, {name: torch.full((2,), 1.25) for name in place}, tuned, device="cpu")
    half, earlier = folder / "half", folder / "earlier"
    stop, moments = _Moments(), _Moments()
    while len(list((half / ".surgery").glob("0*.json"))) != 2:  # a run that was stopped after two shards
        shutil.rmtree(half, ignore_errors=True)
        stop.at, stop.count = stop.at + 1, 0
        try:
            factorize(half, _Progress(stop))
        except KeyboardInterrupt:
            continue
        raise AssertionError("no moment has two finished shards")
    surgery.fold(made, {name: torch.full((2,), 2.0) for name in place}, earlier, device="cpu")
    (earlier / "earlier").write_text("mine")
    sys.addaudithook(moments.watch)
    for name, call, before in (
        ("factorize", factorize, None),
        ("factorize that goes on", factorize, half),
        ("fold", fold, None),
        ("fold that replaces", fold, earlier),
        ("extract", extract, None),
    ):
        total = _sweep(moments, call, before, folder, stride)
        print(f"{name}: {total} moments, {len(range(1, total + 1, stride))} of them tried", flush=True)
    assert (made / MANIFEST).is_file()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
