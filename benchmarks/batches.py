"""The batches in which a GPU solves the matrices of a model, and the memory planned for it; from headers, without a GPU.

    python benchmarks/batches.py

A Llama of 8 and of 70 billion weights, bfloat16, as transformers shards them, rank 16; on cards of 24, 80 and 141 GB, beside 16
cores and 128 GB of memory, of which 64 GiB are used.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints import MODELS, write_headers

from surgery.engine.resources import Resources
from surgery.format.options import Options
from surgery.planning.plan import Plan, make_plan
from surgery.shards.batches import planned_batches
from surgery.source.open import open_source

CARDS = (24, 80, 141)
RANK = 16


@contextmanager
def planned(model: str, resources: Resources) -> Iterator[Plan]:
    """The plan of one of the ``MODELS``."""
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder) / model, model)
        yield make_plan(open_source(Path(folder) / model), Options(RANK), resources=resources)


def solves(plan: Plan, device: str) -> list[tuple[int, int, int]]:
    """(matrices, m, n) of each call of the solver."""
    found = []
    for shard in plan.shards:
        for batch in planned_batches(shard, plan.memory.window_bytes, device):
            found.append((len(batch), *batch[0].weight.shape))
    return found


def run(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    print("| model | GPU | window | calls | mean batch | readers | workers | ring | host memory | GPU memory |")
    print("| --- " * 10 + "|")
    for model in MODELS:
        for card in CARDS:
            resources = Resources("cuda", cores=16, memory=64 << 30, device_memory=int(card * 1e9) * 4 // 5)
            with planned(model, resources) as plan:
                calls, memory = solves(plan, "cuda"), plan.memory
            mean = sum(count for count, *_ in calls) / len(calls)
            host, device = memory.peak_bytes / 1e9, memory.device_bytes / 1e9
            window, ring = memory.window_bytes >> 20, memory.ring_bytes >> 20
            print(
                f"| {model} | {card} GB | {window} MiB | {len(calls)} | {mean:.1f} | {memory.readers} | {memory.workers} "
                f"| {ring} MiB | {host:.1f} GB | {device:.1f} GB |"
            )


if __name__ == "__main__":
    run()
