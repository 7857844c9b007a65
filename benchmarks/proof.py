"""What it costs to know that no larger singular value was missed: in a solve, by a proof, and in measuring again.

    python benchmarks/proof.py [--repeats N]     about two minutes on one core

One thread, milliseconds of its CPU time, medians of calls that take turns. ``solve`` is ``truncated_svd`` of 16 triplets,
``verdict`` the part of it that says what the start rows tell, ``proof`` what ``prove=True`` adds, ``measure`` what ``surgery
verify`` does to a matrix, ``probe`` the part of it that looks for values that are missing, and ``before`` an iteration to a
residual of 3 % of the largest, which that part was until it had something to say.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from checkpoints import llm_like

import surgery
from surgery.linalg import measured
from surgery.linalg.proof import prove_top_k
from surgery.linalg.top_k import top_k_of
from surgery.lossless.factors import Factors
from surgery.solvers.lanczos import block_lanczos
from surgery.solvers.operator import Operator
from surgery.solvers.triplets import solve

SHAPES = ((384, 384), (768, 768), (1024, 1024), (1024, 4096), (2048, 2048), (4096, 4096))
RANK = 16


def case(m: int, n: int, repeats: int) -> None:
    A = llm_like(m, n, torch.Generator().manual_seed(1))
    found = surgery.truncated_svd(A, RANK)
    factors, s, residual = Factors(found.U, found.s, found.V), found.s.double(), found.certificate.residual
    solution = solve(Operator(A[None]), RANK, 1e-5, 0)[0]
    apart = measured._Apart(A[None].contiguous(), n, factors.U.T[None].contiguous(), factors.V.T[None].contiguous())
    parts: dict[str, Callable[[], object]] = {
        "solve": lambda: surgery.truncated_svd(A, RANK),
        "verdict": lambda: top_k_of(solution.search, s, min(m, n), 2.0**-23),
        "proof": lambda: prove_top_k(A, found.U, s, found.V, residual),
        "measure": lambda: measured.measure(A, factors),
        "probe": lambda: measured._probed(A, factors, found.norm.item()),
        "before": lambda: block_lanczos(apart, 1, tolerance=3e-2, block=16, seed=1),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.thread_time()
            part()
            times[name].append(1e3 * (time.thread_time() - start))
    print(f"{m}x{n}".ljust(12), *(f"{statistics.median(taken):10.2f}" for taken in times.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(" " * 12, *(name.rjust(10) for name in ("solve", "verdict", "proof", "measure", "probe", "before")))
    for m, n in SHAPES:
        case(m, n, repeats)


if __name__ == "__main__":
    main()
