"""Choosing the device that linear algebra runs on, what to do when its memory is full, and what a caller cannot change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from surgery.arguments import checked, spelled_out
from surgery.arithmetic import exact_arithmetic
from surgery.errors import OptionError, naming_system_errors
from surgery.installation import check_installation
from surgery.progress import heard, note

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_Arguments = ParamSpec("_Arguments")


def choose_device(name: str) -> torch.device:
    """The device a user means: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        OptionError: no such device, here or at all.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError("unknown device", got=repr(name), expected="auto, cpu, cuda, cuda:N or mps") from None
    usable = {
        "cpu": device.index in (None, 0),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in usable:
        raise OptionError("unknown device", got=repr(name), expected="auto, cpu, cuda, cuda:N or mps")
    if not usable[device.type]:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise OptionError(f"device {name} is not there", got=f"{count} CUDA devices", hint="--device auto takes what there is")
    return device


def choose_devices(name: str) -> list[torch.device]:
    """The devices a user means: as for ``choose_device``, several with commas between, or ``all`` CUDA devices.

    Raises:
        OptionError: one is not there, is named twice, or is of another kind than the others.
    """
    if name == "all":
        if not torch.cuda.is_available():
            raise OptionError("there is no CUDA device", got="--device all", hint="--device auto takes what there is")
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = [choose_device(part.strip()) for part in name.split(",")]
    numbered = {device for device in devices if device.type == "cuda" and device.index is not None}
    if len(devices) > 1 and len(numbered) < len(devices):
        raise OptionError("these devices do not go together", got=name, expected="different CUDA devices: cuda:0,cuda:1")
    return devices


def device_name(device: torch.device) -> str:
    """For the manifest: the kind of device, with what its results depend on, the model of a GPU."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def as_memory_allows(
    work: Callable[[Sequence[_In], torch.device], list[_Out]], items: Sequence[_In], device: torch.device
) -> list[_Out]:
    """``work(items, device)``, in halves where a GPU has not the memory for all at once.

    What does not fit alone is done on the CPU, with a note: a full GPU costs time, never the run.
    """
    if device.type == "cpu":
        return work(items, device)
    try:
        return work(items, device)
    except RuntimeError as error:
        if not _is_full(error):
            raise
        # First leave the frames behind that hold on to the memory.
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) > 1:
        half = len(items) // 2
        return as_memory_allows(work, items[:half], device) + as_memory_allows(work, items[half:], device)
    note(f"{device} has not enough free memory for every matrix: the largest are done on the CPU")
    return work(items, torch.device("cpu"))


def on_its_own_terms(function: Callable[_Arguments, _Out]) -> Callable[_Arguments, _Out]:
    """For what users call.

    Its arguments are of the kinds that its signature says (``surgery.arguments``). Tensors made without a device are on the
    CPU, whatever the caller's default device is. Arithmetic is exact, see ``exact_arithmetic``. And what the system says of a
    file is one of our errors. Its progress and notes reach whoever listens, see ``heard``. Where its keywords are unpacked,
    ``help`` shows each of them, see ``spelled_out``.
    """
    call: Callable[..., _Out] = function

    @functools.wraps(function)
    def wrapped(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Out:
        check_installation()
        fitting, named = checked(function, arguments, options)
        with naming_system_errors(), exact_arithmetic():
            if torch.get_default_device().type == "cpu":  # the context costs each operation a call
                return call(*fitting, **named)
            with torch.device("cpu"):
                return call(*fitting, **named)

    if (signature := spelled_out(function)) is not None:
        wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return heard(wrapped)


def _is_full(error: RuntimeError) -> bool:
    """Whether an error is that of a full GPU: torch's own, or that of a library without room for its workspace."""
    signs = ("out of memory", "ALLOC_FAILED", "CUSOLVER_STATUS_INTERNAL_ERROR")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
