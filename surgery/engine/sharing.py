"""How many workers and readers a run has, the size of its windows, and how much memory that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from surgery.engine.resources import Memory, Resources
from surgery.engine.ring import LEAST_RING_BYTES, RING_BYTES
from surgery.errors import OptionError
from surgery.files.disk import STREAM_MEMORY
from surgery.files.file_writer import CHUNK_BYTES

#: What windows are for. ``alone``: each matrix is worked on by itself. ``together``: those of one shape in batches.
#: ``resident``: likewise, and on a GPU the pieces of a window lie in its memory, not in that of the host.
Windows = Literal["alone", "together", "resident"]

#: Bytes of a window, so that small matrices of one shape are solved together. Constants, and not what happens to be free: the
#: bits of a result may depend on which matrices share a batch.
CPU_WINDOW_BYTES = 8 << 20
GPU_WINDOW_BYTES = 512 << 20
RESIDENT_WINDOW_BYTES = 3 << 30
#: Most matrices that a GPU solves together: more hardly save launches.
_GPU_BATCH = 32
#: Windows that are worked on at a time on a GPU where they hold batches: enough to compute one while others are copied.
_GPU_WORKERS = 4
#: Likewise where they hold matrices that are worked on by themselves: most of that work is the host's.
_GPU_WORKERS_ALONE = 16
#: Cores that a shard keeps busy while it is read: one reads and hashes it, one hashes what is written of another, and two do
#: what the host has to do for each weight.
_CORES_PER_READER = 4
_MOST_READERS = 8
#: The interpreter with torch loaded (220 MB), the libraries' own buffers, and what the allocator keeps of freed blocks.
_BASE_MEMORY = 400 << 20
#: Temporary tensors of the block-wise arithmetic, per worker.
_BLOCK_MEMORY = 32 << 20
#: Files that are written at a time for each shard that is read: two of it, and two of the one being finished.
_OPEN_FILES = 4
#: Upper estimate of the correction, bytes per weight (measured: 0.06-0.15).
CORRECTION_BYTES = 0.25
#: Bytes for each target of a shard until the shard is finished: its hashes, and its record on the way to the journal.
_UNFINISHED_MEMORY = 8192
#: Units of sizes in messages.
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
#: Bytes for each matrix of a window, besides its numbers: factors, correction and certificate are tensors of their own.
_RESULT_MEMORY = 12288
#: GPU memory of the context with its libraries; and of temporary tensors of the certificate and of the lossless arithmetic, per
#: worker.
_GPU_BASE_MEMORY = 1 << 30
_GPU_BLOCK_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that one target needs while it is worked on, in bytes.

    Attributes:
        key, shape: of the target and of its tensor, for messages.
        file: the weight file that it is in.
        held: bytes of it that are read at a time.
        working: further memory of a worker: of the host or, on a GPU, of the GPU.
        matrix: bytes of one matrix.
        count, stored: how many matrices it has, and the bytes of one of them in the file.
        together: how many matrices the workers of a CPU solve in one batch.
    """

    key: str
    shape: Sequence[int]
    file: str
    held: int
    working: int
    matrix: int
    count: int
    stored: int
    together: int = 1


def share_out(
    needs: Sequence[Need],
    resources: Resources,
    *,
    kept: int = 0,
    windows: Windows = "alone",
    longest: int | None = None,
) -> Memory:
    """As many workers and readers as there are cores and memory for, with the size of windows and buffers.

    Only the size of windows changes the bits of a result: it follows from the needs, the kind of device and its memory, and not
    from what is free or how many cores there are.

    Args:
        needs: of all targets of the run.
        resources: what the run may use.
        kept: host memory that it needs besides, in bytes.
        windows: what windows are for.
        longest: bytes of the largest weight file, of which a window is a part; None where that does not matter.

    Raises:
        OptionError: a strict limit is too small for one matrix at a time.
    """
    sharing = _Sharing(needs, resources, kept, windows, longest)
    choices = list(sharing.choices())
    least = min(memory.peak_bytes for memory in choices)
    if resources.strict and resources.memory is not None and least > resources.memory:
        largest = max(needs, key=lambda need: need.held + need.working)
        raise OptionError(
            "the memory allowed is too small for one matrix at a time",
            got=_told(resources.memory, round),
            expected=f"at least {_told(least, math.ceil)}, for {largest.key} {list(largest.shape)}",
            hint="allow more with --max-memory",
        )
    fits = (memory for memory in choices if _fits_host(memory, resources) and _fits_device(memory, resources))
    # A GPU that is too full is used all the same: what does not fit is done on the CPU.
    return next(fits, next((memory for memory in reversed(choices) if _fits_host(memory, resources)), choices[-1]))


def _told(n_bytes: int, rounded: Callable[[float], int]) -> str:
    """A size in the unit that fits it, rounded to a hundredth of that; it can be given to --max-memory."""
    unit, name = next(((unit, name) for unit, name in _UNITS if n_bytes >= unit), _UNITS[-1])
    return f"{rounded(100 * n_bytes / unit) / 100:.10g} {name}"


def batch_limit(matrix_bytes: int, window_bytes: int) -> int:
    """How many matrices of so many bytes a GPU solves together at most, out of a window of so many bytes."""
    return max(1, min(_GPU_BATCH, window_bytes // 2 // matrix_bytes))


def _fits_host(memory: Memory, resources: Resources) -> bool:
    return resources.memory is None or memory.peak_bytes <= resources.memory


def _fits_device(memory: Memory, resources: Resources) -> bool:
    limits = [limit for limit in (resources.device_memory, resources.device_free) if limit is not None]
    return memory.device_bytes <= min(limits, default=memory.device_bytes)


@dataclass(frozen=True, slots=True)
class _Sharing:
    """What ``share_out`` chooses from; attributes are its arguments."""

    needs: Sequence[Need]
    resources: Resources
    kept: int
    windows: Windows
    longest: int | None

    @property
    def on_gpu(self) -> bool:
        return self.resources.device == "cuda"

    @property
    def resident(self) -> bool:
        """Whether the pieces of a window lie on a GPU."""
        return self.on_gpu and self.windows == "resident"

    def choices(self) -> Iterator[Memory]:
        """All that may be chosen, the fastest first, that with the least memory last."""
        window = self._window()
        cores = max(1, self.resources.cores // self.resources.lanes)
        workers, readers = cores, 1
        if self.on_gpu:
            workers = min(cores, _GPU_WORKERS_ALONE if self.windows == "alone" else _GPU_WORKERS)
            readers = max(1, min(_MOST_READERS, cores // _CORES_PER_READER))
        elif self.resources.device == "mps":
            workers = 1
        pairs = product(range(1, workers + 1), range(1, readers + 1))
        # The more the better, and of both.
        for some, at_a_time in sorted(pairs, key=lambda pair: (sum(pair), -abs(pair[0] - pair[1])), reverse=True):
            ring = RING_BYTES
            while self.resident and ring >= LEAST_RING_BYTES:
                yield self._memory(some, at_a_time, window, ring)
                ring //= 2
            if not self.resident:
                yield self._memory(some, at_a_time, window, 0)

    def _window(self) -> int:
        if not self.on_gpu or self.windows == "alone":
            return CPU_WINDOW_BYTES
        window = RESIDENT_WINDOW_BYTES if self.resident else GPU_WINDOW_BYTES
        if self.resources.device_memory is not None:
            readers = 2 if self.resident else 1  # a second one is worth more than longer windows
            while window > CPU_WINDOW_BYTES and self._device_bytes(1, readers, window) > self.resources.device_memory:
                window //= 2
        return window

    def _held(self) -> int:
        """Bytes of the largest piece."""
        return max([CHUNK_BYTES, *(need.held for need in self.needs)])

    def _unit(self, window: int) -> int:
        """Bytes of the longest window, which ends with the piece that makes it reach its size."""
        unit = window + self._held()
        return min(unit, max(self.longest, self._held())) if self.resident and self.longest is not None else unit

    def _pieces(self, workers: int, readers: int, window: int) -> int:
        """Bytes of the pieces between the readers and the writers of a device."""
        # A window for each worker and one that each reader makes, so that no two readers wait for each other; where others are
        # written meanwhile, one more; and the piece being read.
        more = 1 if readers > 1 or self.resident else 0
        return (workers + readers + more) * self._unit(window) + self._held()

    def _memory(self, workers: int, readers: int, window: int, ring: int) -> Memory:
        unit, pieces = self._unit(window), self._pieces(workers, readers, window)
        work = max([0, *(need.working * (1 if self.on_gpu else need.together) for need in self.needs)])
        # Results that wait to be written besides the window itself: corrections, where a weight has two bytes or more. What
        # small matrices take whatever their size is counted below.
        left = int(unit * CORRECTION_BYTES / 2) + _BLOCK_MEMORY
        files: dict[str, list[Need]] = {}
        for need in self.needs:
            files.setdefault(need.file, []).append(need)
        results = (workers + readers) * max((_most_in(unit, some) for some in files.values()), default=0) * _RESULT_MEMORY
        results += readers * max(map(len, files.values()), default=0) * _UNFINISHED_MEMORY
        # With a GPU one working set on the host as well, for a matrix that does not fit into the memory of the GPU; then it is
        # brought back if it lies there.
        at_work = workers * left + (work if self.on_gpu else workers * work)
        if self.resident:  # corrections are encoded when the worker has gone on
            at_work += left + self._held()
        buffers = 0 if self.resident else pieces
        streams = readers * _OPEN_FILES * STREAM_MEMORY
        return Memory(
            workers,
            window,
            buffers,
            _BASE_MEMORY + self.resources.lanes * (buffers + ring + at_work + results + streams) + self.kept,
            self._device_bytes(workers, readers, window) if self.on_gpu else 0,
            readers,
            pieces if self.resident else 0,
            ring,
        )

    def _device_bytes(self, workers: int, readers: int, window: int) -> int:
        """Bytes of a GPU that a run needs."""
        one = 0
        for need in self.needs:
            count = 1 if self.windows == "alone" else batch_limit(need.matrix, window)
            # The matrices, once more as a batch, and what the arithmetic needs.
            one = max(one, count * (2 * need.matrix + need.working))
        # Quantized weights of a window are computed there, all at once.
        grown = max((need.matrix / need.stored for need in self.needs if need.matrix > need.stored), default=0)
        one += int(grown * self._unit(window)) if self.resident else 0
        return (
            _GPU_BASE_MEMORY
            + workers * (one + _GPU_BLOCK_MEMORY)
            + (self._pieces(workers, readers, window) if self.resident else 0)
        )


def _most_in(window: int, needs: Sequence[Need]) -> int:
    """The most matrices of one file that a window of so many bytes can hold: its smallest ones."""
    most = 0
    for need in sorted(needs, key=lambda need: need.stored):
        taken = min(need.count, window // need.stored)
        if taken == 0:
            break
        most += taken
        window -= taken * need.stored
    return most
