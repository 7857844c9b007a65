"""A CUDA device that is none: its tensors lie in host memory, but nothing takes them for tensors of the CPU.

What a real device refuses is refused here as well: operations on tensors of two devices, NumPy views of its memory. What only a
real one can show (races between streams, pinned copies, its own rounding, its speed) is not seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
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
_COPIES = ("aten::_to_copy", "aten::copy_")


class OnGpu(torch.Tensor):
    """A tensor whose device is the pretended one; ``inner`` has its entries."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        tensor: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=GPU,
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
    if name in _COPIES:
        sides = [args[0], args[1]] if name == "aten::copy_" else [args[0], kwargs.get("device") or args[0].device]
        there = [isinstance(x, OnGpu) if isinstance(x, torch.Tensor) else torch.device(x).type == "cuda" for x in sides]
        at_once = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        return there[0] != there[1] and not at_once
    by_mask = name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_") and any(
        isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1]
    )
    return by_mask or name.split(".")[0] in _WAITING


def _run(func: Any, args: Any, kwargs: dict[str, Any], log: dict[str, int]) -> Any:
    """One operation, where its tensors are. ``log``: see ``pretend_gpu``."""
    flat, form = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGpu)]
    name = func.name()
    asked = kwargs.get("device")
    there = (torch.device(asked).type == "cuda") if asked is not None else bool(ours)
    if (ours or there) and waits(func, args, kwargs):
        log["syncs"] += 1
    if ours and name not in _COPIES:
        # A number may lie on the CPU.
        strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]
        if strangers:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    if name == "aten::copy_":
        there = isinstance(args[0], OnGpu)
    inside = [x.inner if isinstance(x, OnGpu) else x for x in flat]
    plain_args, plain = tree_unflatten(inside, form)
    if asked is not None:
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    result = func(*plain_args, **plain)
    if not there:
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
        return known[id(x)] if id(x) in known else OnGpu(x)  # what was written in place stays what it was

    return tree_map(wrapped, result)


class _Mode(TorchDispatchMode):
    """Of one thread."""

    def __init__(self, log: dict[str, int]) -> None:
        super().__init__()
        self._log = log

    def __enter__(self) -> Self:
        # torch.tensor(..., device=...) makes its tensor on the CPU and moves it.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self._log)


class _Stream:
    def __init__(self, device: object = None) -> None: ...

    def synchronize(self) -> None: ...


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
def _nothing(*_: object) -> Iterator[None]:
    yield


@contextmanager
def pretend_gpu(**limits: int) -> Iterator[dict[str, int]]:
    """One CUDA device, ``cuda:0``, in this thread and all that begin meanwhile.

    Args:
        limits: ``largest``, bytes beyond which an allocation fails.

    Returns:
        Counts, which go on while the device is there: ``calls``, operations on it; ``launches``, those of them that are neither
        views nor allocations; ``syncs``, how often the program has waited for it.
    """
    log = {**new_log(), **limits}
    run = threading.Thread.run

    def run_with_mode(thread: threading.Thread) -> None:
        with _Mode(log):
            run(thread)

    _set_guard()
    memory = SimpleNamespace(total_memory=16 << 30)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(threading.Thread, "run", run_with_mode)
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: "Pretended",
            "get_device_properties": lambda device=None: memory,
            "set_per_process_memory_fraction": lambda *_: None,
            "mem_get_info": lambda *_: (8 << 30, 16 << 30),
            "empty_cache": lambda: None,
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": _nothing,
            "device": _nothing,
        }.items():
            patch.setattr(torch.cuda, name, value)
        stack.enter_context(_Mode(log))
        yield log
