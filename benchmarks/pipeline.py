"""Factorize, fold and a plain file copy of the same checkpoint, side by side in one run.

    python benchmarks/pipeline.py --gigabytes 1 --hidden 2048 --rank 16 --repeats 3

Each measurement is a process of its own: seconds are those of the call without the import of torch, peak memory is
the process's largest resident set. The copies are synced, as what surgery writes is. Rows are medians over repeats in
which the operations take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoints import write_checkpoint

CHILD = """
import json, re, sys, time, torch
import surgery
from surgery.operations import factorize, fold
from surgery.device import choose_device
from surgery.linalg.svd import truncated_svd
from safetensors.torch import load_file
call, arguments = sys.argv[1], json.loads(sys.argv[2])
start = time.perf_counter()
if call == "factorize":
    surgery.factorize(arguments["model"], arguments["out"], rank=arguments["rank"], device=arguments["device"],
                      layout=arguments["layout"])
elif call == "fold":
    scales = arguments["factorized"] + "/surgery/scales.safetensors"
    values = {name: value * 1.01 for name, value in load_file(scales).items()} if arguments["changed"] else scales
    start = time.perf_counter()
    surgery.fold(arguments["factorized"], values, arguments["out"], device=arguments["device"])
elif call == "svd":
    import pathlib
    seconds = 0.0
    for path in sorted(pathlib.Path(arguments["model"]).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if ".layers." in name and tensor.ndim == 2:
                tensor = tensor.to(choose_device(arguments["device"]))
                begin = time.perf_counter()
                truncated_svd(tensor, arguments["rank"]).s.cpu()
                seconds += time.perf_counter() - begin
    start = time.perf_counter() - seconds
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""

COPY = """
import json, os, re, sys, time, pathlib
arguments = json.loads(sys.argv[2])
start = time.perf_counter()
out = pathlib.Path(arguments["out"])
out.mkdir()
for path in sorted(pathlib.Path(arguments["model"]).iterdir()):
    with open(path, "rb") as source, open(out / path.name, "wb") as target:
        while data := source.read(8 << 20):
            target.write(data)
        target.flush()
        os.fsync(target.fileno())
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def measure(code: str, call: str, **arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, call, json.dumps(arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as folder:
        run(Path(folder), args)


def run(folder: Path, args: argparse.Namespace) -> None:
    model = folder / "model"
    weights = write_checkpoint(model, args.gigabytes * 1e9, args.hidden)
    size = sum(path.stat().st_size for path in model.iterdir())
    print(
        f"{size / 1e9:.2f} GB bfloat16, hidden {args.hidden}, {weights / 1e9:.3f} billion weights in targets, rank {args.rank}"
    )
    print(f"device {args.device}, {os.cpu_count()} cores, medians of {args.repeats}")
    common = {"rank": args.rank, "device": args.device}
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for name in ("copy", "svd alone", "factorize", "fold, untouched", "fold, all changed", "factorize, overlay"):
            out = folder / name.replace(", ", "-").replace(" ", "-")
            if name == "copy":
                result = measure(COPY, "copy", model=str(model), out=str(out))
            elif name == "svd alone":
                result = measure(CHILD, "svd", model=str(model), **common)
            elif name.startswith("factorize"):
                shutil.rmtree(out, ignore_errors=True)
                layout = "overlay" if "overlay" in name else "residual"
                result = measure(CHILD, "factorize", model=str(model), out=str(out), layout=layout, **common)
            else:
                result = measure(
                    CHILD,
                    "fold",
                    factorized=str(folder / "factorize"),
                    out=str(out),
                    changed="changed" in name,
                    device=args.device,
                )
            if name not in ("factorize", "svd alone"):
                shutil.rmtree(out)
            results.setdefault(name, []).append(result)
    written = sum(path.stat().st_size for path in (folder / "factorize").rglob("*") if path.is_file())
    corrections = written - size
    print(f"{'':20} {'seconds':>9} {'min-max':>15} {'GB/s':>7} {'weights/s':>11} {'peak memory':>12} {'x copy':>8}")
    copy = statistics.median(result["seconds"] for result in results["copy"])
    for name, rows in results.items():
        seconds = [row["seconds"] for row in rows]
        median = statistics.median(seconds)
        peak = statistics.median(row["peak"] for row in rows)
        print(
            f"{name:20} {median:9.2f} {f'{min(seconds):.2f}-{max(seconds):.2f}':>15} {size / median / 1e9:7.2f} "
            f"{weights / median / 1e6:9.0f} M {peak / 1e6:9.0f} MB {median / copy:8.1f}"
        )
    print(f"factors and correction: {corrections / weights:.3f} bytes per weight on top of the weights")


if __name__ == "__main__":
    main()
