"""The Ray engine: does the jobs of a run as tasks of Ray, on this machine or on a cluster.

A task is run again when its process or its machine is lost. Nothing else is lost with it, since jobs are idempotent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from surgery.arithmetic import exact_arithmetic
from surgery.device import choose_device, device_name
from surgery.engine.device_memory import free_memory, limited, total_memory
from surgery.engine.lane import Lane
from surgery.engine.resources import Memory
from surgery.errors import ClusterError, MissingExtra, OptionError, SurgeryError
from surgery.progress import Progress, Silent, heard, note
from surgery.solvers.processor import processor
from surgery.timing import Seconds, Timing

#: How often Ray repeats a task after its process or its machine is lost, or after a network error or a timeout.
_RETRIES = 5

_Result = TypeVar("_Result")
_Result_co = TypeVar("_Result_co", covariant=True)


class RemoteJob(Protocol[_Result_co]):
    """The job of one shard, which can be sent to another process and done there.

    Attributes:
        needs_like_machines: whether the bytes of its result depend on device and processor.
    """

    @property
    def needs_like_machines(self) -> bool: ...

    def __call__(self, lane: Lane, attempt: str, /) -> _Result_co:
        """Do the job; returns its result, which can be pickled.

        Args:
            lane: of the process that does it.
            attempt: a name for this attempt, unique among all: several attempts at one job may run at the same time.
        """


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the machines of a cluster offer to each task.

    Attributes:
        device: the kind of device that the tasks use: ``cuda`` or ``cpu``.
        device_name: for the manifest, see ``surgery.device.device_name``.
        processor: of one machine, see ``surgery.solvers.processor``.
        cores: of the smallest machine that can do tasks, divided by its GPUs if these are used.
        memory: bytes of host memory for each task; None if Ray does not say.
        device_memory: bytes of a GPU's memory; None without GPUs.
        device_free: those of them that nobody used, on the GPU that was asked; None without GPUs.
    """

    device: str
    device_name: str
    processor: str
    cores: int
    memory: int | None
    device_memory: int | None
    device_free: int | None


@contextmanager
def connected(device: str) -> Iterator[Cluster]:
    """Connects to a cluster: the one that ``RAY_ADDRESS`` names or that runs here, else a new one of this machine alone.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        MissingExtra: Ray is not installed.
        OptionError: Ray gives no such device.
        ClusterError: the cluster cannot be reached, or has no such device or nothing to work on.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError("Ray places tasks by itself", got=f"--device {device}", expected="auto, cpu or cuda")
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except Exception as error:  # Ray raises a bare Exception where a cluster of this machine does not start in time
            raise ClusterError(
                "the Ray cluster cannot be reached, or started on this machine",
                got=str(error)[:300],
                hint="for a cluster that runs, check RAY_ADDRESS, and that ray status works here; "
                "for one of this machine, end other programs and try again, or leave --engine ray out",
            ) from error
    try:
        yield _cluster(ray, device)
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("--engine ray needs Ray", hint="pip install 'ray>=2.60'") from error
    return ray


def _cluster(ray: Any, device: str) -> Cluster:
    """What the machines of a connected cluster offer. Raises ClusterError if that is too little."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not with_gpu:
        raise ClusterError(
            "the Ray cluster has no GPU", got=f"{len(nodes)} machines", hint="--device auto takes CPUs if there is no GPU"
        )
    if not nodes:
        raise ClusterError("the Ray cluster has no CPU to work on", got=f"{len(ray.nodes())} machines")
    if with_gpu and device != "cpu":
        cores = min(max(1, int(node["CPU"] // node["GPU"])) for node in with_gpu)
        described = ray.remote(num_gpus=1, num_cpus=0)(_describe)
        name, its_processor, device_memory, device_free = ray.get(described.remote())
        memory = min(int(node.get("memory", 0) // node["GPU"]) for node in with_gpu)
        return Cluster("cuda", name, its_processor, cores, memory or None, device_memory, device_free)
    cores = min(int(node["CPU"]) for node in nodes)
    memory = min(int(node.get("memory", 0) * cores // node["CPU"]) for node in nodes)
    its_processor = ray.get(ray.remote(num_cpus=1)(_processor).remote())
    return Cluster("cpu", "cpu", its_processor, cores, memory or None, None, None)


def _processor() -> str:
    return processor()


def _describe() -> tuple[str, str, int, int]:
    device = choose_device("cuda")
    return device_name(device), processor(), total_memory([device]), free_memory([device])


def run_remotely(
    jobs: Mapping[int, RemoteJob[_Result]],
    cluster: Cluster,
    memory: Memory,
    max_device_memory: int | None,
    timing: Timing | None,
) -> Generator[tuple[int, _Result], None, None]:
    """Do jobs on a cluster; yields their keys and results, in the order in which they are finished.

    Close the generator to stop early: then tasks that are left are cancelled.

    Args:
        jobs: by key. Each takes as many cores as the smallest machine has; with GPUs, a GPU and its share of them.
        cluster: that ``connected`` gave.
        memory: how each task uses its memory.
        max_device_memory: bytes of a GPU that torch keeps to in each task; None for no limit.
        timing: receives where the time of the tasks went.

    Raises:
        The first error of a job; the others are cancelled.
    """
    ray = _ray()
    task = ray.remote(
        num_cpus=cluster.cores,  # also where the memory is enough for fewer workers: what is left is enough for no other task
        num_gpus=1 if cluster.device == "cuda" else 0,
        max_retries=_RETRIES,
        retry_exceptions=[ConnectionError, TimeoutError],
    )(_run)
    waiting = {task.remote(job, cluster, memory, max_device_memory, timing is not None): key for key, job in jobs.items()}
    try:
        while waiting:
            finished, _ = ray.wait(list(waiting), num_returns=1)
            key = waiting.pop(finished[0])
            done = _result(ray, finished[0])
            for message in done.notes:
                note(message)
            if timing is not None:
                timing.add(done.seconds)
                timing.wall += done.wall
                timing.threads = {"download": 1, "reader": 1, "worker": memory.workers, "writer": 1}
                if cluster.device == "cuda":
                    timing.threads["host"] = cluster.cores
            yield key, done.result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


@dataclass(frozen=True, slots=True)
class _Done(Generic[_Result]):
    """What a task of Ray returns.

    Attributes:
        result: of the job.
        seconds: where its time went.
        wall: seconds from its beginning to its end.
        notes: that it made, for the user.
    """

    result: _Result
    seconds: Seconds
    wall: float
    notes: list[str]


def _result(ray: Any, reference: Any) -> _Done[Any]:
    """What a finished task has returned. Raises the error of its job, or ClusterError if the task is lost."""
    try:
        result: _Done[Any] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SurgeryError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a task has been lost {_RETRIES + 1} times",
            got=f"{type(error).__name__}: {error}"[:300],
            hint="see the logs of Ray; less memory for each task: --max-memory",
        ) from error
    return result


def _run(
    job: RemoteJob[_Result], cluster: Cluster, memory: Memory, max_device_memory: int | None, timed: bool
) -> _Done[_Result]:
    """The body of a task: does one job in a process of Ray.

    Args:
        job: to do.
        cluster: of which this process is one.
        memory: how it is used.
        max_device_memory: bytes of a GPU that torch keeps to; None for no limit.
        timed: whether to measure where the time goes.
    """
    import ray

    context = ray.get_runtime_context()
    attempt = f"{context.get_task_id()}-{context.get_worker_id()}"
    timing = Timing() if timed else None
    said = Silent()
    begun = time.perf_counter()

    @heard
    def do_job(*, progress: Progress) -> _Result:
        device = choose_device(cluster.device)
        if job.needs_like_machines:
            _check_alike(cluster, device_name(device), processor())
        with exact_arithmetic(), limited([device], max_device_memory), Lane(device, memory, timing) as lane:
            return job(lane, attempt)

    result = do_job(progress=said)
    return _Done(result, timing.seconds if timing is not None else {}, time.perf_counter() - begun, said.notes)


def _check_alike(cluster: Cluster, its_device: str, its_processor: str) -> None:
    """Refuse to compute on another kind of machine than the one that the run is recorded as made on."""
    if (its_device, its_processor) != (cluster.device_name, cluster.processor):
        raise ClusterError(
            "the machines of the Ray cluster are not alike, so the last bits of their results would differ",
            got=f"{its_device}, {its_processor}",
            expected=f"{cluster.device_name}, {cluster.processor}, as on the first that was asked",
            hint="remove the other machines from the cluster, or give all of them the same routines (docs/numerics.md)",
        )
