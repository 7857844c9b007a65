"""Training only the scales against LoRA and full fine-tuning, on the built-in demo model.

    python benchmarks/adapt.py
    python benchmarks/adapt.py --seeds 10 --steps 120

The model of ``surgery demo``, which has learned Python source code, adapts to English prose. Needs transformers and
peft; eight minutes on two cores. LoRA gets as many trainable numbers as the scales, exactly: at rank 1 a ``v_proj`` and
one MLP matrix of the same layer have 192 + 480 = 672, as many as 42 targets of rank 16; ``q_proj`` and ``v_proj`` of all
layers, or four such pairs, have 2688, as many as 42 targets of rank 64.

No method is handicapped by its learning rate: on the last fifth of the training text, which nothing trains on, each is
tuned on the grid 1, 2, 5 times powers of ten until both neighbours of the best one are worse. Where LoRA fits on some
modules only, which ones is chosen there too. Then all train with the chosen settings from several seeds, which set
the order of the data, the same for all methods, and LoRA's start. A worker uses one thread.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.demo.run import CONTEXT, MODEL, load, mean_loss, prose

LAYERS = range(6)
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
RATES = [factor * 10.0**power for power in range(-5, 1) for factor in (1, 2, 5)]
TUNING_SEED = 0  # the reported seeds start at 1


def value_and(matrix: str, *layers: int) -> tuple[str, ...]:
    return tuple(f"layers.{i}.{name}" for i in layers for name in ("self_attn.v_proj", f"mlp.{matrix}"))


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train. ``placements`` are the sets of modules it may choose from, one empty set if it has no choice."""

    name: str
    kind: str
    rank: int = 0
    first_rate: float = 1e-2
    placements: tuple[tuple[str, ...], ...] = ((),)


METHODS = (
    Method("scales, rank 16", "scales", 16, 5e-2),
    Method("LoRA, 672 numbers", "lora", 1, 5e-2, tuple(value_and(matrix, layer) for layer in LAYERS for matrix in MLP)),
    Method("scales, rank 64", "scales", 64, 5e-2),
    Method("LoRA, 2688 numbers", "lora", 1, 5e-2, (("q_proj", "v_proj"), *(value_and(matrix, *LAYERS[1:5]) for matrix in MLP))),
    Method("LoRA rank 16, all targets", "lora", 16, 5e-3, (LINEAR,)),
    Method("full fine-tuning", "full", 0, 1e-3),
)


@dataclass(frozen=True, slots=True)
class Run:
    method: Method
    modules: tuple[str, ...]
    rate: float
    seed: int
    steps: int
    batch: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Result:
    trainable: int
    validation: float
    held_out: float
    seconds_per_step: float


def prepare(run: Run) -> tuple[Any, list[torch.nn.Parameter]]:
    """The model and what of it is trained."""
    if run.method.kind == "scales":
        factorized = run.folder / str(run.method.rank)
        model = load(factorized)
        return model, list(surgery.attach(model, factorized).parameters())
    model = load(MODEL)
    if run.method.kind == "lora":
        import peft

        rank = run.method.rank
        # With the learning rate tuned, alpha is but another name for it.
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(run.modules))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers is about to rename
            model = peft.get_peft_model(model, config)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text to train on, to tune on, and to report on."""
    text, held_out = prose()
    cut = len(text) * 4 // 5
    return text[:cut], text[cut:], held_out


def train(run: Run) -> Result:
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    text, validation, held_out = split()
    model, parameters = prepare(run)
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.Adam(parameters, lr=run.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    seconds = []
    for _ in range(run.steps):
        clock = time.perf_counter()
        starts = torch.randint(len(text) - CONTEXT, (run.batch, 1), generator=generator)
        ids = text[starts + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - clock)
    tuned_on = mean_loss(model, validation)
    return Result(
        trainable=sum(parameter.numel() for parameter in parameters),
        validation=tuned_on if math.isfinite(tuned_on) else math.inf,  # too high a rate; inf is worse than all
        held_out=mean_loss(model, held_out),
        seconds_per_step=statistics.median(seconds),
    )


def finish(pool: ProcessPoolExecutor, runs: list[Run]) -> list[Result]:
    results = []
    for result in pool.map(train, runs):
        results.append(result)
        print(f"\r{len(results)} of {len(runs)} runs ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def lowest(tried: dict[Run, Result]) -> Run:
    return min(tried, key=lambda run: tried[run].validation)


def spread(losses: list[float]) -> str:
    return f"{min(losses):.4f} to {max(losses):.4f}, median {statistics.median(losses):.4f}"


def tune(pool: ProcessPoolExecutor, settings: dict[str, Any]) -> dict[Method, Run]:
    """The best run of each method on the validation text: all placements at the first rate, then the rates beside the best."""
    results: dict[Method, dict[Run, Result]] = {method: {} for method in METHODS}
    waiting = [
        Run(method, modules, method.first_rate, TUNING_SEED, **settings) for method in METHODS for modules in method.placements
    ]
    while waiting:
        for run, result in zip(waiting, finish(pool, waiting), strict=True):
            results[run.method][run] = result
        waiting = []
        for method, tried in results.items():
            best = lowest(tried)
            position = RATES.index(best.rate)
            beside = [Run(method, best.modules, RATES[position + step], TUNING_SEED, **settings) for step in (-1, 1)]
            waiting += [run for run in beside if run not in tried]
    for method, tried in results.items():
        best = lowest(tried)
        rates = sorted((run.rate, result.validation) for run, result in tried.items() if run.modules == best.modules)
        print(f"{method.name} {' '.join(best.modules)}")
        print("    tuning loss by learning rate: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in rates))
        print(f"    held-out loss with the seed of tuning: {tried[best].held_out:.4f}")
        if len(method.placements) > 1:
            places = [result for run, result in tried.items() if run.rate == method.first_rate]
            print(
                f"    {len(places)} placements at {method.first_rate:g}: tuning loss {spread([r.validation for r in places])}; "
                f"held out {spread([r.held_out for r in places])}"
            )
    return {method: lowest(tried) for method, tried in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {CONTEXT} bytes per step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at the same time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-adapt-") as folder:
        settings = {"steps": args.steps, "batch": args.batch, "folder": Path(folder)}
        for rank in {method.rank for method in METHODS if method.kind == "scales"}:
            surgery.factorize(MODEL, Path(folder) / str(rank), rank=rank)
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            compare(pool, settings, args.seeds)


def compare(pool: ProcessPoolExecutor, settings: dict[str, Any], seeds: int) -> None:
    train_text, validation, held_out = split()
    print(
        f"bytes of text: {len(train_text)} to train on, {len(validation)} to tune on, {len(held_out)} held out; "
        f"{settings['steps']} steps of {settings['batch']} x {CONTEXT}\n"
    )
    chosen = tune(pool, settings)
    # Seeds outside: the methods take turns, so that what else runs on the machine slows all of them.
    runs = [
        Run(method, best.modules, best.rate, seed, **settings)
        for seed in range(1, seeds + 1)
        for method, best in chosen.items()
    ]
    results: dict[Method, list[Result]] = {method: [] for method in METHODS}
    for run, result in zip(runs, finish(pool, runs), strict=True):
        results[run.method].append(result)
    print(f"\nloss in nats per byte on held-out text, seeds 1 to {seeds}; step: time over that of full fine-tuning\n")
    print("| method | trainable | learning rate | mean | std | min to max | step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| none | 0 | | {mean_loss(load(MODEL), held_out):.4f} | | | |")
    full = statistics.median(result.seconds_per_step for result in results[METHODS[-1]])
    for method, rows in results.items():
        losses = [row.held_out for row in rows]
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        step = statistics.median(row.seconds_per_step for row in rows) / full
        print(
            f"| {method.name} | {rows[0].trainable} | {chosen[method].rate:g} | {statistics.fmean(losses):.4f} | {deviation} | "
            f"{min(losses):.4f} to {max(losses):.4f} | {step:.2f} |"
        )


if __name__ == "__main__":
    main()
