"""Engines, which do the jobs of a run: in this process or on a Ray cluster; and what jobs must offer to them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch

from surgery.device import choose_devices, device_name
from surgery.engine.device_memory import free_memory, limited, total_memory
from surgery.engine.lane import Lane
from surgery.engine.local import JOBS_PER_READER, run_jobs
from surgery.engine.resources import Memory, Resources
from surgery.errors import OptionError
from surgery.memory import available_memory
from surgery.progress import note
from surgery.solvers.processor import processor
from surgery.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable

    from surgery.engine.ray import Cluster, RemoteJob

EngineName = Literal["local", "ray"]

_Result = TypeVar("_Result")
_Result_co = TypeVar("_Result_co", covariant=True)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Which engine a user asks for, on which devices, and with how much memory; the fields are options of ``factorize``."""

    engine: EngineName = "local"
    device: str = "auto"
    max_memory: int | None = None
    max_device_memory: int | None = None
    timing: Timing | None = None


class LocalJobs(Protocol[_Result_co]):
    """Jobs that are done in this process: one for each shard, known by the shard's index."""

    def acquired(self, which: Iterable[int]) -> Iterator[int]:
        """Yield these indices in order, each when the files of its shard are on this machine."""

    def do_shard(self, index: int, lane: Lane, on_read: Callable[[], object], /) -> _Result_co:
        """Do the job of a shard that was yielded by ``acquired``.

        Args:
            index: of the shard.
            lane: the device, threads and memory to do it with.
            on_read: to be called when the shard has been read; the lane then begins with the next one.
        """

    def close(self) -> None:
        """Called when no more jobs will be done: downloads may stop."""


class ShardJobs(LocalJobs[_Result_co], Protocol[_Result_co]):
    """Jobs that can be done in this process or in others."""

    def remote(self, index: int) -> RemoteJob[_Result_co]:
        """The job of a shard as an object that can be sent to another process, where it gets its files by itself."""

    def tell(self, index: int) -> None:
        """Tell the progress that the job of a shard has been done in another process."""


class Engine(Protocol):
    """Does the jobs of a run.

    Attributes:
        resources: devices, cores and memory that a run may use.
        device_name: the kind of device.
        device_and_processor: what the last bits of decompositions depend on, as the manifest records it.
        files_at_a_time: how many weight files are in use at a time.
    """

    resources: Resources
    device_name: str
    device_and_processor: str
    files_at_a_time: int

    def run(self, jobs: ShardJobs[_Result], which: Sequence[int], memory: Memory) -> Generator[tuple[int, _Result], None, None]:
        """Do the jobs of some shards.

        Args:
            jobs: of the run.
            which: indices of the shards.
            memory: how many matrices may be worked on at a time, and in how much memory.

        Returns:
            Yields index and result of each shard, in the order they are finished. To be closed when left early.
        """


class LocalEngine:
    """This process, with one lane for each device."""

    def __init__(
        self, device: str, max_memory: int | None = None, max_device_memory: int | None = None, timing: Timing | None = None
    ) -> None:
        _check_limits(max_memory, max_device_memory)
        self._devices = choose_devices(device)
        self._max_device_memory = max_device_memory
        self._timing = timing
        self.resources = _resources(self._devices, max_memory, max_device_memory)
        self.device_name = device_name(*self._devices)
        self.device_and_processor = f"{self.device_name}, {processor()}"
        if " + " in self.device_name:
            note(
                f"these GPUs are not alike: {self.device_name}. The last bits of factors depend on which of them "
                "does which shard, and this differs from run to run; --device cuda:0 takes one"
            )
        self.files_at_a_time = len(self._devices) + 1

    def run(self, jobs: LocalJobs[_Result], which: Sequence[int], memory: Memory) -> Generator[tuple[int, _Result], None, None]:
        """See ``Engine``."""
        with limited(self._devices, self._max_device_memory):
            if (timing := self._timing) is not None:
                count = len(self._devices)
                readers = count * memory.readers
                workers, writers = count * memory.workers, JOBS_PER_READER * readers
                timing.threads = {"download": 1, "reader": readers, "worker": workers, "writer": writers}
                if self._devices[0].type == "cuda":
                    timing.threads["host"] = os.cpu_count() or 1
                    timing.wait_for_device = lambda: torch.cuda.current_stream().synchronize()
            lanes = [Lane(device, memory, timing) for device in self._devices]
            try:
                with closing(run_jobs(jobs.do_shard, jobs.acquired(which), lanes)) as finished:
                    yield from finished
            finally:
                jobs.close()


class RayEngine:
    """A Ray cluster, with one task for each shard."""

    def __init__(self, cluster: Cluster, max_memory: int | None, max_device_memory: int | None, timing: Timing | None) -> None:
        self._cluster = cluster
        self._timing = timing
        self._max_device_memory = max_device_memory
        device_memory = max_device_memory
        if device_memory is None and cluster.device_memory is not None:
            device_memory = cluster.device_memory * 4 // 5
        memory = cluster.memory if max_memory is None else max_memory
        self.resources = Resources(
            cluster.device, 1, cluster.cores, memory, max_memory is not None, device_memory, cluster.device_free
        )
        self.device_name = cluster.device_name
        self.device_and_processor = f"{cluster.device_name}, {cluster.processor}"
        self.files_at_a_time = 1

    def run(self, jobs: ShardJobs[_Result], which: Sequence[int], memory: Memory) -> Generator[tuple[int, _Result], None, None]:
        """See ``Engine``."""
        from surgery.engine.ray import run_remotely

        remote = {index: jobs.remote(index) for index in which}
        with closing(run_remotely(remote, self._cluster, memory, self._max_device_memory, self._timing)) as finished:
            for index, result in finished:
                jobs.tell(index)
                yield index, result


@contextmanager
def engine_of(options: EngineOptions) -> Iterator[Engine]:
    """Start the engine that a user asks for; a cluster is disconnected when the context is left.

    Raises:
        OptionError: there is no such device, or a limit of memory is no positive number.
        MissingExtra: Ray is not installed.
        ClusterError: the cluster cannot be reached, or has no such device.
    """
    if options.engine == "local":
        yield LocalEngine(options.device, options.max_memory, options.max_device_memory, options.timing)
        return
    _check_limits(options.max_memory, options.max_device_memory)
    from surgery.engine.ray import connected

    with connected(options.device) as cluster:
        yield RayEngine(cluster, options.max_memory, options.max_device_memory, options.timing)


def float64_device(device: str) -> str:
    """The device for float64 arithmetic: the one that a user asks for, but the CPU in place of an Apple GPU, which has none.

    Raises:
        OptionError: there is no such device.
    """
    return "cpu" if choose_devices(device)[0].type == "mps" else device


def _check_limits(max_memory: int | None, max_device_memory: int | None) -> None:
    for limit, value in (("max_memory", max_memory), ("max_device_memory", max_device_memory)):
        if value is not None and value < 1:
            raise OptionError(f"{limit} makes no sense", got=value, expected="a number of bytes, at least 1")


def _resources(devices: Sequence[torch.device], max_memory: int | None, max_device_memory: int | None) -> Resources:
    """What a run on these devices may use: by default half of the free host memory, and four fifths of each GPU's."""
    kind = devices[0].type
    memory, available = max_memory, available_memory()
    if memory is None and available is not None:
        memory = available // 2
    device_memory, free = max_device_memory, None
    if kind == "cuda":
        free = free_memory(devices)
        device_memory = total_memory(devices) * 4 // 5 if device_memory is None else device_memory
    cores = torch.get_num_threads() if kind == "cpu" else os.cpu_count() or 1
    return Resources(kind, len(devices), cores, memory, max_memory is not None, device_memory, free)
