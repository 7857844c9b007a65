"""Core-seconds for each GB of weights in every stage of factorize and fold, and how many cores keep pace with a copy.

    python benchmarks/stages.py --gigabytes 0.5 --hidden 2048 --repeats 3

All layers of the checkpoint are the same, so that one SVD for each shape can stand for all of them: in the rows "without SVDs"
it is made beforehand and looked up, as if a device had found it in no time. All else is done as ever, the split included. The
clock is that of each thread's processor, so that neither waiting nor what else runs on the machine counts; the seconds of the
wall beside them do depend on that. Medians over repeats in which the rows take turns; what is read is in the system's cache,
and what is written is on the disk before the time is taken.

The cost model at the end: so many cores does the host of a GPU need if its stages are to take no longer than a copy at a rate,
``sum of core-seconds per GB x GB/s``. What the device does there instead of the host (SVD, split, finding differences) is taken
off, the copies to it and from it are put in as one copy in memory each. No GPU is used: these are estimates.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import checkpoints
import torch
from checkpoints import llm_like, write_checkpoint
from safetensors.torch import load_file

import surgery
from surgery.linalg import svd
from surgery.lossless import correction
from surgery.lossless.correction import CorrectionBlock
from surgery.timing import Timing, timed

#: What a run on a GPU leaves to the host, of the stages of factorize and of fold.
FACTORIZE_ON_HOST = ("read", "hash", "encode", "write")
FOLD_ON_HOST = ("read", "hash", "decode", "write")
#: GB/s of the copies that the model compares with, and the cores of a host.
PACES = (0.75, 1.5, 3.0)
HOST_CORES = 16


@dataclass(frozen=True)
class Spent:
    """What a call has taken: seconds of the wall, core-seconds in all, and those of each stage."""

    wall: float
    cores: float
    stages: dict[str, float]


@contextlib.contextmanager
def counted_by_thread() -> Iterator[None]:
    """Stages are timed by the processor of their thread, and the code of corrections is one of them."""

    def staged(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def wrapped(*arguments: Any) -> Any:
            with timed(stage):
                return work(*arguments)

        return wrapped

    with (
        mock.patch("surgery.timing.time", SimpleNamespace(perf_counter=time.thread_time)),
        mock.patch.object(CorrectionBlock, "encoded", staged("encode", CorrectionBlock.encoded)),
        mock.patch.object(correction, "_inflate", staged("decode", correction._inflate)),
    ):
        yield


@contextlib.contextmanager
def known_svds(rank: int, shapes: dict[tuple[int, ...], torch.Tensor]) -> Iterator[None]:
    """SVDs are looked up by shape, wherever they are called."""
    found = {shape: svd.truncated_svd(matrix, rank) for shape, matrix in shapes.items()}

    def looked_up(matrices: torch.Tensor, k: int, **_: Any) -> list[svd.TruncatedSVD]:
        return [found[tuple(matrix.shape)] for matrix in matrices]

    def looked_up_alone(matrix: torch.Tensor, k: int, **_: Any) -> svd.TruncatedSVD:
        return found[tuple(matrix.shape)]

    with contextlib.ExitStack() as stack:
        for one in [module for name, module in sys.modules.items() if name.startswith("surgery.shards")]:
            for function, other in ((svd.truncated_svds, looked_up), (svd.truncated_svd, looked_up_alone)):
                if getattr(one, function.__name__, None) is function:
                    stack.enter_context(mock.patch.object(one, function.__name__, other))
        yield


def spent(call: Callable[[Timing], object]) -> Spent:
    os.sync()  # what the one before has left to be written is not this one's
    timing = Timing()
    wall, cores = time.perf_counter(), time.process_time()
    call(timing)
    wall, cores = time.perf_counter() - wall, time.process_time() - cores
    stages: dict[str, float] = {}
    for (_, stage), seconds in timing.seconds.items():
        stages[stage] = stages.get(stage, 0.0) + seconds
    stages["rest"] = cores - sum(stages.values())
    return Spent(wall, cores, stages)


def copy(model: Path, out: Path) -> None:
    """The way that ``benchmarks/pipeline.py`` copies."""
    out.mkdir()
    for path in sorted(model.iterdir()):
        with open(path, "rb") as source, open(out / path.name, "wb") as target:
            while data := source.read(8 << 20):
                target.write(data)
            target.flush()
            os.fsync(target.fileno())


def in_memory(size: int) -> float:
    """Core-seconds of one copy of so many bytes in memory, as to a staging buffer of a device."""
    source, target = torch.ones(64 << 20, dtype=torch.uint8), torch.ones(64 << 20, dtype=torch.uint8)
    start = time.thread_time()
    for _ in range(8):
        target.copy_(source)
    return (time.thread_time() - start) / (8 * len(source)) * size


def rows_of(
    model: Path, folder: Path, rank: int, shapes: dict[tuple[int, ...], torch.Tensor]
) -> dict[str, Callable[[], Spent]]:
    """Name of a row -> one measurement of it."""
    out = folder / "out"

    def factorized(layout: Any, known: bool) -> Spent:
        with known_svds(rank, shapes) if known else contextlib.nullcontext():
            return spent(lambda timing: surgery.factorize(model, out, rank=rank, device="cpu", layout=layout, timing=timing))

    def folded(change: float) -> Spent:
        scales = {name: value * change for name, value in load_file(folder / "f/surgery/scales.safetensors").items()}
        return spent(lambda timing: surgery.fold(folder / "f", scales, out, device="cpu", timing=timing))

    return {
        "copy": lambda: spent(lambda _: copy(model, out)),
        "factorize": lambda: factorized("residual", False),
        "factorize, without SVDs": lambda: factorized("residual", True),
        "factorize, overlay, without SVDs": lambda: factorized("overlay", True),
        "fold, untouched": lambda: folded(1.0),
        "fold, all changed": lambda: folded(1.01),
    }


def medians(several: list[Spent]) -> Spent:
    stages = {stage for one in several for stage in one.stages}
    return Spent(
        statistics.median(one.wall for one in several),
        statistics.median(one.cores for one in several),
        {stage: statistics.median(one.stages.get(stage, 0.0) for one in several) for stage in stages},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    shapes: dict[tuple[int, ...], torch.Tensor] = {}

    def same(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
        if (m, n) not in shapes:
            shapes[m, n] = llm_like(m, n, generator).bfloat16()
        return shapes[m, n].clone()

    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as place, counted_by_thread():
        folder = Path(place)
        model = folder / "model"
        with mock.patch.object(checkpoints, "llm_like", same):
            write_checkpoint(model, args.gigabytes * 1e9, args.hidden)
        gigabytes = sum(path.stat().st_size for path in model.iterdir()) / 1e9
        print(f"{gigabytes:.2f} GB bfloat16, hidden {args.hidden}, rank {args.rank}")
        print(f"{os.cpu_count()} cores, torch {torch.__version__}, medians of {args.repeats}")
        surgery.factorize(model, folder / "f", rank=args.rank, device="cpu")
        rows = rows_of(model, folder, args.rank, shapes)
        results: dict[str, list[Spent]] = {name: [] for name in rows}
        for _ in range(args.repeats):
            for name, measure in rows.items():
                results[name].append(measure())
                shutil.rmtree(folder / "out")
    found = {name: medians(several) for name, several in results.items()}
    print_stages(found, gigabytes)
    print_model(found, gigabytes)


def print_stages(found: dict[str, Spent], gigabytes: float) -> None:
    names = ("read", "hash", "copy", "svd", "residual", "correction", "encode", "decode", "fold", "write", "rest")
    print(f"\ncore-seconds per GB\n| | {' | '.join(names)} | all | wall, s/GB | x copy |")
    print("| --- " * (len(names) + 4) + "|")
    for name, one in found.items():
        cells = [f"{one.stages[stage] / gigabytes:.2f}" if one.stages.get(stage, 0.0) > 0.0 else "" for stage in names]
        cells += [f"{one.cores / gigabytes:.2f}", f"{one.wall / gigabytes:.2f}", f"{one.wall / found['copy'].wall:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def print_model(found: dict[str, Spent], gigabytes: float) -> None:
    across = in_memory(10**9)
    print(f"\nestimates for the host of a GPU; a copy in memory takes {across:.2f} core-seconds per GB")
    print(f"| | core-seconds per GB | {' | '.join(f'cores at {pace} GB/s' for pace in PACES)} | GB/s of {HOST_CORES} cores |")
    print("| --- " * (len(PACES) + 3) + "|")
    for name, row, stages in (
        ("factorize", "factorize, without SVDs", FACTORIZE_ON_HOST),
        ("factorize, overlay", "factorize, overlay, without SVDs", FACTORIZE_ON_HOST),
        ("fold", "fold, untouched", FOLD_ON_HOST),
    ):
        copies = across * (1 if "overlay" in name else 2)
        # The rest is what the interpreter, memory and the system take, whoever computes.
        total = sum(found[row].stages.get(stage, 0.0) for stage in (*stages, "rest")) / gigabytes + copies
        cells = [f"{total:.2f}", *(f"{total * pace:.1f}" for pace in PACES), f"{HOST_CORES / total:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
