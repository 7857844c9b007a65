"""Factorize, fold, verify, a plain file copy and PEFT's ways to the same, side by side in one run.

    python benchmarks/pipeline.py --gigabytes 1 --hidden 2048 --rank 16 --repeats 3 --peft
    python benchmarks/pipeline.py --peft --rows factorize,peft-pissa --json found.json      some of the rows, in this order

Each measurement is a process of its own: seconds are those of the call without the import of torch, peak memory is
the process's largest resident set. What it reads is in the system's cache. The copies are synced, as what surgery writes
is; PEFT's files are not, so what is left of them is synced between two measurements. Rows are medians over repeats in
which the operations take turns.

The peers of factorize and fold are PEFT's PiSSA initialization (residual model and adapter, saved the way PEFT's own
example does) and its merge of a LoRA adapter of the same rank. At the end stand the residuals of the singular triplets
that both have saved, in float64, and what either has kept of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint

CHILD = """
import json, os, pathlib, re, sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from surgery import factorize, fold, truncated_svd, verify
from surgery.device import choose_device
from safetensors.torch import load_file
call, arguments = sys.argv[1], json.loads(sys.argv[2])
start = time.perf_counter()
if call == "factorize":
    factorize(arguments["model"], arguments["out"], rank=arguments["rank"], device=arguments["device"],
              layout=arguments["layout"], correction=arguments["correction"])
elif call == "fold":
    scales = arguments["factorized"] + "/surgery/scales.safetensors"
    values = scales if arguments["trained"] == "untouched" else load_file(scales)
    if arguments["trained"] == "all changed":
        values = {name: value * 1.01 for name, value in values.items()}
    elif arguments["trained"] == "cores":
        values = {name: torch.diag(value) + 0.03 / len(value) ** 0.5 * torch.randn(len(value), len(value))
                  for name, value in values.items()}
    start = time.perf_counter()
    fold(arguments["factorized"], values, arguments["out"], device=arguments["device"])
elif call == "svd":
    seconds = 0.0
    for path in sorted(pathlib.Path(arguments["model"]).glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if ".layers." in name and tensor.ndim == 2:
                tensor = tensor.to(choose_device(arguments["device"]))
                begin = time.perf_counter()
                truncated_svd(tensor, arguments["rank"]).s.cpu()
                seconds += time.perf_counter() - begin
    start = time.perf_counter() - seconds
elif call == "svd, 1 thread each":
    def solve(tensor):
        truncated_svd(tensor.to(choose_device(arguments["device"])), arguments["rank"]).s.cpu()
    seconds = 0.0
    with ThreadPoolExecutor(os.cpu_count(), initializer=lambda: torch.set_num_threads(1)) as pool:
        for path in sorted(pathlib.Path(arguments["model"]).glob("*.safetensors")):
            tensors = load_file(path).items()
            matrices = [tensor for name, tensor in tensors if ".layers." in name and tensor.ndim == 2]
            begin = time.perf_counter()
            list(pool.map(solve, sorted(matrices, key=torch.numel, reverse=True)))  # so that no large one is left over
            seconds += time.perf_counter() - begin
    start = time.perf_counter() - seconds
elif call == "verify":
    assert verify(arguments["factorized"], device=arguments["device"]).ok
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


#: The peers. Of fold: load the model, load a LoRA adapter, merge, save. Of factorize: what PEFT's example
#: examples/pissa_finetuning/preprocess.py does.
PEFT = """
import json, re, sys, time, torch, transformers, peft
arguments = json.loads(sys.argv[2])
load = lambda: transformers.AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.bfloat16)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
if sys.argv[1] == "prepare":
    config = peft.LoraConfig(r=arguments["rank"], target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(load(), config).save_pretrained(arguments["out"])
torch.manual_seed(0)
start = time.perf_counter()
if sys.argv[1] == "merge":
    merged = peft.PeftModel.from_pretrained(load(), arguments["adapter"]).merge_and_unload()
    merged.save_pretrained(arguments["out"], max_shard_size="500MB")
elif sys.argv[1] == "pissa":
    rank = arguments["rank"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="pissa_niter_16")
    model = peft.get_peft_model(load(), config)
    model.peft_config["default"].init_lora_weights = True  # or loading it would take the residual apart once more
    model.save_pretrained(arguments["out"] + "/pissa_init")
    model.unload().save_pretrained(arguments["out"], max_shard_size="500MB")
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""

#: Residuals of the saved triplets of at most 20 targets, and how far PEFT's residual and adapter are from the weights.
ACCURACY = """
import json, pathlib, statistics, sys, torch
from safetensors import safe_open
arguments = json.loads(sys.argv[2])

class Tensors:
    def __init__(self, folder):
        self.files = {}
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name):
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

def residuals(W, U, s, V):
    sides = torch.maximum((W @ V - U * s).norm(dim=0), (W.T @ U - V * s).norm(dim=0))
    return (sides / s.max()).tolist()

def svd_of_product(B, A):
    (left, R), (right, L) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, s, Vt = torch.linalg.svd(R @ L.T)
    return left @ U, s, right @ Vt.T

model, names, found = Tensors(arguments["model"]), {}, {}
if arguments["factorized"]:
    ours = Tensors(arguments["factorized"] + "/surgery")
    names["surgery"] = [name.removesuffix(".U") for name in ours.files if name.endswith(".U")]
if arguments["pissa"]:
    adapter, rest = Tensors(arguments["pissa"] + "/pissa_init"), Tensors(arguments["pissa"])
    prefix, end = "base_model.model.", ".lora_A.weight"
    names["PEFT pissa"] = [name[len(prefix):-len(end)] + ".weight" for name in adapter.files if name.endswith(end)]
targets = sorted(next(iter(names.values())))
assert all(sorted(others) == targets for others in names.values()), "PEFT has other targets"
count = min(20, len(targets))
chosen = [targets[round(i * (len(targets) - 1) / max(1, count - 1))] for i in range(count)]
of = {name: [] for name in names}
error, largest, differing, entries = 0.0, 0.0, 0, 0
for name in chosen:
    weight = model[name]
    W = weight.double()
    if "surgery" in of:
        of["surgery"] += residuals(W, *(ours[name + part].double() for part in (".U", ".s", ".V")))
    if "PEFT pissa" in of:
        A, B = (adapter[prefix + name.replace(".weight", part)].double() for part in (end, ".lora_B.weight"))
        of["PEFT pissa"] += residuals(W, *svd_of_product(B, A))
        again = rest[name].double() + B @ A
        error, largest = max(error, (again - W).abs().max().item()), max(largest, W.abs().max().item())
        differing += (again.to(weight.dtype) != weight).sum().item()
        entries += weight.numel()
for name, values in of.items():
    found[name] = {"largest_residual": max(values), "median_residual": statistics.median(values)}
if "PEFT pissa" in found:
    found["PEFT pissa"] |= {"largest_error": error / largest, "differing": differing / entries}
print(json.dumps({"targets": len(targets), "looked_at": count, "of": found}))
"""

#: In the order in which they run, if --rows does not choose others.
ROWS = (
    "copy",
    "svd alone",
    "svd alone, 1 thread each",
    "factorize, no correction",
    "factorize",
    "PEFT pissa",
    "verify",
    "PEFT merge",
    "fold, untouched",
    "fold, all changed",
    "fold, cores",
    "factorize, overlay",
)
#: What the project keeps an eye on: the first over the second.
RATIOS = (
    ("factorize", "svd alone"),
    ("factorize", "svd alone, 1 thread each"),
    ("factorize", "PEFT pissa"),
    ("fold, all changed", "PEFT merge"),
)


def slug(row: str) -> str:
    """A row's name without what a shell or a list with commas would trip over."""
    return re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")


def measure(code: str, call: str, **arguments: Any) -> dict[str, Any]:
    """What a process of its own prints as its last line, a JSON object."""
    os.sync()  # what the one before has left to be written is not this one's
    for folder in ("model", "factorized", "adapter"):
        if arguments.get(folder):
            warm(Path(arguments[folder]))
    done = subprocess.run(
        [sys.executable, "-c", code, call, json.dumps(arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def warm(folder: Path) -> None:
    """Bring what a measurement reads into the system's cache: whoever wrote it, past the cache or through it."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            while file.read(1 << 23):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peft", action="store_true", help="also PEFT's rows (needs transformers and peft)")
    parser.add_argument("--rows", help="only these, with commas between: " + ", ".join(map(slug, ROWS)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all medians and single values here")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    rows = [row for row in ROWS if args.peft or not row.startswith("PEFT")]
    if args.rows is not None:
        known = {slug(row): row for row in ROWS}
        asked = [slug(row) for row in args.rows.split(",")]
        if unknown := [row for row in asked if row not in known]:
            parser.error(f"no such rows: {', '.join(unknown)}; there are {', '.join(known)}")
        rows = [known[row] for row in asked]
    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as folder:
        run(Path(folder), rows, args)


def run(folder: Path, rows: list[str], args: argparse.Namespace) -> None:
    model = folder / "model"
    weights = write_checkpoint(model, args.gigabytes * 1e9, args.hidden)
    size = sum(path.stat().st_size for path in model.iterdir())
    print(
        f"{size / 1e9:.2f} GB bfloat16, hidden {args.hidden}, {weights / 1e9:.3f} billion weights in targets, rank {args.rank}"
    )
    cores, threads = os.cpu_count(), torch.get_num_threads()
    print(f"device {args.device}, {cores} cores, torch {torch.__version__} with {threads} threads, medians of {args.repeats}")
    results: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    for _ in range(args.repeats):
        for row in rows:
            results[row].append(measure_row(row, folder, args))
    medians = {
        row: {what: statistics.median(one[what] for one in several) for what in ("seconds", "peak")}
        for row, several in results.items()
    }
    print_rows(results, medians, size, weights)
    factorized, pissa = (folder / slug(row) for row in ("factorize", "PEFT pissa"))
    if factorized.exists():
        added = sum(path.stat().st_size for path in factorized.rglob("*") if path.is_file()) - size
        print(f"factors and correction: {added / weights:.3f} bytes per weight on top of the weights")
    accuracy = None
    if factorized.exists() or pissa.exists():
        there = {name: str(path) if path.exists() else None for name, path in (("factorized", factorized), ("pissa", pissa))}
        accuracy = measure(ACCURACY, "accuracy", model=str(model), **there)
        if factorized.exists():
            if "verify" not in rows:
                measure(CHILD, "verify", factorized=str(factorized), device=args.device)  # fails if it finds a difference
            accuracy["of"]["surgery"] |= {"largest_error": 0.0, "differing": 0.0}
        print_accuracy(accuracy)
    ratios = [
        {"of": ours, "to": peer, **{what: medians[ours][what] / medians[peer][what] for what in ("seconds", "peak")}}
        for ours, peer in RATIOS
        if ours in medians and peer in medians
    ]
    for ratio in ratios:
        print(f"{ratio['of']} / {ratio['to']}: {ratio['seconds']:.2f} in time, {ratio['peak']:.2f} in memory")
    if args.json is not None:
        found = {
            "options": {name: getattr(args, name) for name in ("gigabytes", "hidden", "rank", "repeats", "device")},
            "machine": {"cores": cores, "threads": threads, "torch": torch.__version__},
            "checkpoint": {"bytes": size, "weights": weights},
            "rows": {row: {"median": medians[row], "values": several} for row, several in results.items()},
            "accuracy": accuracy,
            "ratios": ratios,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure_row(row: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One measurement. What other rows need stays in the folder; what is missing of that is made first, untimed."""
    model, factorized, adapter, out = (folder / name for name in ("model", slug("factorize"), "adapter", slug(row)))
    common = {"model": str(model), "out": str(out), "rank": args.rank, "device": args.device}
    shutil.rmtree(out, ignore_errors=True)
    if row.startswith(("verify", "fold")) and not factorized.exists():
        measure(CHILD, "factorize", **common | {"out": str(factorized)}, layout="residual", correction=True)
    if row == "PEFT merge" and not adapter.exists():
        measure(PEFT, "prepare", **common | {"out": str(adapter)})
    match row.split(", "):
        case ["copy"]:
            result = measure(COPY, "copy", **common)
        case ["svd alone", *each]:
            result = measure(CHILD, ", ".join(["svd", *each]), **common)
        case ["PEFT pissa"]:
            result = measure(PEFT, "pissa", **common)
        case ["PEFT merge"]:
            result = measure(PEFT, "merge", **common, adapter=str(adapter))
        case ["factorize", *how]:
            layout = "overlay" if how == ["overlay"] else "residual"
            result = measure(CHILD, "factorize", **common, layout=layout, correction=how != ["no correction"])
        case ["verify"]:
            result = measure(CHILD, "verify", factorized=str(factorized), device=args.device)
        case [_, trained]:
            result = measure(CHILD, "fold", **common, factorized=str(factorized), trained=trained)
    if row not in ("factorize", "PEFT pissa"):
        shutil.rmtree(out, ignore_errors=True)
    return result


def print_rows(
    results: dict[str, list[dict[str, float]]], medians: dict[str, dict[str, float]], size: int, weights: int
) -> None:
    print(f"{'':24} {'seconds':>9} {'min-max':>15} {'GB/s':>7} {'weights/s':>11} {'peak memory':>12} {'x copy':>8}")
    for row, several in results.items():
        seconds = [one["seconds"] for one in several]
        median, peak = medians[row]["seconds"], medians[row]["peak"]
        times = f"{median / medians['copy']['seconds']:8.1f}" if "copy" in medians else ""
        print(
            f"{row:24} {median:9.2f} {f'{min(seconds):.2f}-{max(seconds):.2f}':>15} {size / median / 1e9:7.2f} "
            f"{weights / median / 1e6:9.0f} M {peak / 1e6:9.0f} MB {times}".rstrip()
        )


def print_accuracy(accuracy: dict[str, Any]) -> None:
    head = f"residual over s_1, {accuracy['looked_at']} of {accuracy['targets']} targets"
    print(f"{head:44} {'largest':>8} {'median':>8}   weights")
    for name, of in accuracy["of"].items():
        weights = "exact (verify)"
        if of["differing"]:
            weights = f"off by {of['largest_error']:.0e} of the largest; rounded, {of['differing']:.0%} differ"
        print(f"{name:44} {of['largest_residual']:8.0e} {of['median_residual']:8.0e}   {weights}")


if __name__ == "__main__":
    main()
