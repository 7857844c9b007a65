"""A LoRA adapter merged into a checkpoint, by surgery, by PEFT and by axolotl, side by side in one run.

    python benchmarks/merge.py --gigabytes 2 --hidden 2048 --rank 16 --repeats 3
    pip install --no-deps --target AXOLOTL axolotl; python benchmarks/merge.py --axolotl AXOLOTL

The model is LLM-shaped bfloat16 in shards of 500 MB; the adapter changes all linear layers of its blocks, the leading
directions of each by 0.5 % (``--change``). Each measurement is a process of its own, and they take turns. ``seconds`` are
those of the merge without what is imported before it, ``process`` those from start to end; memory is the most that the process
and its children have resident together. What is read is in the system's cache. What surgery writes is on the disk before the
time is taken, what the others write is not; that is synced between two measurements.

- surgery: ``merge`` by itself, and with ``rounding="nearest"``.
- PEFT: load the model, load the adapter, ``merge_and_unload``, ``save_pretrained``.
- axolotl: the function behind ``axolotl merge-lora``, which goes from shard to shard. The package pins other releases of
  what is here, so its one file is run from an unpacked wheel, without the rest of the package.

``kept`` is the share of the update that is in the weights after rounding, ``<W_out - W, D> / <D, D>``, from the bytes of the
last run in float64; ``least`` that of the worst matrix; ``error`` what differs from D within its directions, relative to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint
from pipeline import warm
from safetensors import safe_open
from safetensors.torch import save_file

SURGERY = """
import sys, time
from surgery.commands.adapters.merge import merge
from surgery.progress import Silent
model, adapter, out, rounding = sys.argv[1:5]
start = time.perf_counter()
merge(model, [adapter], out, rounding=rounding or None, device="cpu", progress=Silent())
print(time.perf_counter() - start)
"""
PEFT = """
import sys, time, torch, peft, transformers
from transformers.models.llama import modeling_llama  # transformers imports it late
model, adapter, out = sys.argv[1:4]
start = time.perf_counter()
loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
merged = peft.PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="500MB")
print(time.perf_counter() - start)
"""
AXOLOTL = """
import importlib.util, logging, sys, time, types
import peft, transformers
from transformers.models.llama import modeling_llama
model, adapter, out, package = sys.argv[1:5]
for name in ("axolotl", "axolotl.utils", "axolotl.utils.logging"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger
spec = importlib.util.spec_from_file_location("lora_merge", package + "/axolotl/cli/utils/lora_merge.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
start = time.perf_counter()
module.merge_lora_sharded_efficient(model, adapter, out, device="cpu")
print(time.perf_counter() - start)
"""
#: Row -> program and its last argument.
ROWS = {
    "surgery": (SURGERY, ""),
    "surgery, nearest": (SURGERY, "nearest"),
    "PEFT": (PEFT, ""),
    "axolotl": (AXOLOTL, ""),
}


class Tensors:
    """The tensors of a folder, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def write_adapter(model: Path, folder: Path, rank: int, change: float) -> int:
    """An adapter that amplifies the leading ``rank`` directions of each matrix by ``change``; returns how many it changes.

    The directions are those of two steps of subspace iteration.
    """
    generator = torch.Generator().manual_seed(0)
    weights = Tensors(model)
    tensors: dict[str, torch.Tensor] = {}
    for name in weights:
        if ".layers." not in name or weights[name].ndim != 2:
            continue
        W = weights[name].float()
        V = torch.randn(W.shape[1], rank, generator=generator)
        for _ in range(2):
            V = torch.linalg.qr(W.T @ torch.linalg.qr(W @ V).Q).Q
        module = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": V.T.contiguous(), f"{module}.lora_B.weight": change * (W @ V)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return len(tensors) // 2


def kept(model: Path, adapter: Path, out: Path) -> dict[str, float]:
    """What is left of the update, by the bytes of ``out``; see above."""
    before, after, halves = Tensors(model), Tensors(out), Tensors(adapter)
    asked = arrived = missed = 0.0
    least = math.inf
    for name in halves:
        if not name.endswith("lora_A.weight"):
            continue
        A, B = halves[name].double(), halves[name.replace("lora_A", "lora_B")].double()
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        R = after[weight].double() - before[weight].double()
        (P, left), (Q, right) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        core, there = left @ right.T, P.T @ (R @ Q)  # D = P core Q^T, so what is left of it is all between P and Q
        mine, here = core.square().sum().item(), (there * core).sum().item()
        asked, arrived, least = asked + mine, arrived + here, min(least, here / mine)
        missed += (there - core).square().sum().item()
    return {"kept": arrived / asked, "least": least, "error": math.sqrt(missed / asked)}


def resident(pid: int) -> int:
    """Bytes that a process and its children have resident; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, children))


def measure(program: str, *arguments: str) -> dict[str, float]:
    """A process of its own: what it prints as its last line are the seconds of its merge."""
    os.sync()  # what the one before has left to be written is not this one's
    warm(Path(arguments[0]))
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"a merge has failed with exit code {process.returncode}")
    return {"seconds": float(lines[-1]), "process": time.perf_counter() - begin, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--change", type=float, default=0.005, help="of the leading directions, relative to them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", help="only these, with semicolons between: " + "; ".join(ROWS))
    parser.add_argument("--axolotl", type=Path, metavar="FOLDER", help="where its wheel is unpacked; else no such row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all medians and single values here")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    rows = list(ROWS) if args.rows is None else [row.strip() for row in args.rows.split(";")]
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"no such rows: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if args.axolotl is None:
        rows = [row for row in rows if row != "axolotl"]
    if "PEFT" in rows and importlib.util.find_spec("peft") is None:
        parser.error("peft is not installed; choose other --rows")
    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as folder:
        run(Path(folder), rows, args)


def run(folder: Path, rows: list[str], args: argparse.Namespace) -> None:
    model, adapter, out = folder / "model", folder / "adapter", folder / "out"
    weights = write_checkpoint(model, args.gigabytes * 1e9, args.hidden)
    matrices = write_adapter(model, adapter, args.rank, args.change)
    size = sum(path.stat().st_size for path in model.iterdir())
    machine = f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"{size / 1e9:.2f} GB bfloat16, hidden {args.hidden}, {weights / 1e9:.3f} billion weights in {matrices} matrices")
    print(f"rank {args.rank}, a change of {args.change:.2%}; {machine}, medians of {args.repeats}", flush=True)
    results: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    left: dict[str, dict[str, float]] = {}
    for repeat in range(args.repeats):
        for row in rows:
            shutil.rmtree(out, ignore_errors=True)
            program, last = ROWS[row]
            last = str(args.axolotl) if row == "axolotl" else last
            results[row].append(measure(program, str(model), str(adapter), str(out), last))
            if repeat == args.repeats - 1:
                left[row] = kept(model, adapter, out)
    medians = {
        row: {what: statistics.median(one[what] for one in several) for what in several[0]} for row, several in results.items()
    }
    print(f"{'':18} {'seconds':>8} {'min-max':>13} {'process':>8} {'peak memory':>12} {'kept':>7} {'least':>7} {'error':>7}")
    for row, several in results.items():
        found, seconds = medians[row], [one["seconds"] for one in several]
        print(
            f"{row:18} {found['seconds']:8.2f} {f'{min(seconds):.2f}-{max(seconds):.2f}':>13} {found['process']:8.2f} "
            f"{found['peak'] / 1e6:9.0f} MB {left[row]['kept']:7.4f} {left[row]['least']:7.4f} {left[row]['error']:7.4f}"
        )
    ratios = {
        f"{ours} / {peer}": {what: value / medians[peer][what] for what, value in medians[ours].items()}
        for ours in rows
        for peer in rows
        if ours.startswith("surgery") and not peer.startswith("surgery")
    }
    for pair, ratio in ratios.items():
        print(f"{pair}: {ratio['seconds']:.2f} in time, {ratio['process']:.2f} with imports, {ratio['peak']:.2f} in memory")
    if args.json is not None:
        told: dict[str, Any] = {
            "options": {name: getattr(args, name) for name in ("gigabytes", "hidden", "rank", "change", "repeats")},
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
            "checkpoint": {"bytes": size, "weights": weights, "matrices": matrices},
            "rows": {row: {"median": medians[row], "values": several, **left[row]} for row, several in results.items()},
            "ratios": ratios,
        }
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
