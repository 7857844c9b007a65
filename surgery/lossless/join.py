"""Putting a weight together again, bit for bit or with an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from surgery.arithmetic import exact_arithmetic
from surgery.lossless.blocks import for_each
from surgery.lossless.correction import CorrectionReader
from surgery.lossless.factors import Addition, Factors
from surgery.lossless.kept import NOTHING_ASKED, Kept
from surgery.lossless.prediction import Prediction, working_dtype
from surgery.lossless.rounding import bits_of, flipped
from surgery.lossless.update import NEAREST, Written, rescale, update_of
from surgery.lossless.uploaded import UploadedCorrection
from surgery.memory import bytes_of, scratch
from surgery.precision import full_precision
from surgery.torch_threads import one_thread


@exact_arithmetic()
def join(
    residual: torch.Tensor,
    factors: Factors,
    correction: torch.Tensor,
    scales: torch.Tensor | None = None,
    addition: Addition | None = None,
    written: Written = NEAREST,
) -> tuple[torch.Tensor, Kept]:
    """The weight that ``split`` took apart, with its directions scaled, or scaled and turned.

    ``round(W + U diag(s (g - 1)) V^T)``, or with a core ``round(W + U diag(sqrt s) (C - I) diag(sqrt s) V^T)``, with W
    recovered exactly, rounded once; see ``rescale``.

    Args:
        residual: (m, n), the weight's dtype, on a device with float64.
        factors: on the same device.
        correction: as returned by ``split``, on the CPU.
        scales: ``g``, float32 (k,), or a core C (k, k), on the CPU; None where they are untouched, which gives W itself.
        addition: added before the rounding, on the device of the residual.
        written: how it is rounded and where it goes, like the residual; may be the residual itself.

    Returns:
        (m, n), dtype and device of ``residual``, and what was kept of the update.

    Raises:
        CorruptCorrection: the correction cannot be decoded. Not every damage is noticed: check the hash of its file.
    """
    if written.rounding == "nearest" or (scales is None and addition is None):
        weight, _, kept = _joined(residual, factors, correction, scales, addition, written.out)
        return weight, kept
    recovered, *_ = _joined(residual, factors, correction, None, None, written.out)
    return rescale(recovered, factors, scales, addition, replace(written, out=recovered))


@exact_arithmetic()
def recover(
    residual: torch.Tensor, factors: Factors, correction: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The weight that ``split`` took apart, and the share of entries that residual and factors alone do not give exactly.

    Arguments and errors are those of ``join``.
    """
    weight, moved, _ = _joined(residual, factors, correction, None, None, out)
    return weight, moved / weight.numel()


def _joined(
    residual: torch.Tensor,
    factors: Factors,
    correction: torch.Tensor,
    scales: torch.Tensor | None,
    addition: Addition | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, int, Kept]:
    """The result of ``join``, rounded to nearest, how many entries the correction has changed, and what was kept."""
    m, n = residual.shape
    reader = CorrectionReader(bytes_of(correction), m, n, residual.element_size())
    step = reader.rows_per_block
    with one_thread():
        prediction = Prediction(factors, residual.dtype)
        update = update_of(factors, scales, addition, residual.dtype)
        uploaded = None if residual.device.type == "cpu" else UploadedCorrection(reader, residual.device)
    weight = torch.empty_like(residual) if out is None else out

    def worker(most: int) -> Callable[[slice], tuple[int, torch.Tensor | None]]:
        predict = prediction.worker(most)
        wide = scratch("join sums", (most, n), working_dtype(residual.dtype), residual.device)
        apply = None if update is None else update.worker(most)

        def work(rows: slice) -> tuple[int, torch.Tensor | None]:
            sums = wide[: rows.stop - rows.start].copy_(residual[rows]).add_(predict(rows))
            block, moved = weight[rows].copy_(sums), 0
            if uploaded is not None:
                uploaded.correct_(block, rows.start)
            else:
                positions, units = reader.units(rows.start)
                bits = bits_of(block).view(-1).numpy()
                bits[positions] = flipped(flipped(bits[positions]) + units)  # more than twice as fast as in torch
                moved = int(np.count_nonzero(units))
            return moved, None if apply is None else apply(block, rows)

        return work

    with full_precision(residual.device):
        moved, parts = zip(*for_each(worker, m, step, residual.device), strict=True)
    differing = sum(moved) if uploaded is None else uploaded.differing
    return weight, differing, NOTHING_ASKED if update is None else update.kept(parts)
