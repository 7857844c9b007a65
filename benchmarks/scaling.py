"""How time and memory of factorize and fold grow with the model, beside what a cost model says beforehand.

    python benchmarks/scaling.py --sizes 0.1,0.25,0.5,1,2,4 --hidden 2048 --rank 16 --out docs/performance
    python benchmarks/scaling.py --layers 12,48 --hidden 2048        peak memory of two depths of the same width

Checkpoints of so many billions of target weights are written, measured and deleted one after the other. Each measurement is
a process of its own on the CPU: seconds are those of the call without the import of torch, peak memory is the process's
largest resident set. The coefficients of the cost model (``predicted_seconds``) come from single matrices and files, and the
constant from a checkpoint of one layer, a few seconds before each run. The slope is that of log(seconds) over log(weights), by
least squares.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import layer_shapes, llm_like, write_checkpoint
from pipeline import CHILD, measure

import surgery
from surgery.files.file_writer import FileWriter
from surgery.lossless.factors import Factors
from surgery.lossless.split import split
from surgery.memory import bytes_of, keep_scratch
from surgery.planning.plan import Plan

#: Least time that a rate is measured for, and the most bytes written for that of the disk.
PROBE_SECONDS = 0.5
PROBE_BYTES = 256 << 20

OPERATIONS = ("factorize", "fold, all changed")
RESIDUAL = {"device": "cpu", "layout": "residual", "correction": True}


@dataclass(frozen=True)
class Machine:
    """What a unit of work takes with all cores at it: seconds of the clock, over all units that were done meanwhile.

    Attributes:
        cores: how many there are.
        flop: of the SVD, where a matrix (m, n) at rank k has 2 m n k of them; how often it is gone through is in here.
        matrix: of the SVD, what every matrix takes whatever its size. Less than nothing where products of small matrices
            run faster, since they fit the cache.
        split: per weight, of taking it apart losslessly.
        hash: per byte, of sha256.
        read: per byte of a file in the system's cache.
        write: per byte of a file.
        disk: per byte of a file, until it is on the disk: of one file at a time, whatever the cores do.
        start: what a run takes whatever there is to do.
    """

    cores: int
    flop: float
    matrix: float
    split: float
    hash: float
    read: float
    write: float
    disk: float
    start: float


def predicted_seconds(steps: Plan, machine: Machine) -> float:
    """Seconds that ``factorize`` will take for a plan in the residual layout on a CPU.

        max(end + c * bytes, e * bytes written) + start

    with the end of the last core, where each has a * flops + d * matrices + b * weights to do. a and d are the cost of SVDs,
    b that of the lossless split, c of hashing, reading and writing, e of the disk. It assumes:

    - Each matrix is worked on by one core, in the order of the files: the next one by whichever core is free first. All else is
      shared evenly: the rates are those of all cores together.
    - All SVDs take as many passes over their matrix as those of the two that were timed, whose time is interpolated.
    - All bytes that are read or written are hashed; what is written beside the weights (factors and corrections, whose header
      comes last) once more.
    - The disk writes while the cores compute. The source is in the system's cache.
    """
    cores = [0.0] * machine.cores
    for target in steps.targets:
        entries = target.entries / target.matrices[0]
        alone = machine.cores * (machine.flop * 2.0 * entries * target.rank + machine.matrix + machine.split * entries)
        for _ in range(target.matrices[0]):
            heapq.heapreplace(cores, cores[0] + alone)
    beside = steps.bytes_written - steps.bytes_read
    hashing = machine.hash * (steps.bytes_read + steps.bytes_written + beside)
    files = machine.read * steps.bytes_read + machine.write * steps.bytes_written
    return max(max(cores) + hashing + files, machine.disk * steps.bytes_written) + machine.start


def calibrated(folder: Path, hidden: int, rank: int) -> Machine:
    """The rates of this machine, from the smallest and the largest matrix of a layer and from files in the folder."""
    generator = torch.Generator().manual_seed(0)
    shapes = sorted(layer_shapes(hidden).values(), key=math.prod)
    small, large = (llm_like(*shape, generator).bfloat16() for shape in (shapes[0], shapes[-1]))
    flops = [2.0 * matrix.numel() * rank for matrix in (small, large)]
    seconds = [with_all_cores(lambda A: surgery.truncated_svd(A, rank), matrix) for matrix in (small, large)]
    flop = (seconds[1] - seconds[0]) / (flops[1] - flops[0])
    found = surgery.truncated_svd(large, rank)
    factors = Factors(found.U.contiguous(), found.s, found.V.contiguous())
    data = large.view(torch.uint8)
    read, write, disk = file_rates(folder / "probe", data)
    spare = torch.empty_like(large)
    machine = Machine(
        cores=os.cpu_count() or 1,
        flop=flop,
        matrix=seconds[0] - flop * flops[0],
        split=with_all_cores(lambda A: split(A, factors, out=spare), large) / large.numel(),
        hash=with_all_cores(lambda A: hashlib.sha256(bytes_of(A)), data) / data.numel(),
        read=read,
        write=write,
        disk=disk,
        start=0.0,
    )
    return replace(machine, start=max(0.0, seconds_to_start(folder, hidden, rank, machine)))


def with_all_cores(work: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> float:
    """Seconds per call with every core at one of its own, on a copy of its own: the median over some rounds of them."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    copies = [tensor.clone() for _ in range(cores)]
    rounds: list[float] = []
    with ThreadPoolExecutor(cores, initializer=start_worker) as pool:
        list(pool.map(work, copies))  # loads what is loaded once
        while sum(rounds) < PROBE_SECONDS or len(rounds) < 3:
            start = time.perf_counter()
            list(pool.map(work, copies))
            rounds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)  # the libraries below have one setting for all threads
    return statistics.median(rounds) / cores


def start_worker() -> None:
    """What a thread of a run does before its first matrix, each of which it then works on alone."""
    torch.set_num_threads(1)
    keep_scratch()


def file_rates(path: Path, data: torch.Tensor) -> tuple[float, float, float]:
    """Seconds per byte of reading and of writing, with all cores at it, and of the disk: medians of three.

    Writing is counted in seconds of a core, since the disk works meanwhile.
    """
    written = bytes_of(data)
    read = memoryview(bytearray(written.nbytes))
    times = max(1, min(16, PROBE_BYTES // written.nbytes))
    reading, writing, disk, cores = [], [], [], os.cpu_count() or 1
    for _ in range(3):
        start, busy = time.perf_counter(), time.process_time()
        with FileWriter(path) as writer:
            for _ in range(times):
                writer.append(written)
            writer.commit(path.name)
        writing.append(time.process_time() - busy)
        disk.append(time.perf_counter() - start)
        for seconds in ([], reading):  # the first brings it into the cache
            start = time.perf_counter()
            with open(path, "rb", buffering=0) as file:
                while file.readinto(read):
                    pass
            seconds.append(time.perf_counter() - start)
        path.unlink()
    n_bytes = times * written.nbytes
    read_rate, write_rate, disk_rate = (statistics.median(seconds) / n_bytes for seconds in (reading, writing, disk))
    return read_rate / cores, write_rate / cores, disk_rate


def seconds_to_start(folder: Path, hidden: int, rank: int, machine: Machine) -> float:
    """What ``factorize`` takes for one layer beyond what it takes for its work: new memory above all. The median of three."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = Path(place) / "model"
        write_checkpoint(model, 2 * layer_weights(hidden), hidden)
        seconds: list[float] = []
        for i in range(3):
            seconds.append(measure(CHILD, "factorize", model=str(model), out=f"{place}/{i}", rank=rank, **RESIDUAL)["seconds"])
        return statistics.median(seconds) - predicted_seconds(
            surgery.plan(model, rank=rank, layout="residual", device="cpu"), machine
        )


def measured(folder: Path, layers: int, machine: Machine | None, args: argparse.Namespace) -> dict[str, Any]:
    """One checkpoint: written, predicted, measured, deleted."""
    runs: dict[str, list[dict[str, float]]] = {operation: [] for operation in OPERATIONS}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = Path(place) / "model"
        weights = write_checkpoint(model, 2 * layers * layer_weights(args.hidden), args.hidden)
        predicted = None
        if machine is not None:
            predicted = predicted_seconds(surgery.plan(model, rank=args.rank, layout="residual", device="cpu"), machine)
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(dir=place) as once:
                factorized, folded = f"{once}/factorized", f"{once}/folded"
                factorize = measure(CHILD, "factorize", model=str(model), out=factorized, rank=args.rank, **RESIDUAL)
                fold = measure(CHILD, "fold", factorized=factorized, out=folded, device="cpu", changed=True)
            for operation, result in zip(OPERATIONS, (factorize, fold), strict=True):
                runs[operation].append(result)
    return {"layers": layers, "weights": weights, "predicted": predicted, "runs": runs}


def layer_weights(hidden: int) -> int:
    return sum(math.prod(shape) for shape in layer_shapes(hidden).values())


def median(found: dict[str, Any], operation: str, what: str) -> float:
    values: list[float] = [run[what] for run in found["runs"][operation]]
    return statistics.median(values)


def print_runs(found: dict[str, Any]) -> None:
    for operation in OPERATIONS:
        seconds, peak = median(found, operation, "seconds"), median(found, operation, "peak")
        predicted = found["predicted"] if operation == "factorize" else None
        model = f"{predicted:10.2f} {seconds / predicted - 1:+10.1%}" if predicted is not None else f"{'':10} {'':10}"
        print(
            f"{operation:18} {found['layers']:6} {found['weights'] / 1e9:10.4f} {seconds:9.2f} {model} "
            f"{1e9 * seconds / found['weights']:10.2f} {peak / 1e6:9.0f} MB",
            flush=True,
        )


def print_head() -> None:
    columns = f"{'layers':>6} {'billions':>10} {'seconds':>9} {'predicted':>10} {'deviation':>10} {'ns/weight':>10}"
    print(f"{'':18} {columns} {'peak memory':>12}", flush=True)


@dataclass(frozen=True)
class Slope:
    """Of log(seconds) over log(weights): least squares.

    Attributes:
        slope: 1 where the time is proportional to the size.
        error: its standard error; None with two sizes, through which a line always goes.
        intercept: log(seconds) at one weight.
    """

    slope: float
    error: float | None
    intercept: float

    def __str__(self) -> str:
        return f"{self.slope:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


def fitted(weights: Sequence[float], seconds: Sequence[float]) -> Slope | None:
    """The slope; None where all sizes are the same."""
    x, y = [math.log(value) for value in weights], [math.log(value) for value in seconds]
    if len(set(x)) < 2:
        return None
    slope, intercept = statistics.linear_regression(x, y)
    if len(x) == 2:
        return Slope(slope, None, intercept)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return Slope(slope, math.sqrt(left / (len(x) - 2) / spread), intercept)


def draw(path: Path, found: Sequence[dict[str, Any]], slopes: dict[str, Slope | None], rank: int) -> None:
    """Seconds over weights on two log scales: the points measured, the model's line, the slopes in words."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from surgery.report.drawing import GREW, INK, SHRANK, canvas, finished, plain_log
    from surgery.report.summary import Group

    billions = [one["weights"] / 1e9 for one in found]
    with canvas(2.4, above=0.2) as (figure, axes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        predicted = [one["predicted"] for one in found]
        axes.plot(billions, predicted, color=INK, linewidth=1, linestyle=(0, (4, 2)), label="factorize, as predicted")
        words = []
        for operation, color, marker in zip(OPERATIONS, (GREW, SHRANK), ("o", "s"), strict=True):
            seconds = [median(one, operation, "seconds") for one in found]
            slope = slopes[operation]
            label = f"{operation}: slope {slope}" if slope is not None else operation
            axes.plot(billions, seconds, marker, color=color, markersize=4.5, markeredgewidth=0, label=label)
            words.append(f"{label}, {seconds[0]:.3g} s for {billions[0]:.3g} billion weights")
            words[-1] += f" and {seconds[-1]:.3g} s for {billions[-1]:.3g}" if len(found) > 1 else ""
        deviations = [median(one, "factorize", "seconds") / one["predicted"] - 1 for one in found]
        words.append(f"factorize deviates from the prediction by {min(deviations):+.0%} to {max(deviations):+.0%}")
        axes.set_xlim(min(billions) / 1.3, max(billions) * 1.3)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
        plain_log(axes)
        axes.xaxis.set_major_locator(FixedLocator(billions))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("billions of weights in targets")
        axes.set_ylabel("seconds")
        axes.legend(loc="upper left", frameon=False, fontsize=8, handlelength=1.8, borderaxespad=0)
    panel = finished(figure, Group("scaling", ()), f"At rank {rank}: {'; '.join(words)}.")
    width, height = panel.size
    # Of its own colours, so that it can be read in a light and in a dark page.
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" style="color:#333;background:#fff">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}<title>{panel.description}</title>{panel.svg}</svg>\n", encoding="utf-8")


def grow(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Sizes: the table, the slopes and the picture."""
    layers = [max(1, round(size * 1e9 / layer_weights(args.hidden))) for size in args.sizes]
    print_head()
    machines, found = [], []
    for count in layers:
        # Each time anew: the machine may be shared, and slower for minutes.
        machines.append(calibrated(folder, args.hidden, args.rank))
        found.append(measured(folder, count, machines[-1], args))
        print_runs(found[-1])
    machine = Machine(*(statistics.median(values) for values in zip(*map(astuple, machines), strict=True)))
    print(
        f"calibrated before each: SVD {1e12 * machine.flop:.3g} ps a flop and {1e3 * machine.matrix:.3g} ms a matrix, split "
        f"{1e9 * machine.split:.3g} ns a weight, sha256 {1e-9 / machine.hash:.3g} GB/s, files {1e-9 / machine.read:.3g} GB/s "
        f"read and {1e-9 / machine.write:.3g} written, {machine.start:.2g} s to start (medians)"
    )
    weights = [one["weights"] for one in found]
    slopes = {name: fitted(weights, [median(one, name, "seconds") for one in found]) for name in OPERATIONS}
    for name, slope in slopes.items():
        if slope is not None:
            print(f"{name}: time grows as weights to the power of {slope}")
    if args.out is not None:
        draw(args.out / "scaling.svg", found, slopes, args.rank)
    fits = {name: asdict(slope) if slope is not None else None for name, slope in slopes.items()}
    return {"calibrated": asdict(machine), "measured": found, "slopes": fits}


def deepen(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Depths of one width: the peak memory of each, and of the deepest over that of the least deep."""
    print_head()
    found = []
    for count in sorted(args.layers):
        found.append(measured(folder, count, None, args))
        print_runs(found[-1])
    ratios = {name: median(found[-1], name, "peak") / median(found[0], name, "peak") for name in OPERATIONS}
    for name, ratio in ratios.items():
        print(f"{name}: {found[-1]['layers']} layers take {ratio:.3f} times the peak memory of {found[0]['layers']}")
    return {"measured": found, "ratios": ratios}


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers(float), default=[0.1, 0.25, 0.5, 1.0], help="billions of target weights")
    parser.add_argument("--layers", type=numbers(int), help="layers of the same width instead of sizes, for peak memory")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="put the picture of the sizes, scaling.svg, into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured here")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    print(f"bfloat16, hidden {args.hidden}, rank {args.rank}, medians of {args.repeats}")
    print(f"{cores} cores, torch {torch.__version__} with {threads} threads")
    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as folder:
        found = grow(Path(folder), args) if args.layers is None else deepen(Path(folder), args)
    if args.json is not None:
        options = {"hidden": args.hidden, "rank": args.rank, "repeats": args.repeats}
        machine = {"cores": cores, "threads": threads, "torch": torch.__version__}
        args.json.write_text(json.dumps({"options": options, "machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
