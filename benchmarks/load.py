"""How time and memory of every command grow with the number of tensors, and with the number of weight files.

    python benchmarks/load.py --tensors 12500,25000,50000
    python benchmarks/load.py --shards 500,1000,2000
    python benchmarks/load.py --shards 2000 --rows "factorize;resume;stream;push"

A model of so many small matrices, as the experts of a mixture are, in 16 files; or of so many files, with 4 matrices each.
What is measured is what surgery does for each tensor and for each file, not the linear algebra. With three sizes n, 2n and
4n there is an exponent, that of the growth: with t = a + b n^p it is log2((t(4n) - t(2n)) / (t(2n) - t(n))), whatever a
command takes to start. 1 is linear, 2 quadratic; "-" where a row grows by
less than can be told from noise. It is that of the processor's seconds (user and system), since those of the clock are as
the machine is busy with other things.

Each row is the command itself, in a process of its own on the CPU. Seconds of the clock and of the processor hold all of it,
the import of torch too; peak memory is the largest resident set, beside what the plan allows for factorize. ``stream`` and
``push`` are against a hub on this machine (``tests/loopback_hub.py``), whose time is not in the processor's; ``resume`` goes
on with a run that was interrupted when half of its files were done. A command that takes longer than ``--limit`` is stopped,
and larger models do without it. Each row is printed as it comes, and all of them in a table at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.loopback_hub import WRITING_TOKEN, LoopbackHub  # noqa: E402

SIDE = 8
FILES = 16
PER_FILE = 4

#: VmHWM, since ru_maxrss is inherited from the process that starts this one.
CHILD = """
import os, re, runpy, sys
report = sys.argv.pop(1)
try:
    runpy.run_module("surgery", run_name="__main__", alter_sys=True)
finally:
    peak, spent = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], os.times()
    open(report, "w").write(f"{spent.user + spent.system} {int(peak) * 1024}")
"""
#: The same of a model with these weights that scales are attached to, and saved.
ATTACH = """
import json, os, re, sys, torch, surgery
from safetensors.torch import load_file
report, root = sys.argv[1], torch.nn.Module()
for file in sorted(set(json.load(open("model/model.safetensors.index.json"))["weight_map"].values())):
    for name, weight in load_file("model/" + file).items():
        at, *path, leaf = root, *name.split(".")[:-1]
        for part in path:
            at = at._modules.setdefault(part, torch.nn.Module())
        linear = at._modules[leaf] = torch.nn.Linear(1, 1, bias=False)
        linear.weight = torch.nn.Parameter(weight)
surgery.attach(root, "factorized").save("attached.safetensors")
peak, spent = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], os.times()
open(report, "w").write(f"{spent.user + spent.system} {int(peak) * 1024}")
"""

SURGERY = {
    "plan": "plan model --rank {rank} --json",
    "factorize": "factorize model --rank {rank} -o factorized",
    "resume": "factorize model --rank {rank} -o interrupted",
    "complete": "factorize model --rank {rank} -o factorized",
    "inspect": "inspect factorized",
    "verify": "verify factorized",
    "verify --fast": "verify factorized --fast",
    "fold, untouched": "fold factorized factorized/surgery/scales.safetensors -o untouched",
    "fold": "fold factorized trained.safetensors -o tuned",
    "fold, complete": "fold factorized trained.safetensors -o tuned",
    "scales show": "scales show trained.safetensors",
    "blend": "blend trained.safetensors factorized/surgery/scales.safetensors -o blended.safetensors",
    "project": "project factorized tuned -o projected.safetensors",
    "export": "export factorized trained.safetensors -o adapter",
    "attach": "",
    "spectra": "spectra model tuned -o report --top {rank}",
    "recommend": "recommend model --budget {budget} --max-rank {rank} -o recipe.toml",
    "stream": "factorize me/model --rank {rank} -o streamed --stream",
    "push": "factorize model --rank {rank} -o pushed --push-to-hub me/factorized",
}


@dataclass(frozen=True, slots=True)
class Taken:
    """What a command took: seconds of the clock and of the processor, and bytes; and of a plan, the bytes that it allows."""

    seconds: float
    processor: float
    peak: float
    allowed: float


#: Growth that cannot be told from noise.
NOISE = Taken(0.5, 0.5, 8e6, 0)


def write_model(folder: Path, files: int, per_file: int, side: int = SIDE) -> None:
    """Experts in so many files, so many in each, and an index."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        names = [f"model.layers.{index}.mlp.experts.{expert}.up_proj.weight" for expert in range(per_file)]
        weights = torch.randn(per_file, side, side, generator=generator).bfloat16()
        save_file(dict(zip(names, weights.unbind(), strict=True)), folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": files}))


def environment(hub: LoopbackHub, work: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITING_TOKEN, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


def run(row: str, work: Path, hub: LoopbackHub, rank: int, budget: int, limit: float) -> Taken | None:
    """What a row takes; None if it fails, or longer than ``limit`` seconds."""
    command = SURGERY[row].format(rank=rank, budget=budget).split()
    on_cpu = command and command[0] in ("plan", "factorize", "verify", "fold", "project", "spectra", "recommend")
    arguments = ["-c", CHILD if command else ATTACH, "taken", *command, *(["--device", "cpu"] if on_cpu else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=work, env=environment(hub, work), capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"{row}: not done after {limit:.0f} s", file=sys.stderr, flush=True)
        return None
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        print(f"{row}: {done.stderr[-500:]}", file=sys.stderr, flush=True)
        return None
    processor, peak = map(float, (work / "taken").read_text().split())
    allowed = json.loads(done.stdout)["peak_memory_bytes"] if row == "plan" else 0
    return Taken(seconds, processor, peak, allowed)


def interrupt(work: Path, hub: LoopbackHub, rank: int, files: int) -> None:
    """Begin the run that ``resume`` goes on with."""
    command = SURGERY["resume"].format(rank=rank).split()
    running = subprocess.Popen(
        [sys.executable, "-m", "surgery", *command, "--device", "cpu"],
        cwd=work,
        env=environment(hub, work),
        stderr=subprocess.DEVNULL,
    )
    journal = work / "interrupted/surgery/.journal"
    while running.poll() is None and len(list(journal.glob("[0-9]*.json"))) < files // 2:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    running.wait()


def measure(
    files: int, per_file: int, side: int, rows: Sequence[str], rank: int, limit: float, folder: Path | None
) -> dict[str, Taken | None]:
    """All rows, in their order, for one size."""
    found = {}
    # What later rows read.
    needed = set() if {*rows} <= {"plan", "resume", "recommend", "stream", "push"} else {"factorize", "fold"}
    with tempfile.TemporaryDirectory(prefix="surgery-load-", dir=folder) as name:
        work, hub = Path(name), LoopbackHub()
        write_model(work / "model", files, per_file, side)
        hub.publish("me/model", work / "model")
        for row in SURGERY:
            if row not in {*rows, *needed}:
                continue
            if row == "resume":
                interrupt(work, hub, rank, files)
            taken = found[row] = run(row, work, hub, rank, files * per_file * rank // 2, limit)
            if taken is None and row in needed:
                break
            if taken is not None:
                print(
                    f"{files:>6} files {files * per_file:>6} tensors  {row:<16} {taken.seconds:7.1f} s "
                    f"{taken.processor:7.1f} s of the processor {taken.peak / 1e6:6.0f} MB"
                    + (f", allowed {taken.allowed / 1e6:.0f}" if taken.allowed else ""),
                    flush=True,
                )
            if row == "factorize" and taken is not None:
                scales = load_file(work / "factorized/surgery/scales.safetensors")
                trained = {key: value + 0.25 for key, value in scales.items()}
                save_file(trained, work / "trained.safetensors")
            if row in ("resume", "stream", "push"):
                for made in ("interrupted", "streamed", "pushed"):
                    shutil.rmtree(work / made, ignore_errors=True)
    return found


def exponent(values: Sequence[float], noise: float) -> str:
    first, second = values[1] - values[0], values[2] - values[1]
    return f"{math.log2(second / first):.2f}" if min(first, second / 2) > noise else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", help=f"so many matrices in {FILES} files; one number or three, each twice the one before")
    parser.add_argument("--shards", help=f"so many files with {PER_FILE} matrices each")
    parser.add_argument("--side", type=int, default=SIDE, help=f"of the matrices (default: {SIDE})")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--rows", help=f"some of: {'; '.join(SURGERY)} (with semicolons between them)")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a command (default: 900)")
    parser.add_argument("--folder", type=Path, help="where the models are written (default: the system's temporary folder)")
    args = parser.parse_args()
    rows = args.rows.split(";") if args.rows else list(SURGERY)
    if odd := {*rows} - {*SURGERY}:
        parser.error(f"no such rows: {'; '.join(sorted(odd))}")
    if (args.tensors is None) == (args.shards is None):
        parser.error("give --tensors or --shards")
    unit = "tensors" if args.tensors else "files"
    sizes = [int(size) for size in (args.tensors or args.shards).split(",")]
    shapes = [(FILES, size // FILES) if args.tensors else (size, PER_FILE) for size in sizes]
    found = []
    for files, per_file in shapes:
        found.append(measure(files, per_file, args.side, rows, args.rank, args.limit, args.folder))
        rows = [row for row in rows if found[-1].get(row) is not None]
    if len(sizes) != 3:
        return
    print(f"\n{', '.join(f'{size:,}' for size in sizes)} {unit}, matrices of {args.side}x{args.side}, rank {args.rank}")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores\n")
    print(f"{'':<16} {'processor, s':>24} {'exp':>5} {'seconds':>8} {'peak MB':>15} {'exp':>5}  kB each")
    for row in found[-1]:
        taken = [one for size in found if (one := size.get(row)) is not None]
        if len(taken) < len(sizes):
            continue
        processor, peak = [one.processor for one in taken], [one.peak for one in taken]
        each = (peak[2] - peak[1]) / (sizes[2] - sizes[1]) / 1e3
        print(
            f"{row:<16} {' '.join(f'{value:8.1f}' for value in processor)[1:]:>24} {exponent(processor, NOISE.processor):>5} "
            f"{taken[-1].seconds:8.1f} {' '.join(f'{value / 1e6:5.0f}' for value in peak)[1:]:>15} "
            f"{exponent(peak, NOISE.peak):>5} {each:8.1f}"
        )
    if "plan" in found[-1]:
        allowed = [one.allowed for size in found if (one := size.get("plan")) is not None]
        print("allowed for factorize, MB: " + " ".join(f"{value / 1e6:.0f}" for value in allowed))


if __name__ == "__main__":
    main()
