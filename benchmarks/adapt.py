"""Training scales, cores and their kin against adapters of PEFT and full fine-tuning, on the built-in demo model.

    python benchmarks/adapt.py
    python benchmarks/adapt.py --seeds 10 --steps 120
    python benchmarks/adapt.py --rows "core of 4" "LoRA, 672"

The model of ``surgery demo``, which has learned Python source code, adapts to English prose. Needs transformers and
peft; an hour of one core. The methods are in adapt_methods.py, each beside others with as many trainable numbers, exactly
where that can be had. LoRA at rank 1 of a ``v_proj`` and one MLP matrix of the same layer has 192 + 480 = 672, as many as
scales of 16 or a core of 4 in 42 targets; of ``q_proj`` and ``v_proj`` of all layers, or of four such pairs, 2688.

No method is handicapped by its learning rate: on the last fifth of the training text, which nothing trains on, each is
tuned on the grid 1, 2, 5 times powers of ten until both neighbours of the best one are worse. Where an adapter fits on some
modules only, which ones is chosen there too. Then all train with the chosen settings from several seeds, which set
the order of the data, the same for all methods, an adapter's start, and directions where they are random. A worker uses one
thread; the time of a step is the processor's.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapt_directions import check
from adapt_methods import FULL, METHODS, Method, Run, batches, prepare, split

import surgery
from surgery.demo.run import CONTEXT, MODEL, load, mean_loss
from surgery.names import TRAINS

RATES = [factor * 10.0**power for power in range(-5, 4) for factor in (1, 2, 5)]
CHECKED = 4  # rank at which the controls are held against attach
TUNING_SEED = 0  # the reported seeds start at 1


@dataclass(frozen=True, slots=True)
class Result:
    trainable: int
    validation: float
    held_out: float
    seconds_per_step: float


def train(run: Run) -> Result:
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    text, validation, held_out = split()
    model, parameters = prepare(run, text)
    optimizer = torch.optim.Adam(parameters, lr=run.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    seconds = []
    for ids in batches(run, text, run.steps):
        clock = time.process_time()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.process_time() - clock)
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


def tune(pool: ProcessPoolExecutor, methods: list[Method], settings: dict[str, Any]) -> dict[Method, Run]:
    """The best run of each method on the validation text: all placements at the first rate, then the rates beside the best."""
    results: dict[Method, dict[Run, Result]] = {method: {} for method in methods}
    waiting = [
        Run(method, modules, method.first_rate, TUNING_SEED, **settings) for method in methods for modules in method.placements
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
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="only methods with one of these in their names, and full fine-tuning"
    )
    args = parser.parse_args()
    methods = [method for method in METHODS if method is FULL or any(part in method.name for part in args.rows)]
    with tempfile.TemporaryDirectory(prefix="surgery-adapt-") as folder:
        settings = {"steps": args.steps, "batch": args.batch, "folder": Path(folder)}
        for rank in {CHECKED} | {method.factorized for method in methods if method.factorized}:
            surgery.factorize(MODEL, Path(folder) / str(rank), rank=rank)
        for train in TRAINS:
            error = check(Path(folder) / str(CHECKED), train)
            print(f"{train} on the directions of attach: the benchmark's own module differs by {error:.1e} of the change")
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            compare(pool, methods, settings, args.seeds)


def compare(pool: ProcessPoolExecutor, methods: list[Method], settings: dict[str, Any], seeds: int) -> None:
    train_text, validation, held_out = split()
    print(
        f"bytes of text: {len(train_text)} to train on, {len(validation)} to tune on, {len(held_out)} held out; "
        f"{settings['steps']} steps of {settings['batch']} x {CONTEXT}\n"
    )
    chosen = tune(pool, methods, settings)
    # Seeds outside: the methods take turns, so that what else runs on the machine slows all of them.
    runs = [
        Run(method, best.modules, best.rate, seed, **settings)
        for seed in range(1, seeds + 1)
        for method, best in chosen.items()
    ]
    results: dict[Method, list[Result]] = {method: [] for method in methods}
    for run, result in zip(runs, finish(pool, runs), strict=True):
        results[run.method].append(result)
    for method, rows in results.items():
        print(f"{method.name}: {' '.join(f'{row.held_out:.4f}' for row in rows)}")
    print(f"\nloss in nats per byte on held-out text, seeds 1 to {seeds}; step: time over that of full fine-tuning\n")
    print("| method | trainable | learning rate | mean | std | min to max | step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| none | 0 | | {mean_loss(load(MODEL), held_out):.4f} | | | |")
    full = statistics.median(result.seconds_per_step for result in results[FULL])
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
