"""A CUDA device that is none: its tensors lie in host memory, but nothing takes them for tensors of the CPU.

What a real device refuses is refused here as well: operations on tensors of two devices, NumPy views of its memory. All it does
is done at once; ``tests/late_gpu.py`` has one that does it as late as a real one may. What only hardware can show (its own
rounding, its speed) is not seen on either.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)

#: Operations whose results a program waits for: their size, or an error, depends on what is in the tensors.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_linalg_check_errors",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::linalg_eig",
    "aten::linalg_lstsq",
}
COPIES = ("aten::_to_copy", "aten::copy_")

#: One operation: called with the function, its arguments and its keywords.
Run = Callable[[Any, Any, dict[str, Any]], Any]
#: What is thrown in place of the n-th operation of a kind, counted from 1: called with kind and n, gives an error or None.
Fault = Callable[[str, int], BaseException | None]


class OnGpu(torch.Tensor):
    """A tensor whose device is a pretended one; ``inner`` has its entries."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = GPU) -> OnGpu:
        tensor: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        tensor.inner = inner
        return tensor

    def tolist(self) -> Any:
        """What torch has for all tensors but those of subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, new_log())


def new_log() -> dict[str, int]:
    """Counts of one device, all zero; see ``pretend_gpu``."""
    return {"calls": 0, "launches": 0, "syncs": 0}


def launches(func: Any) -> bool:
    """Whether an operation on a device has work for it: views and allocations have none."""
    aliased = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    return not aliased and "empty" not in func.name() and func.name() not in ("aten::_unsafe_view", "aten::_local_scalar_dense")


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a program waits in this operation until the device has done all that came before.

    So it does in a copy between device and host, in either direction, that is not asynchronous (``non_blocking``).
    """
    name = func.name()
    if name in COPIES:
        sides = [args[0], args[1]] if name == "aten::copy_" else [args[0], kwargs.get("device") or args[0].device]
        there = [(x.device if isinstance(x, torch.Tensor) else torch.device(x)).type == "cuda" for x in sides]
        at_once = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        return there[0] != there[1] and not at_once
    by_mask = name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_") and any(
        isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1]
    )
    return by_mask or name.split(".")[0] in _WAITING


def asked_for(kwargs: dict[str, Any], ours: Sequence[OnGpu]) -> torch.device | None:
    """The pretended device that an operation's result is on; None for the CPU."""
    asked = kwargs.get("device")
    if asked is None:
        return ours[0].device if ours else None
    asked = torch.device(asked)
    return None if asked.type != "cuda" else torch.device("cuda", asked.index or 0)


def refuse_a_mix(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise what torch raises for an operation on tensors of several devices."""
    places = {
        x.device if isinstance(x, OnGpu) else torch.device("cpu") for x in tensors if x.ndim
    }  # a number may lie on the CPU
    if any(isinstance(x, OnGpu) for x in tensors) and name not in COPIES and len(places) > 1:
        names = " and ".join(sorted(map(str, places)))
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {names}")


def _run(func: Any, args: Any, kwargs: dict[str, Any], log: dict[str, int]) -> Any:
    """One operation, where its tensors are. ``log``: see ``pretend_gpu``."""
    flat, form = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGpu)]
    name = func.name()
    there = asked_for(kwargs, ours)
    if (ours or there) and waits(func, args, kwargs):
        log["syncs"] += 1
    refuse_a_mix(name, tensors)
    if name == "aten::copy_":
        there = args[0].device if isinstance(args[0], OnGpu) else None
    plain_args, plain = tree_unflatten([x.inner if isinstance(x, OnGpu) else x for x in flat], form)
    if "device" in plain:
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    result = func(*plain_args, **plain)
    if there is None:
        return result
    log["calls"] += 1
    log["launches"] += launches(func)
    if "largest" in log:
        memory = [x.untyped_storage() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        there_before = {x.inner.untyped_storage().data_ptr() for x in ours}
        if any(x.nbytes() > log["largest"] and x.data_ptr() not in there_before for x in memory):
            raise torch.OutOfMemoryError("CUDA out of memory")
    known = {id(x.inner): x for x in ours}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else OnGpu(x, there)  # what was written in place stays what it was

    return tree_map(wrapped, result)


class _Mode(TorchDispatchMode):
    """Of one thread."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def __enter__(self) -> Self:
        # torch.tensor(..., device=...) makes its tensor on the CPU and moves it.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._run(func, args, kwargs or {})


@contextmanager
def seen_by(run: Run) -> Iterator[None]:
    """``run`` does each operation, in this thread and all that begin meanwhile."""
    begun = threading.Thread.run

    def run_with_mode(thread: threading.Thread) -> None:
        with _Mode(run):
            begun(thread)

    with pytest.MonkeyPatch.context() as patch, _Mode(run):
        patch.setattr(threading.Thread, "run", run_with_mode)
        yield


def _set_guard() -> None:
    """Let torch switch to the device, which a build without CUDA refuses.

    torch has a guard that does nothing, for fake tensors, and puts it in the place of one that counts no devices. In a build
    without CUDA there is none to replace: here another kind of device lends its own.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda = 1
    for lent in [guard for guard in guards if guard is not None]:
        guards[cuda] = lent
        torch._C._ensureCUDADeviceGuardSet()
        if guards[cuda] != lent:
            return
        guards[cuda] = None
    raise RuntimeError("this build of torch has no guard to lend")


@contextmanager
def installed(run: Run, cuda: Mapping[str, Any], cards: Sequence[str] = ("Pretended",)) -> Iterator[None]:
    """torch sees these CUDA devices, in this thread and all that begin meanwhile.

    Args:
        run: does each operation, on whatever device.
        cuda: what is different in ``torch.cuda``, by name.
        cards: the model of each device.
    """
    _set_guard()
    memory = SimpleNamespace(total_memory=16 << 30, major=9, minor=0)
    fractions = dict.fromkeys(range(len(cards)), 1.0)

    def index_of(device: Any = None) -> int:
        return device if isinstance(device, int) else (torch.device("cuda" if device is None else device).index or 0)

    def set_fraction(fraction: float, device: Any = None) -> None:
        fractions[index_of(device)] = fraction

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: len(cards),
            "current_device": lambda: 0,
            "device": lambda device: contextlib.nullcontext(),
            "get_device_name": lambda device=None: cards[index_of(device)],
            "get_device_properties": lambda device=None: memory,
            "get_device_capability": lambda device=None: (memory.major, memory.minor),
            "set_per_process_memory_fraction": set_fraction,
            "get_per_process_memory_fraction": lambda device=None: fractions[index_of(device)],
            "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
            "empty_cache": lambda: None,
            **cuda,
        }.items():
            patch.setattr(torch.cuda, name, value)
        stack.enter_context(seen_by(run))
        yield


class _AtOnce:
    """A stream, or an event in one, of a device that has done all there is."""

    def __init__(self, device: object = None, **more: object) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    wait = wait_event = wait_stream = record

    def record_event(self, event: _AtOnce | None = None) -> _AtOnce:
        return event or _AtOnce()


@contextmanager
def pretend_gpu(*, cards: Sequence[str] = ("Pretended",), **limits: int) -> Iterator[dict[str, int]]:
    """CUDA devices, ``cuda:0`` and so on, in this thread and all that begin meanwhile.

    Args:
        cards: the model of each.
        limits: ``largest``, bytes beyond which an allocation fails.

    Returns:
        Counts, which go on while the devices are there: ``calls``, operations on them; ``launches``, those of them that are
        neither views nor allocations; ``syncs``, how often the program has waited for one.
    """
    log = {**new_log(), **limits}
    streams = {
        "Stream": _AtOnce,
        "Event": _AtOnce,
        "current_stream": _AtOnce,
        "default_stream": _AtOnce,
        "stream": lambda chosen: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
    }
    with installed(lambda func, args, kwargs: _run(func, args, kwargs, log), streams, cards):
        yield log
