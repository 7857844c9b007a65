"""Factorize, fold, verify, a plain file copy and PEFT's merge of the same checkpoint, side by side in one run.

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
                      layout=arguments["layout"], correction=arguments["correction"])
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
elif call == "verify":
    from surgery.operations.verify import verify
    start = time.perf_counter()
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


#: The peer of fold: load the model, load a LoRA adapter of the same rank, merge, save.
PEFT = """
import json, re, sys, time, torch, transformers, peft
arguments = json.loads(sys.argv[2])
load = lambda: transformers.AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.bfloat16)
if sys.argv[1] == "prepare":
    config = peft.LoraConfig(r=arguments["rank"], target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(load(), config).save_pretrained(arguments["adapter"])
start = time.perf_counter()
if sys.argv[1] == "merge":
    merged = peft.PeftModel.from_pretrained(load(), arguments["adapter"]).merge_and_unload()
    merged.save_pretrained(arguments["out"], max_shard_size="500MB")
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
    parser.add_argument("--peft", action="store_true", help="also PEFT's load, merge and save (needs transformers and peft)")
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
    rows = ["copy", "svd alone", "factorize, no correction", "factorize", "verify", "fold, untouched", "fold, all changed"]
    rows.append("factorize, overlay")
    adapter = {"model": str(model), "adapter": str(folder / "adapter"), "out": str(folder / "merged"), "rank": args.rank}
    if args.peft:
        measure(PEFT, "prepare", **adapter)
        rows.insert(rows.index("fold, untouched"), "PEFT merge")
    for _ in range(args.repeats):
        for name in rows:
            out = folder / name.replace(", ", "-").replace(" ", "-")
            if name == "copy":
                result = measure(COPY, "copy", model=str(model), out=str(out))
            elif name == "svd alone":
                result = measure(CHILD, "svd", model=str(model), **common)
            elif name == "PEFT merge":
                out = folder / "merged"
                result = measure(PEFT, "merge", **adapter)
            elif name == "verify":
                result = measure(CHILD, "verify", factorized=str(folder / "factorize"), device=args.device)
            elif name.startswith("factorize"):
                shutil.rmtree(out, ignore_errors=True)
                layout = "overlay" if "overlay" in name else "residual"
                correction = name != "factorize, no correction"
                result = measure(
                    CHILD, "factorize", model=str(model), out=str(out), layout=layout, correction=correction, **common
                )
            else:
                result = measure(
                    CHILD,
                    "fold",
                    factorized=str(folder / "factorize"),
                    out=str(out),
                    changed="changed" in name,
                    device=args.device,
                )
            if name not in ("factorize", "svd alone", "verify"):
                shutil.rmtree(out)
            results.setdefault(name, []).append(result)
    written = sum(path.stat().st_size for path in (folder / "factorize").rglob("*") if path.is_file())
    corrections = written - size
    print(f"{'':24} {'seconds':>9} {'min-max':>15} {'GB/s':>7} {'weights/s':>11} {'peak memory':>12} {'x copy':>8}")
    copy = statistics.median(result["seconds"] for result in results["copy"])
    for name, rows in results.items():
        seconds = [row["seconds"] for row in rows]
        median = statistics.median(seconds)
        peak = statistics.median(row["peak"] for row in rows)
        print(
            f"{name:24} {median:9.2f} {f'{min(seconds):.2f}-{max(seconds):.2f}':>15} {size / median / 1e9:7.2f} "
            f"{weights / median / 1e6:9.0f} M {peak / 1e6:9.0f} MB {median / copy:8.1f}"
        )
    print(f"factors and correction: {corrections / weights:.3f} bytes per weight on top of the weights")


if __name__ == "__main__":
    main()
