"""A rough estimate of how long a run takes, from a short measurement of the machine."""

from __future__ import annotations

import time

import torch

from surgery.planning.plan import Plan
from surgery.planning.targets import Target
from surgery.solvers.product import rows_times, rows_times_transposed
from surgery.torch_threads import one_thread

#: Vectors that a matrix is multiplied by until its triplets are certified, for each of its k wanted ones and of the extra ones.
#: Measured at 2048 to 4096 wide, k = 16 to 128.
_ROWS = 18
_EXTRA_RANK = 16
#: Float32 operations of such products in the time of one of a proof, which is float64. Measured on a CPU at 768 to 2048 wide.
_FLOAT64 = 1.5
#: Seconds of a core per weight for the lossless split. Not measured on a GPU, where the encoding is done by the host as well.
_SPLIT = 6e-9
#: Seconds of a core per byte that is read or written and hashed.
_BYTE = 1e-9
#: Bytes per second that an ordinary disk takes and gives.
_DISK = 1e9
_PROBE = 2048


def estimate_seconds(plan: Plan, device: torch.device) -> float:
    """Seconds that a planned run will take on this machine, without downloads: a rough figure.

    It multiplies a few rows by a small matrix on the device to measure its speed. It takes it that all cores are busy, and that
    the disk writes meanwhile.
    """
    products = sum(2.0 * t.entries * min(_ROWS * (t.rank + _EXTRA_RANK), 2 * min(t.matrices[1:])) for t in plan.targets)
    if plan.options.prove:
        products += sum(map(_proof, plan.targets))
    on_device = products / _product_rate(device)
    on_host = (plan.bytes_read + plan.bytes_written) * _BYTE
    if plan.layout == "residual":
        on_host += sum(target.entries for target in plan.targets) * _SPLIT
    workers = plan.memory.workers
    busy = (on_device + on_host) / workers if device.type == "cpu" else max(on_device, on_host / workers)
    return max(busy, (plan.bytes_read + plan.bytes_written) / _DISK)


def _proof(target: Target) -> float:
    """Float32 operations that take as long as the proof of a target: a Gram matrix and its Cholesky decomposition."""
    count, m, n = target.matrices
    short, long = sorted((m, n))
    return _FLOAT64 * count * short**2 * (long + short / 2)


def _product_rate(device: torch.device) -> float:
    """Float32 operations per second in products as an SVD computes them; on a CPU, of one core."""
    x = torch.ones(1, 16, _PROBE, dtype=torch.float32, device=device)
    A = torch.ones(1, _PROBE, _PROBE, dtype=torch.float32, device=device)
    fastest = float("inf")
    with one_thread():
        for _ in range(5):
            start = time.perf_counter()
            product = rows_times(rows_times_transposed(x, A), A)
            product[0, 0, 0].item()  # waits for the device
            fastest = min(fastest, time.perf_counter() - start)
    return 4.0 * 16 * _PROBE**2 / fastest
