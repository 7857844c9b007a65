"""How often a truncated SVD on a GPU launches something there and waits for it, counted on a pretended device.

    python benchmarks/launches.py            batches of 1 to 16 matrices, k = 16 and 64, both iterations (minutes)

A launch takes the host some microseconds, and a wait leaves the device without work until the host has answered. Counts are
those of torch's operations, not of kernels: a Cholesky factorization is one, and several kernels. They say nothing of the time
that a real device takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from surgery.linalg.svd import truncated_svds
from tests.models import realistic
from tests.pretend_gpu import GPU, pretend_gpu

SHAPES = {"block-lanczos": (1200, 700), "gram": (900, 400)}


def main() -> None:
    print("| method | k | matrices | passes | launches | waits | waits per matrix |\n|---|---|---|---|---|---|---|")
    for method, shape in SHAPES.items():
        matrices = torch.stack([realistic(*shape, seed=seed) for seed in range(16)])
        for k in (16, 64):
            for count in (1, 3, 8, 16):
                with pretend_gpu() as log:
                    batch = matrices[:count].to(GPU)
                    launches, waits = log["launches"], log["syncs"]
                    found = truncated_svds(batch, k)
                    launches, waits = log["launches"] - launches, log["syncs"] - waits
                assert {one.certificate.method for one in found} == {method}
                passes = max(int(one.certificate.passes) for one in found)
                print(f"| {method} | {k} | {count} | {passes} | {launches} | {waits} | {waits / count:.1f} |", flush=True)


if __name__ == "__main__":
    main()
