"""truncated_svd against its peers, side by side in one process, every result checked in float64.

    python benchmarks/svd.py                     all cases (about ten minutes on two cores)
    python benchmarks/svd.py square wide         some of them: square, wide, ranks, stored, full, gaussian, small, hard
    python benchmarks/svd.py parts               where the time of a call goes, ours and theirs (CPU)
    python benchmarks/svd.py model --device cuda the matrices of an 8B model, in the batches that factorize makes

Peers: torch.svd_lowrank with q = k and niter = 16, SciPy's ARPACK and PROPACK (needs scipy), torch.linalg.svd. They take
turns; a row holds medians over the repeats. Between two calls lies a pause, since the thread pools of the libraries spin for
a while after a call and would slow the next one down, and then the same call with a small matrix: threads that sleep take
milliseconds to wake up. ``residual`` is the largest two-sided residual over s_1, ``values``
the largest error of a singular value over s_1, against float64 LAPACK where the case asks for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from batches import planned, solves
from checkpoints import llm_like
from safetensors.torch import load_file

import surgery
from surgery.engine.resources import Resources
from surgery.solvers.lanczos import block_size
from surgery.solvers.operator import Operator

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Solver = Callable[[torch.Tensor, int], Triplets]
TOLERANCE = 1e-5
PAUSE = 0.15


def ours(A: torch.Tensor, k: int) -> Triplets:
    result = surgery.truncated_svd(A, k, tolerance=TOLERANCE)
    assert bool(result.certificate.converged)
    return result.U, result.s, result.V


def svd_lowrank(A: torch.Tensor, k: int) -> Triplets:
    U, s, V = torch.svd_lowrank(A, q=k, niter=16)
    return U, s, V


def full_svd(A: torch.Tensor, k: int) -> Triplets:
    U, s, Vt = torch.linalg.svd(A, full_matrices=False)
    return U[:, :k], s[:k], Vt[:k].T


def _scipy(solver: str) -> Solver:
    def solve(A: torch.Tensor, k: int) -> Triplets:
        from scipy.sparse.linalg import svds

        U, s, Vt = svds(A.numpy(), k, tol=TOLERANCE, solver=solver, rng=0)
        return torch.from_numpy(U.copy()), torch.from_numpy(s.copy()), torch.from_numpy(Vt.copy()).T

    return solve


PEERS: dict[str, Solver] = {
    "surgery": ours,
    "svd_lowrank": svd_lowrank,
    "svd_lowrank, converted": lambda A, k: svd_lowrank(A.float(), k),
    "ARPACK": _scipy("arpack"),
    "PROPACK": _scipy("propack"),
    "full SVD": full_svd,
}


def synchronize(A: torch.Tensor) -> None:
    if A.device.type == "cuda":
        torch.cuda.synchronize()


def residual_of(A: torch.Tensor, found: Triplets) -> float:
    U, s, V = (part.double().cpu() for part in found)
    wide = A.double().cpu()
    sides = torch.maximum((wide @ V - U * s).norm(dim=0), (wide.T @ U - V * s).norm(dim=0))
    return (sides.max() / s.max().clamp(min=1e-300)).item()


def values_error(truth: torch.Tensor, found: Triplets) -> float:
    s = found[1].double().cpu().sort(descending=True).values
    return ((s - truth[: len(s)]).abs().max() / truth[0].clamp(min=1e-300)).item()


def compare(
    name: str, A: torch.Tensor, k: int, peers: Iterable[str], repeats: int, *, truth: torch.Tensor | None = None
) -> None:
    """Print one row for each peer."""
    awake = random_matrix(600, 600, A.device.type).to(A.dtype)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    results: dict[str, Triplets | None] = {}
    for peer in seconds:
        try:
            results[peer] = PEERS[peer](A, k)
        except Exception as error:  # a peer that fails is a result too
            print(f"| {name} | {peer} | fails: {type(error).__name__} | | | |")
            results[peer] = None
    for _ in range(repeats):
        for peer in seconds:
            if results[peer] is not None:
                time.sleep(PAUSE)
                PEERS[peer](awake, 8)
                synchronize(A)
                start = time.perf_counter()
                PEERS[peer](A, k)
                synchronize(A)
                seconds[peer].append(time.perf_counter() - start)
    own = statistics.median(seconds["surgery"])
    for peer, times in seconds.items():
        if (found := results[peer]) is None:
            continue
        median = statistics.median(times)
        values = f"{values_error(truth, found):.0e}" if truth is not None else ""
        print(
            f"| {name} | {peer} | {1e3 * median:.0f} | {median / own:.2f} | {residual_of(A, found):.0e} | {values} |",
            flush=True,
        )


def random_matrix(m: int, n: int, device: str) -> torch.Tensor:
    return llm_like(m, n, torch.Generator().manual_seed(0)).to(device)


def square(device: str, repeats: int) -> None:
    for n in (1024, 2048, 4096):
        peers = ["surgery", "svd_lowrank", *(["ARPACK", "PROPACK"] if device == "cpu" else [])]
        compare(f"{n}x{n}, k=16", random_matrix(n, n, device), 16, peers, repeats)


def wide(device: str, repeats: int) -> None:
    peers = ["surgery", "svd_lowrank", *(["ARPACK", "PROPACK"] if device == "cpu" else [])]
    compare("4096x11008, k=16", random_matrix(4096, 11008, device), 16, peers, repeats)


def ranks(device: str, repeats: int) -> None:
    for n in (4096, 11008):
        A = random_matrix(4096, n, device)
        for k in (64, 128):
            compare(f"4096x{n}, k={k}", A, k, ["surgery", "svd_lowrank"], max(1, repeats // 2))


def stored(device: str, repeats: int) -> None:
    """Weights as checkpoints hold them. The peers know float32 only: converting is part of their time."""
    for m, n in ((4096, 4096), (8192, 2048), (512, 2048)):
        A = random_matrix(m, n, device).bfloat16()
        compare(f"{m}x{n}, bfloat16, k=16", A, 16, ["surgery", "svd_lowrank, converted"], repeats)


def full(device: str, repeats: int) -> None:
    A = random_matrix(4096, 4096, device)
    truth = torch.linalg.svdvals(A.double()).cpu()
    compare("4096x4096, k=16", A, 16, ["surgery", "full SVD"], max(1, repeats // 2), truth=truth)


def gaussian(device: str, repeats: int) -> None:
    A = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(device)
    compare("Gaussian 4096x4096, k=16", A, 16, ["surgery", "full SVD"], max(1, repeats // 2))


def small(device: str, repeats: int, weights: str | None = None) -> None:
    """All matrices of a 384-wide sentence encoder of six layers, one by one and as batches of one shape."""
    if weights:
        tensors = load_file(weights)
        matrices = [A.float().to(device) for name, A in tensors.items() if A.ndim == 2 and ".layer." in name]
    else:
        shapes = 6 * [*4 * [(384, 384)], (1536, 384), (384, 1536)]
        matrices = [random_matrix(m, n, device) for m, n in shapes]
    batches: dict[torch.Size, list[torch.Tensor]] = {}
    for A in matrices:
        batches.setdefault(A.shape, []).append(A)
    stacked = [torch.stack(same) for same in batches.values()]
    ways: dict[str, Callable[[], object]] = {
        "surgery": lambda: [ours(A, 16) for A in matrices],
        "surgery, batches": lambda: [surgery.truncated_svd(A, 16) for A in stacked],
        "svd_lowrank": lambda: [svd_lowrank(A, 16) for A in matrices],
        "full SVD": lambda: [full_svd(A, 16) for A in matrices],
    }
    residuals = {name: max(residual_of(A, PEERS[name](A, 16)) for A in matrices) for name in ways if name in PEERS}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            time.sleep(PAUSE)
            for timed in (False, True):  # the first one wakes the threads
                start = time.perf_counter()
                way()
                synchronize(matrices[0])
                if timed:
                    seconds[name].append(time.perf_counter() - start)
    own = statistics.median(seconds["surgery"])
    for name, times in seconds.items():
        median = statistics.median(times)
        residual = f"{residuals[name]:.0e}" if name in residuals else ""
        print(f"| {len(matrices)} matrices, 384 wide, k=16 | {name} | {1e3 * median:.0f} | {median / own:.2f} | {residual} | |")


def hard(device: str, repeats: int) -> None:
    n = 768
    generator = torch.Generator().manual_seed(0)
    Q, P = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for _ in range(2))

    def of(values: torch.Tensor) -> torch.Tensor:
        return ((Q * values.double()) @ P.T).float()

    cases = {
        "repeated values": of(torch.cat([torch.tensor([3.0, 2.9, 2.8]).repeat_interleave(33), torch.full((n - 99,), 0.1)])),
        "orthogonal": of(torch.ones(n)),
        "exactly rank 5": of(torch.cat([torch.arange(5.0, 0, -1), torch.zeros(n - 5)])),
        "times 1e-30": random_matrix(n, n, "cpu") * 1e-30,
        "times 1e30": random_matrix(n, n, "cpu") * 1e30,
        "graded 2^-i": of(2.0 ** -torch.arange(float(n))),
        "s1/s2 = 1e3": of(torch.cat([torch.tensor([1e3]), torch.linspace(1, 0, n - 1)])),
        "zero": torch.zeros(n, n),
    }
    for name, A in cases.items():
        truth = torch.linalg.svdvals(A.double())
        peers = ["surgery", *(["PROPACK"] if device == "cpu" and name != "zero" else [])]
        compare(f"{name}, {n}x{n}, k=64", A.to(device), 64, peers, 1, truth=truth)


def parts(device: str, repeats: int) -> None:
    """Calls of surgery, svd_lowrank and PROPACK, and their products with the matrix measured alone, equally many of them."""
    for m, n, k in ((1024, 1024, 16), (2048, 2048, 16), (4096, 4096, 16), (4096, 11008, 16), (4096, 4096, 64)):
        A, name = random_matrix(m, n, device), f"{m}x{n}, k={k}"
        operator, block = Operator(A[None]), block_size(k, Operator(A[None]))
        steps = (int(surgery.truncated_svd(A, k, tolerance=TOLERANCE).certificate.passes) - 2) // 2
        short, long = torch.randn(1, block, operator.short), torch.randn(1, block, operator.long)
        wide = torch.randn(1, k, operator.short).double(), torch.randn(1, k, operator.long).double()
        theirs = torch.randn(n, k), torch.randn(m, k)
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "surgery": (1, lambda A=A, k=k: ours(A, k)),
            f"  {steps} float32 products, {block} rows, to the longer side": (steps, lambda o=operator, x=short: o.to_long(x)),
            f"  {steps} float32 products, {block} rows, to the shorter side": (steps, lambda o=operator, y=long: o.to_short(y)),
            "  float64 sweep, both products": (1, lambda o=operator, w=wide: o.both_wide(*w)),
            "svd_lowrank": (1, lambda A=A, k=k: svd_lowrank(A, k)),
            f"  34 products, {k} columns": (17, lambda A=A, t=theirs: (A @ t[0], A.T @ t[1])),
        }
        if k == 16:
            singles, one, other = _propack_products(A, k), A.numpy(), (np.ones(n, np.float32), np.ones(m, np.float32))
            ways["PROPACK"] = (1, lambda A=A, k=k: PEERS["PROPACK"](A, k))
            ways[f"  {singles} products, 1 column"] = (singles // 2, lambda a=one, x=other: (a @ x[0], a.T @ x[1]))
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, (count, call) in ways.items():
                time.sleep(PAUSE)
                call()
                start = time.perf_counter()
                for _ in range(count):
                    call()
                seconds[way].append(time.perf_counter() - start)
        print(f"\n{name}")
        for way, times in seconds.items():
            print(f"{way:55s} {1e3 * statistics.median(times):7.1f} ms", flush=True)


def _propack_products(A: torch.Tensor, k: int) -> int:
    """How many products with a vector PROPACK makes."""
    from scipy.sparse.linalg import LinearOperator, svds

    count, matrix = 0, A.numpy()

    def counted(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return matrix @ x

    both = {"matvec": lambda x: counted(matrix, x), "rmatvec": lambda y: counted(matrix.T, y)}
    svds(LinearOperator(matrix.shape, **both, dtype=matrix.dtype), k, tol=TOLERANCE, solver="propack", rng=0)
    return count


def model(device: str, repeats: int) -> None:
    """The 224 matrices of a Llama of 8 billion weights, bfloat16, in the batches that factorize plans for this device."""
    kind = torch.device(device).type
    total = torch.cuda.get_device_properties(device).total_memory * 4 // 5 if kind == "cuda" else None
    with planned("8B", Resources(kind, device_memory=total)) as plan:
        calls = solves(plan, kind)
    matrices = {shape: random_matrix(*shape, device).bfloat16() for shape in {(m, n) for _, m, n in calls}}
    times = []
    for repeat in range(repeats + 1):  # the first one loads kernels
        seconds, worst = 0.0, 0.0
        for count, *shape in calls:
            batch = matrices[shape[0], shape[1]].expand(count, *shape).contiguous()
            synchronize(batch)
            start = time.perf_counter()
            result = surgery.truncated_svd(batch, 16)
            synchronize(batch)
            seconds += time.perf_counter() - start
            worst = max(worst, result.certificate.residual.max().item())
        if repeat:
            times.append(seconds)
    count = sum(count for count, *_ in calls)
    name = f"{count} matrices of an 8B model in {len(calls)} calls, k=16"
    print(f"| {name} | surgery | {1e3 * statistics.median(times):.0f} | 1.00 | {worst:.0e} | |")


CASES = {case.__name__: case for case in (square, wide, ranks, stored, full, gaussian, small, hard, parts, model)}


def run(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=", ".join(CASES) + " (default: all but parts and model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--weights", type=Path, help="for small: a safetensors file of a real model")
    arguments = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}, tolerance {TOLERANCE}\n")
    if arguments.cases != ["parts"]:
        print("| case | solver | ms | of surgery's | residual | values |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in arguments.cases or [case for case in CASES if case not in ("parts", "model")]:
        if name == "small":
            small(arguments.device, arguments.repeats, arguments.weights)
        else:
            CASES[name](arguments.device, arguments.repeats)


if __name__ == "__main__":
    run()
