"""How long the study of a model takes, alone and with a tuned one, beside factorize of the same model.

    python benchmarks/study_speed.py --gigabytes 1 --repeats 3
    python benchmarks/study_speed.py --beside OTHER     # and by the code in the checkout OTHER, taking turns

The models are like those of benchmarks/pipeline.py; the tuned one has noise and 8 directions more, each 2 % of the weights.
Seconds are those of the call in a process of its own, without the import of torch, and of the processor: on a machine that
others use compare the latter.
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

import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

CHILD = """
import json, sys, time, surgery
row, base, tuned, out = sys.argv[1:]
calls = {
    "factorize": lambda: surgery.factorize(base, out, rank=16),
    "spectra": lambda: surgery.spectra(base),
    "spectra, pair": lambda: surgery.spectra(base, tuned),
    "recommend": lambda: surgery.recommend(base, budget=5000, out=out),
    "recommend, pair": lambda: surgery.recommend(base, tuned, budget=5000, out=out),
}
start, processor = time.perf_counter(), time.process_time()
calls[row]()
print(json.dumps([time.perf_counter() - start, time.process_time() - processor]))
"""
ROWS = ("factorize", "spectra", "spectra, pair", "recommend", "recommend, pair")


def write_tuned(base: Path, tuned: Path) -> None:
    """The model with noise and a change of rank 8 in each matrix of its blocks, each 2 % of its norm."""
    tuned.mkdir()
    generator = torch.Generator().manual_seed(7)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tuned)
            continue
        tensors = load_file(path)
        for name, weight in tensors.items():
            if ".layers." in name and weight.ndim == 2:
                m, n = weight.shape
                parts = torch.randn(m, n, generator=generator), torch.randn(m, 8, generator=generator)
                low = parts[1] @ torch.randn(8, n, generator=generator)
                size = 0.02 * weight.float().norm()
                changed = weight.float() + parts[0] * (size / parts[0].norm()) + low * (size / low.norm())
                tensors[name] = changed.to(weight.dtype)
        save_file(tensors, tuned / path.name, metadata={"format": "pt"})


def measured(row: str, code: Path, folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of the processor, of one call by the code in a checkout."""
    out = folder / "out"
    command = [sys.executable, "-W", "ignore", "-c", CHILD, row, str(folder / "base"), str(folder / "tuned"), str(out)]
    where = {"env": {**os.environ, "PYTHONPATH": str(code)}, "cwd": folder}  # -c looks for modules in this folder first
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **where)
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    seconds, processor = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout, whose code is measured too")
    args = parser.parse_args()
    codes = {"here": Path(__file__).resolve().parents[1]} | ({} if args.beside is None else {"beside": args.beside.resolve()})
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as place:
        folder = Path(place)
        write_checkpoint(folder / "base", args.gigabytes * 1e9, args.hidden)
        write_tuned(folder / "base", folder / "tuned")
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(args.repeats):
            for row in ROWS:
                for name, code in codes.items():
                    found.setdefault((row, name), []).append(measured(row, code, folder))
    unit = statistics.median(processor for _, processor in found["factorize", "here"])
    print(f"{'':24} {'seconds':>8} {'processor':>10} {'x factorize':>12}")
    for (row, name), values in found.items():
        seconds, processor = (statistics.median(value[i] for value in values) for i in (0, 1))
        print(f"{row + ', ' + name:24} {seconds:8.1f} {processor:10.1f} {processor / unit:12.1f}", flush=True)


if __name__ == "__main__":
    main()
