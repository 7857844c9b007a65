"""The change from a model to its tuned version as a LoRA adapter, by surgery, by mergekit and by randomized SVDs, side by side.

    python benchmarks/extract.py --gigabytes 2 --hidden 2048 --rank 16 --repeats 3
    python -m venv PEER; PEER/bin/pip install mergekit
    python benchmarks/extract.py --mergekit PEER/bin/mergekit-extract-lora

The base is LLM-shaped bfloat16 in shards of 500 MB. To each matrix of its blocks the tuned model adds 64 directions with
singular values i^-0.7, 1 % of its norm together (``--change``), and rounds to bfloat16: the difference ends in a floor of
rounding noise. Each run is a whole command in a process of its own, start and imports included, and they take turns; seconds
of the clock, of the processor (user and system), and the largest resident set are those that ``os.wait4`` tells of it.
What is read is in the system's cache; what is left to be written is synced between two runs.

- surgery: ``surgery extract``.
- mergekit: ``mergekit-extract-lora``, a full SVD of each difference, in an environment of its own. It runs
  ``--mergekit-repeats`` times, as it takes long.
- svd_lowrank: ``torch.svd_lowrank`` of rank k + 8 of each difference, cut to k, with safetensors around it and nothing else.

``above the best`` is how far ``||D - BA||_F`` is above the least error of that rank, which float64 LAPACK tells, relatively:
the worst of one matrix of each kind, from the bytes of the adapters and of the models, in float64. ``--merge`` has PEFT load
and merge the adapters, and compares what comes of surgery's with ``surgery merge``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from checkpoints import write_checkpoint
from merge import Tensors
from pipeline import warm
from safetensors.torch import load_file, save_file

_T = TypeVar("_T")

#: Directions of the planted change, and the exponent of its singular values.
PLANTED, DECAY = 64, -0.7

QUICK = """
import json, pathlib, sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
base, tuned, out, rank, niter = *map(pathlib.Path, sys.argv[1:4]), *map(int, sys.argv[4:6])
torch.manual_seed(0)
halves = {}
for path in sorted(base.glob("*.safetensors")):
    with safe_open(path, "pt") as before, safe_open(tuned / path.name, "pt") as after:
        for name in before.keys():
            if ".layers." in name and before.get_slice(name).get_shape()[1:]:
                D = after.get_tensor(name).float() - before.get_tensor(name).float()
                U, s, V = torch.svd_lowrank(D, q=rank + 8, niter=niter)
                root, module = s[:rank].sqrt(), "base_model.model." + name.removesuffix(".weight")
                halves[module + ".lora_A.weight"] = (V[:, :rank] * root).T.contiguous()
                halves[module + ".lora_B.weight"] = (U[:, :rank] * root).contiguous()
out.mkdir()
save_file(halves, out / "adapter_model.safetensors")
(out / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))
"""
PEFT = """
import sys, torch, transformers, peft
model, adapter, out, dtype = sys.argv[1:5]
loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
peft.PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(out)
"""


def commands(args: argparse.Namespace, base: Path, tuned: Path, out: Path) -> dict[str, list[str]]:
    """Row -> its command."""
    models, k = [str(base), str(tuned)], str(args.rank)
    surgery = [sys.executable, "-m", "surgery", "extract", *models, "-o", str(out), "--rank", k, "--device", "cpu", "--quiet"]
    quick = [sys.executable, "-c", QUICK, *models, str(out), k]
    rows = {"surgery": surgery, "svd_lowrank, niter 2": [*quick, "2"], "svd_lowrank, niter 4": [*quick, "4"]}
    if args.mergekit is not None:
        peer = ["--model", str(tuned), "--base-model", str(base), "--out-path", str(out), "--max-rank", k]
        rows["mergekit"] = [str(args.mergekit), *peer]
    return rows


def write_pair(base: Path, tuned: Path, gigabytes: float, hidden: int, change: float) -> None:
    """Write both models."""
    write_checkpoint(base, gigabytes * 1e9, hidden)
    tuned.mkdir()
    generator = torch.Generator().manual_seed(1)
    for path in sorted(base.glob("*.safetensors")):
        tensors = load_file(path)
        for name, W in tensors.items():
            if ".layers." in name and W.ndim == 2:
                U, V = (torch.linalg.qr(torch.randn(side, PLANTED, generator=generator)).Q for side in W.shape)
                s = torch.arange(1, PLANTED + 1) ** DECAY
                D = (U * s) @ V.T
                tensors[name] = (W.float() + change * W.float().norm() / s.norm() * D).to(W.dtype)
        save_file(tensors, tuned / path.name, metadata={"format": "pt"})
    for path in base.glob("*.json"):
        shutil.copy(path, tuned)


def matrices(folder: Path) -> list[str]:
    """The matrices of the blocks, by layer."""
    weights = Tensors(folder)
    return sorted((name for name in weights if ".layers." in name and weights[name].ndim == 2), key=_place)


def _place(name: str) -> tuple[int, str]:
    return int(name.split(".layers.")[1].split(".")[0]), name


def sampled(base: Path) -> list[str]:
    """One matrix of each kind, all from different layers as far as there are so many."""
    names = matrices(base)
    kinds = list(dict.fromkeys(name.split(".layers.")[1].split(".", 1)[1] for name in names))
    layers = len(names) // len(kinds)
    picked = {kind: round(i * (layers - 1) / (len(kinds) - 1)) for i, kind in enumerate(kinds)}
    return [name for name in names if picked[name.split(".layers.")[1].split(".", 1)[1]] == _place(name)[0]]


def least_errors(base: Path, tuned: Path, rank: int) -> dict[str, tuple[float, float]]:
    """Matrix -> norm of its change, and the least error of that rank, by float64 LAPACK."""
    before, after = Tensors(base), Tensors(tuned)
    found = {}
    for name in sampled(base):
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        found[name] = (values.norm().item(), values[rank:].norm().item())
    return found


def errors(base: Path, tuned: Path, adapter: Path) -> dict[str, float]:
    """Matrix -> ``||D - BA||_F``, from the files."""
    before, after, halves = Tensors(base), Tensors(tuned), Tensors(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for name in sampled(base):
        module = "base_model.model." + name.removesuffix(".weight")
        A, B = (halves[f"{module}.lora_{half}.weight"].double() for half in "AB")
        D = after[name].double() - before[name].double()
        found[name] = (D - config["lora_alpha"] / config["r"] * (B @ A)).norm().item()
    return found


def apart(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a process of its own: the largest resident set of this one is handed on to those it starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(command: list[str], models: list[Path]) -> dict[str, float]:
    """Run a command; what the system tells of it."""
    os.sync()  # what the one before has left to be written is not this one's
    for model in models:
        warm(model)
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        if process.returncode:
            told.seek(0)
            raise SystemExit(f"{shlex.join(command)}: exit code {process.returncode}\n{told.read().decode()[-2000:]}")
    assert used.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "the peak may be this process's own"
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}


def compare_merges(folder: Path, base: Path, adapters: dict[str, Path], dtype: str) -> None:
    """Merge adapters with PEFT, and surgery's with surgery, and print what has become of the base's matrices."""
    model = base
    if dtype == "float32":
        model = folder / "base-float32"
        apart(_widened, base, model)
    for row, adapter in adapters.items():
        out = folder / f"merged-{row}-{dtype}"
        run = subprocess.run(
            [sys.executable, "-c", PEFT, str(model), str(adapter), str(out), dtype], capture_output=True, text=True
        )
        if run.returncode:
            print(f"PEFT, {dtype}: cannot merge the adapter of {row}: {run.stderr.strip().splitlines()[-1]}")
            continue
        ways = {"": out}
        if row == "surgery":
            for rounding in ("nearest", "directions") if dtype != "float32" else ("nearest",):
                ways[f"; surgery merge --rounding {rounding}"] = place = folder / f"merged-by-surgery-{rounding}-{dtype}"
                merge = [
                    "merge",
                    str(model),
                    str(adapter),
                    "-o",
                    str(place),
                    "--rounding",
                    rounding,
                    "--device",
                    "cpu",
                    "--quiet",
                ]
                subprocess.run([sys.executable, "-m", "surgery", *merge], check=True)
        for what, place in ways.items():
            error, other, far = apart(_against, base, folder / "tuned", out, place)
            against = f"; {other:.2e} of the entries differ from PEFT's, by {far:.0e} of the largest at most" if what else ""
            print(f"{dtype}: PEFT's merge of {row}'s adapter{what}: {error:.6f} of the change missing{against}", flush=True)
            if place != out:
                shutil.rmtree(place)
        shutil.rmtree(out)
    if model != base:
        shutil.rmtree(model)


def _widened(base: Path, out: Path) -> None:
    out.mkdir()
    for path in base.glob("*.safetensors"):
        save_file(
            {name: tensor.float() for name, tensor in load_file(path).items()}, out / path.name, metadata={"format": "pt"}
        )
    shutil.copy(base / "model.safetensors.index.json", out)
    config = json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))


def _against(base: Path, tuned: Path, peft: Path, merged: Path) -> tuple[float, float, float]:
    """What ``merged`` lacks of the change; the share of its entries that differ from PEFT's, and by how much at most."""
    before, after, there, here = map(Tensors, (base, tuned, peft, merged))
    missed = asked = differing = entries = far = 0.0
    for name in matrices(base):
        W = after[name].double()
        missed += (W - here[name].double()).square().sum().item()
        asked += (W - before[name].double()).square().sum().item()
        entries += W.numel()
        differing += (here[name] != there[name]).sum().item()
        far = max(far, ((here[name].double() - there[name].double()).abs().max() / W.abs().max()).item())
    return math.sqrt(missed / asked), differing / entries, far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--change", type=float, default=0.01, help="norm of the change of each matrix, relative to it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit-repeats", type=int, default=1)
    parser.add_argument("--rows", help="only these, with semicolons between: surgery; svd_lowrank, niter 2; ...; mergekit")
    parser.add_argument("--mergekit", type=Path, metavar="PATH", help="its mergekit-extract-lora; else no such row")
    parser.add_argument("--merge", action="store_true", help="also merge the adapters, with PEFT and with surgery")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all medians and single values here")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-bench-", dir=args.folder) as folder:
        run(Path(folder), args)


def run(folder: Path, args: argparse.Namespace) -> None:
    base, tuned = folder / "base", folder / "tuned"
    apart(write_pair, base, tuned, args.gigabytes, args.hidden, args.change)
    best = apart(least_errors, base, tuned, args.rank)
    rows = commands(args, base, tuned, Path("OUT"))
    wanted = list(rows) if args.rows is None else [row.strip() for row in args.rows.split(";")]
    if unknown := [row for row in wanted if row not in rows]:
        raise SystemExit(f"no such rows: {', '.join(unknown)}; there are {', '.join(rows)}")
    size = sum(path.stat().st_size for path in base.iterdir())
    machine = f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"twice {size / 1e9:.2f} GB bfloat16, hidden {args.hidden}, {apart(_layers, base)} layers")
    print(f"rank {args.rank}, a change of {args.change:.2%}; {machine}, medians of {args.repeats}")
    for row in wanted:
        print(f"{row}: {shlex.join(word if word != QUICK else '...' for word in rows[row])}", flush=True)
    results: dict[str, list[dict[str, float]]] = {row: [] for row in wanted}
    excess: dict[str, dict[str, float]] = {}
    adapters: dict[str, Path] = {}
    for repeat in range(args.repeats):
        for row in wanted:
            if row == "mergekit" and repeat >= args.mergekit_repeats:
                continue
            out = adapters.setdefault(row, folder / f"adapter-{len(adapters)}")
            shutil.rmtree(out, ignore_errors=True)
            results[row].append(measure(commands(args, base, tuned, out)[row], [base, tuned]))
            found = apart(errors, base, tuned, out)
            excess[row] = {name: found[name] / error - 1 for name, (_, error) in best.items()}
    medians = {
        row: {what: statistics.median(one[what] for one in several) for what in several[0]} for row, several in results.items()
    }
    least = ", ".join(f"{error / norm:.4f}" for norm, error in best.values())
    print(f"least error of a change, of {len(best)} matrices: {least}\n")
    print("| | seconds | min to max | seconds of the processor | peak memory | above the best, worst | median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row, several in results.items():
        found, seconds, over = medians[row], [one["seconds"] for one in several], excess[row].values()
        print(
            f"| {row} | {found['seconds']:.1f} | {min(seconds):.1f} to {max(seconds):.1f} | {found['cpu']:.1f} "
            f"| {found['peak'] / 1e6:.0f} MB | {max(over):.1e} | {statistics.median(over):.1e} |"
        )
    print()
    ratios = {
        f"{peer} / surgery": {what: medians[peer][what] / value for what, value in medians["surgery"].items()}
        for peer in wanted
        if peer != "surgery" and "surgery" in wanted
    }
    for pair, ratio in ratios.items():
        print(f"{pair}: {ratio['seconds']:.2f} in time, {ratio['cpu']:.2f} of the processor, {ratio['peak']:.2f} in memory")
    if args.merge:
        whole = {row: path for row, path in adapters.items() if row in ("surgery", "mergekit")}
        for dtype in ("bfloat16", "float32"):
            compare_merges(folder, base, whole, dtype)
    if args.json is not None:
        told: dict[str, Any] = {
            "options": {name: getattr(args, name) for name in ("gigabytes", "hidden", "rank", "change", "repeats")},
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
            "least": {name: {"change": norm, "error": least} for name, (norm, least) in best.items()},
            "rows": {
                row: {"median": medians[row], "values": several, "excess": excess[row]} for row, several in results.items()
            },
            "ratios": ratios,
        }
        args.json.write_text(json.dumps(told, indent=1) + "\n")


def _layers(base: Path) -> int:
    return 1 + max(_place(name)[0] for name in matrices(base))


if __name__ == "__main__":
    main()
