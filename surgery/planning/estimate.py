"""About how long a run takes, from a short measurement of the machine."""

from __future__ import annotations

import time

import torch

from surgery.linalg.product import rows_times
from surgery.planning.plan import Plan

#: Rows multiplied by a matrix until its triplets are certified, per wanted one; measured at 4096x4096, k = 16 to 128.
_ROWS = 31
_EXTRA_RANK = 16
#: Seconds per weight for the lossless split on one CPU core. On a GPU it has not been measured, and counts for nothing.
_SPLIT = 10e-9
#: Bytes per second that an ordinary disk takes and gives.
_DISK = 1e9
_PROBE = 2048


def estimate_seconds(steps: Plan, device: torch.device) -> float:
    """Seconds that a planned run will take on this machine, without downloads: a rough figure.

    Multiplies a few rows by a small matrix on the device to see how fast it is.
    """
    rate = _product_rate(device)
    products = sum(2.0 * t.entries * min(_ROWS * (t.rank + _EXTRA_RANK), 2 * min(t.matrices[1:])) for t in steps.targets)
    seconds = products / rate + (steps.bytes_read + steps.bytes_written) / _DISK
    if steps.layout == "residual" and device.type == "cpu":
        seconds += sum(target.entries for target in steps.targets) * _SPLIT / min(torch.get_num_threads(), 8)
    return seconds


def _product_rate(device: torch.device) -> float:
    """Float32 operations per second of the products that an SVD consists of."""
    x = torch.ones(1, 16, _PROBE, device=device)
    A = torch.ones(1, _PROBE, _PROBE, device=device)
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product = rows_times(x, A)
        product[0, 0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * 16 * _PROBE**2 / fastest
