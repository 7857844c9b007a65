"""What an extracted adapter holds of a fine-tune: its change, and its loss. On the model that comes with surgery.

    python benchmarks/extracted.py OUT        # some minutes on two cores

All weights of the byte-level Llama of ``surgery demo`` learn English prose, as in benchmarks/study.py. Then the change is
extracted with several ranks, each adapter is merged into the base by ``surgery merge``, and the held-out loss is measured;
``surgery project`` is measured beside them. docs/extracting.md tells what came out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import surgery
from benchmarks.study import fine_tune
from surgery.demo.run import MODEL, load, mean_loss, prose
from surgery.names import TRAINS
from surgery.progress import Silent

#: What is extracted: rank, or share of the change.
WAYS: tuple[dict[str, object], ...] = (
    *({"rank": rank} for rank in (1, 4, 16, 64)),
    {"rank": "auto"},
    {"energy": 0.5},
    {"energy": 0.9},
    {"budget": 100_000},
)


def measure(tuned: Path, out: Path) -> None:
    """Print a row for each way."""
    held_out, quiet = prose()[1], Silent()
    print("| adapter | ranks | numbers | of the change | loss |\n| --- | --- | --- | --- | --- |", flush=True)
    print(f"| none | - | 0 | 0 % | {mean_loss(load(MODEL), held_out):.4f} |")
    print(f"| the fine-tuned model | - | - | 100 % | {mean_loss(load(tuned), held_out):.4f} |", flush=True)
    for number, way in enumerate(WAYS):
        adapter, merged = out / f"adapter-{number}", out / f"merged-{number}"
        found = surgery.extract(MODEL, tuned, adapter, **way, overwrite=True, progress=quiet)  # type: ignore[arg-type]
        surgery.merge(MODEL, adapter, merged, overwrite=True, progress=quiet)
        ranks = sorted({one.rank for one in found.targets})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        name = ", ".join(f"{key} {value}" for key, value in way.items())
        loss = mean_loss(load(merged), held_out)
        print(f"| {name} | {span} | {found.numbers:,} | {found.kept_of_all:.1%} | {loss:.4f} |", flush=True)
    factorized = surgery.factorize(MODEL, out / "factorized", rank=16, overwrite=True, progress=quiet)
    for train in TRAINS:
        file, folded = out / f"{train}.safetensors", out / f"folded-{train}"
        projected = surgery.project(factorized.out, tuned, file, train=train, overwrite=True, progress=quiet)
        surgery.fold(factorized.out, file, folded, overwrite=True, progress=quiet)
        share, loss = projected.total.explained or 0.0, mean_loss(load(folded), held_out)
        print(
            f"| project, {train}, rank 16 | 16 | {projected.trainable:,} | {share:.1%} of the targets' | {loss:.4f} |",
            flush=True,
        )


parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--seed", type=int, default=0)

if __name__ == "__main__":
    options = parser.parse_args()
    fine_tune(options.out / "tuned", options.steps, options.learning_rate, 0.0, options.seed)
    measure(options.out / "tuned", options.out)
