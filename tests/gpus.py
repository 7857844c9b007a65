"""The GPU that tests run on: the real one where there is one, else one that is pretended and does all as late as it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from tests.late_gpu import late_gpu
from tests.pretend_gpu import launches, new_log, seen_by, waits

REAL = torch.cuda.is_available()
#: For tests of what only a pretended device can be told to do.
only_pretended = pytest.mark.skipif(REAL, reason="there is a real GPU, and none can be pretended beside it")

Gpu = Callable[..., AbstractContextManager[dict[str, int]]]


@contextmanager
def real_gpu() -> Iterator[dict[str, int]]:
    """The real device ``cuda:0``, with the counts of ``tests.pretend_gpu.pretend_gpu``."""
    log = new_log()

    def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs, result))[0] if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in tensors):
            log["calls"] += 1
            log["launches"] += launches(func)
            log["syncs"] += waits(func, args, kwargs)
        return result

    with seen_by(run):
        yield log


GPUS: dict[str, Gpu] = {"real": real_gpu} if REAL else {"late": late_gpu}
