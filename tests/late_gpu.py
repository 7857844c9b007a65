"""The pretended device of ``tests/pretend_gpu.py``, whose work is done as late as the rules of CUDA allow.

Each stream is a queue. An operation allocates its result, poisoned (NaN, 77), and waits in the queue of the current stream.
Copies from pinned memory read it, and copies to the host write it, when their turn comes: when the program waits for that
stream, or for one that was told to wait for it. So what hardware does now and then happens always. Who reads a result too early
finds poison, who lends a pinned buffer again too early has other bytes copied.

What two streams, or a stream and the host, do to the same bytes in no order is a ``Race``, told where the second of them is
asked for: also the use of memory that was given back to the allocator of one stream while another is not done with it.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.pretend_gpu import OnGpu, asked_for, installed, launches, new_log, refuse_a_mix, waits

#: Results that are views of arguments, of which the schema does not tell.
_VIEWS = {"aten::_unsafe_view", "aten::_reshape_alias"}


class Race(AssertionError):
    """Two uses of the same memory, of which one writes, in no order."""


@dataclass(slots=True)
class _Use:
    """Bytes ``low`` to ``high`` of an allocation, used by a stream's entry number ``turn``."""

    low: int
    high: int
    stream: Stream
    turn: int
    writes: bool


class _Memory:
    """One allocation, of a device or of the host, with the uses that have not been done."""

    def __init__(self, gpu: _LateGpu, owner: Stream | None) -> None:
        self.uses: list[_Use] = []
        self.recorded: set[Stream] = set()
        self._gpu, self._owner = gpu, owner

    def expect_no_other(self, tensor: torch.Tensor, stream: Stream | None, *, writes: bool) -> None:
        """Raise Race if another stream than this one (None: any, for the host) may be at work on the same bytes."""
        low, high = _span(tensor)
        for use in self.uses:
            if use.low < high and low < use.high and (use.writes or writes) and not use.stream.comes_before(stream, use.turn):
                kinds = ["writes" if kind else "reads" for kind in (use.writes, writes)]
                raise Race(f"one stream {kinds[0]}, and {'the host' if stream is None else 'another'} {kinds[1]}, in no order")

    def is_used(self, tensor: torch.Tensor) -> bool:
        """Whether something has yet to be done with these bytes."""
        low, high = _span(tensor)
        return any(use.low < high and low < use.high and use.turn > use.stream.done for use in self.uses)

    def used(self, tensor: torch.Tensor, stream: Stream, *, writes: bool) -> None:
        """Note the use that the next entry of a stream makes of a tensor."""
        low, high = _span(tensor)
        self.uses = [
            use
            for use in self.uses
            if use.turn > use.stream.done
            and not (use.stream is stream and low <= use.low and use.high <= high and (writes or not use.writes))
        ]
        self.uses.append(_Use(low, high, stream, stream.turn + 1, writes))

    def __del__(self) -> None:
        # The allocator gives the memory to whoever asks next in the owner's stream.
        owner = self._owner
        if owner is not None and any(
            not use.stream.comes_before(owner, use.turn) and use.stream not in self.recorded for use in self.uses
        ):
            self._gpu.freed_too_early = True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of a storage from a tensor's first to its last entry."""
    if tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    length = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return start, start + length * size


class Stream:
    """What is used of ``torch.cuda.Stream``.

    Attributes:
        turn: the number of the last entry.
        done: of the last that has been done.
    """

    def __init__(self, device: Any = None, priority: int = 0, *, gpu: _LateGpu) -> None:
        self.device = torch.device("cuda", gpu.index_of(device))
        self.turn = self.done = 0
        self._gpu = gpu
        self._queue: collections.deque[tuple[int, Callable[[], object]]] = collections.deque()
        self._behind: dict[Stream, int] = {}  # how far others have come before what is asked of this one now begins
        gpu.streams.append(self)

    def later(self, call: Callable[[], object], read: Sequence[_Tensor] = (), written: Sequence[_Tensor] = ()) -> None:
        """Add an entry to the queue.

        Raises:
            Race: what it reads or writes is used by another stream, without an order between the two.
        """
        with self._gpu.lock:
            uses = [(tensor, writes) for tensors, writes in ((read, False), (written, True)) for tensor in tensors]
            for (memory, tensor), writes in uses:
                memory.expect_no_other(tensor, self, writes=writes)
            for (memory, tensor), writes in uses:
                memory.used(tensor, self, writes=writes)
            self.turn += 1
            self._queue.append((self.turn, call))
            if self._gpu.over:
                self.run()

    def run(self, to: int | None = None) -> None:
        """Do what waits, up to and with one entry."""
        with self._gpu.lock:
            while self._queue and (to is None or self._queue[0][0] <= to):
                turn, call = self._queue.popleft()
                call()
                self.done = turn

    def comes_before(self, other: Stream | None, turn: int) -> bool:
        """Whether an entry is done before anything that another stream (None: the host) is asked for from now on."""
        return other is self or turn <= max(self.done, 0 if other is None else other._behind.get(self, 0))

    def synchronize(self) -> None:
        self._gpu.log["syncs"] += 1
        with _disable_current_modes():
            self.run()

    def query(self) -> bool:
        return not self._queue

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(gpu=self._gpu) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def wait_for(self, stream: Stream, turn: int, behind: dict[Stream, int]) -> None:
        """Begin what is asked for from now on when another stream has done an entry, and all that this one waited for."""
        with self._gpu.lock:
            for other, its in {**behind, stream: turn}.items():
                self._behind[other] = max(self._behind.get(other, 0), its)
            self.later(lambda: stream.run(turn))

    @property
    def behind(self) -> dict[Stream, int]:
        return dict(self._behind)


class Event:
    """What is used of ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, *, gpu: _LateGpu) -> None:
        self._gpu = gpu
        self._at: tuple[Stream, int, dict[Stream, int]] | None = None
        self._asked = False

    def record(self, stream: Stream | None = None) -> None:
        stream = self._gpu.current_stream() if stream is None else stream
        self._at, self._asked = (stream, stream.turn, stream.behind), False

    def wait(self, stream: Stream | None = None) -> None:
        if self._at is not None:
            (self._gpu.current_stream() if stream is None else stream).wait_for(*self._at)

    def synchronize(self) -> None:
        self._gpu.log["syncs"] += 1
        if self._at is not None:
            stream, turn, _ = self._at
            with _disable_current_modes():
                stream.run(turn)

    def query(self) -> bool:
        """Whether it has been reached: not when it is asked for the first time, but who asks again will see it."""
        if self._at is None or self._at[1] <= self._at[0].done:
            return True
        if self._asked:
            with _disable_current_modes():
                self._at[0].run(self._at[1])
        again, self._asked = self._asked, True
        return again

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class OnLateGpu(OnGpu):
    """A tensor of the late device."""

    memory: _Memory
    gpu: _LateGpu

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.memory.recorded.add(stream)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnLateGpu)]
        return ours[0].gpu.run(func, args, kwargs or {})


_Tensor = tuple[_Memory, torch.Tensor]


@dataclass(eq=False)
class _LateGpu:
    """The devices of one ``late_gpu``."""

    log: dict[str, int]
    fault: Callable[[str], BaseException | None]
    streams: list[Stream] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    over: bool = False
    freed_too_early: bool = False

    def __post_init__(self) -> None:
        self._pinned: dict[int, torch.Tensor] = {}  # kept, so that no other memory gets its address
        self._host: dict[int, _Memory] = {}
        self._default: dict[int, Stream] = {}
        self._here = threading.local()

    def index_of(self, device: Any) -> int:
        return device if isinstance(device, int) else (torch.device("cuda" if device is None else device).index or 0)

    def expect_no_fault(self, kind: str) -> None:
        """Raise what has been planted for this operation."""
        if (error := self.fault(kind)) is not None:
            raise error

    def expect_kept(self) -> None:
        """Raise Race if memory has been lent again too early."""
        if self.freed_too_early:
            self.freed_too_early = False
            raise Race("memory was given back while a stream that it was not made in, and not recorded for, has yet to use it")

    def new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.expect_no_fault("stream")
        return Stream(device, priority, gpu=self)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index_of(device)
        return self._streams_here().get(index) or self.default_stream(index)

    def default_stream(self, device: Any = None) -> Stream:
        index = self.index_of(device)
        if index not in self._default:
            self._default[index] = Stream(index, gpu=self)
        return self._default[index]

    @contextlib.contextmanager
    def stream(self, chosen: Stream | None) -> Iterator[None]:
        """Work is asked of this stream, in this thread."""
        here = self._streams_here()
        before = dict(here)
        if chosen is not None:
            here[self.index_of(chosen.device)] = chosen
        try:
            yield
        finally:
            here.clear()
            here.update(before)

    def _streams_here(self) -> dict[int, Stream]:
        if not hasattr(self._here, "streams"):
            self._here.streams = {}
        streams: dict[int, Stream] = self._here.streams
        return streams

    def synchronize(self, device: Any = None) -> None:
        self.log["syncs"] += 1
        with _disable_current_modes():
            for stream in self.streams:
                if device is None or stream.device.index == self.index_of(device):
                    stream.run()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: at once on the CPU, later on the device."""
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnLateGpu)]
        name = func.name()
        there = asked_for(kwargs, ours)
        if name == "aten::copy_":
            there = args[0].device if isinstance(args[0], OnLateGpu) else None
        if not ours and there is None:
            return self._on_host(func, args, kwargs, tensors)
        refuse_a_mix(name, tensors)
        self.expect_no_fault("to the host" if name == "aten::_to_copy" and there is None else name)
        self.expect_kept()
        with self.lock:
            return self._on_device(func, args, kwargs, there)

    def _on_device(self, func: Any, args: Any, kwargs: dict[str, Any], there: torch.device | None) -> Any:
        """An operation of which a tensor is on a device; ``there``: its result, None for the CPU."""
        flat, form = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, OnLateGpu)]
        name = func.name()
        stream = self.current_stream(ours[0].device if there is None else there)
        if there is not None:
            self.log["calls"] += 1
            self.log["launches"] += launches(func)
        synchronous = waits(func, args, kwargs)
        self.log["syncs"] += synchronous
        if (name == "aten::copy_" and len(ours) == 1) or (name == "aten::_to_copy" and bool(ours) != (there is not None)):
            return self._crossing(func, args, kwargs, there, stream)
        # Numbers of the CPU go along as they are now.
        inner = [x.inner if isinstance(x, OnLateGpu) else x.clone() if isinstance(x, torch.Tensor) else x for x in flat]
        plain_args, plain = tree_unflatten(inner, form)
        if "device" in plain:
            plain["device"] = torch.device("cpu")
        read = [(x.memory, x.inner) for x in ours]
        if written := _written(func, args, kwargs):
            stream.later(lambda: func(*plain_args, **plain), read, [(x.memory, x.inner) for x in written])
            return None if not func._schema.returns else written[0] if len(func._schema.returns) == 1 else tuple(written)
        if _is_view(func):
            return self._wrapped(func(*plain_args, **plain), ours[0].device, stream, ours)
        described = None if synchronous else _described(func, plain_args, plain)
        if described is None:  # its size, or an error, depends on what is in the tensors
            self._expect_idle(read, stream)
            return self._wrapped(func(*plain_args, **plain), there, stream, ())
        self._expect_room([x for x in tree_flatten(described)[0] if isinstance(x, torch.Tensor)])
        results = tree_map(lambda x: _poisoned(x) if isinstance(x, torch.Tensor) else x, described)
        wrapped = self._wrapped(results, there, stream, ())
        if "empty" not in name:
            made = [x for x in tree_flatten(wrapped)[0] if isinstance(x, OnLateGpu)]
            targets = [x.inner for x in made]

            def compute() -> None:
                values = [x for x in tree_flatten(func(*plain_args, **plain))[0] if isinstance(x, torch.Tensor)]
                for target, value in zip(targets, values, strict=True):
                    target.copy_(value)

            stream.later(compute, read, [(x.memory, x.inner) for x in made])
        return wrapped

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]) -> Any:
        """An operation of the CPU alone.

        Raises:
            Race: it uses what a copy from or to the device has yet to read or to write.
        """
        name = func.name()
        if name == "aten::is_pinned":
            return _place(args[0]) in self._pinned
        if kwargs.get("pin_memory") or name == "aten::_pin_memory":
            self.expect_no_fault("pin")
            plain = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "device")}
            return self._pin(args[0].clone() if name == "aten::_pin_memory" else func(*args, **plain))
        if self._host and not _is_view(func):
            written = _written(func, args, kwargs)
            for tensor in tensors:
                self._expect_free(tensor, writes=any(tensor is x for x in written))
        return func(*args, **kwargs)

    def _expect_free(self, tensor: torch.Tensor, *, writes: bool) -> None:
        """Raise Race if a copy has yet to use this memory of the host."""
        with self.lock:
            if (memory := self._host.get(_place(tensor))) is not None:
                memory.expect_no_other(tensor, None, writes=writes)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned[_place(tensor)] = tensor.detach()
        self.log["pinned"] += tensor.untyped_storage().nbytes()
        return tensor

    def _crossing(self, func: Any, args: Any, kwargs: dict[str, Any], there: torch.device | None, stream: Stream) -> Any:
        """A copy from the host to the device, or back."""
        into = args[0] if func.name() == "aten::copy_" else None
        source = args[0] if into is None else args[1]
        at_once = waits(func, args, kwargs)
        dtype = kwargs.get("dtype") or source.dtype
        if there is not None:
            lent = source
            if at_once or _place(source) not in self._pinned:  # it is waited for, or goes by way of the driver's own memory
                self._expect_free(source, writes=False)
                lent = source.clone()
            if into is None:
                like = torch.empty_like(lent, dtype=dtype, device="meta")
                self._expect_room([like])
                into = self._wrapped(_poisoned(like), there, stream, ())
            inner = into.inner
            reads = [(self._host_memory(lent), lent)] if lent is source else []
            stream.later(lambda: inner.copy_(lent), reads, [(into.memory, inner)])
            if at_once:
                stream.run()
            return into
        inner = source.inner
        if at_once:
            self._expect_idle([(source.memory, inner)], stream)
            if into is None:
                return inner.to(dtype, copy=True)
            self._expect_free(into, writes=True)
            return into.copy_(inner)
        # torch pins what it makes for such a copy.
        target = self._pin(_poisoned(torch.empty_like(inner, dtype=dtype, device="meta"))) if into is None else into
        memory = self._host_memory(target)
        if not memory.is_used(target):
            _poison(target)
        stream.later(lambda: target.copy_(inner), [(source.memory, inner)], [(memory, target)])
        return target

    def _host_memory(self, tensor: torch.Tensor) -> _Memory:
        with self.lock:
            self._host = {
                place: memory for place, memory in self._host.items() if any(use.turn > use.stream.done for use in memory.uses)
            }
            return self._host.setdefault(_place(tensor), _Memory(self, None))

    def _expect_idle(self, read: Sequence[_Tensor], stream: Stream) -> None:
        """Do what waits in a stream; raise Race if another has yet to write what is read."""
        stream.run()
        with self.lock:
            for memory, tensor in read:
                memory.expect_no_other(tensor, stream, writes=False)

    def _expect_room(self, made: Sequence[torch.Tensor]) -> None:
        if "largest" in self.log and any(x.untyped_storage().nbytes() > self.log["largest"] for x in made):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def _wrapped(self, found: Any, device: torch.device | None, stream: Stream, bases: Sequence[OnLateGpu]) -> Any:
        """Tensors of the device; those within the memory of a base share it."""

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or device is None:
                return x
            made = OnLateGpu(x, device)
            shared = [base.memory for base in bases if _place(base.inner) == _place(x)]
            made.memory, made.gpu = shared[0] if shared else _Memory(self, stream), self
            return made

        return tree_map(wrapped, found)


def _is_view(func: Any) -> bool:
    return func.name() in _VIEWS or any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    value = float("nan") if tensor.is_floating_point() else tensor.dtype == torch.bool or 77
    return tensor.fill_(value)


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    return _poison(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype))


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operation writes to, of those it is given."""
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments[len(args) :] if argument.name in kwargs]
    values = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]


def _described(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The results of an operation without their entries, on the meta device; None where it is not known there."""
    args, kwargs = tree_map(
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x,
        (args, kwargs),
    )
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        return None


@contextlib.contextmanager
def late_gpu(
    *,
    cards: Sequence[str] = ("Pretended",),
    fault: Callable[[str], BaseException | None] = lambda kind: None,
    **limits: int,
) -> Iterator[dict[str, int]]:
    """CUDA devices as of ``pretend_gpu``, whose work is done late.

    Args:
        cards: the model of each.
        fault: called with the name of each operation on a device, but with ``to the host`` for a new copy there, with ``pin``
            for each pinned allocation and with ``stream`` for each stream; the error that it gives is raised in its place.
        limits: ``largest``, bytes beyond which an allocation fails.

    Returns:
        The counts of ``pretend_gpu``, and ``pinned``: bytes of host memory that were pinned.

    Raises:
        Race: from the operation that is in no order with an earlier one.
    """
    log = {**new_log(), "pinned": 0, **limits}
    gpu = _LateGpu(log, fault)
    cuda = {
        "Stream": gpu.new_stream,
        "Event": lambda enable_timing=False, blocking=False: Event(enable_timing, blocking, gpu=gpu),
        "current_stream": gpu.current_stream,
        "default_stream": gpu.default_stream,
        "stream": gpu.stream,
        "synchronize": gpu.synchronize,
    }
    with installed(gpu.run, cuda, cards):
        try:
            yield log
            gpu.synchronize()
            gpu.expect_kept()
        finally:
            gpu.over = True  # what is done with tensors that are left is done at once
