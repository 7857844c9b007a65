"""Choosing the devices for the linear algebra, working within a GPU's memory, and the decorator of all public functions."""

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
    """The device with a name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes the first GPU that computes, and tells a note of those that do not.

    Raises:
        OptionError: there is no such device on this machine, or at all; it is there and does not compute.
    """
    if name == "auto":
        return _first_that_computes()
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
        raise OptionError(
            f"device {name} is not there", got=f"{count} CUDA devices", hint="--device auto takes a device that is there"
        )
    if (reason := _why_not(device)) is not None:
        raise OptionError(f"device {name} does not work", got=reason, hint="--device auto takes one that works")
    return device


def choose_devices(name: str) -> list[torch.device]:
    """The devices with these names: as for ``choose_device``, several with commas between, or ``all`` CUDA devices.

    Raises:
        OptionError: one is not there, does not compute, is named twice, or is of another kind than the others.
    """
    if name == "all":
        if not torch.cuda.is_available():
            raise OptionError("there is no CUDA device", got="--device all", hint="--device auto takes a device that is there")
        return [choose_device(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    devices = [choose_device(part.strip()) for part in name.split(",")]
    numbered = {device for device in devices if device.type == "cuda" and device.index is not None}
    if len(devices) > 1 and len(numbered) < len(devices):
        raise OptionError("these devices cannot be used together", got=name, expected="different CUDA devices: cuda:0,cuda:1")
    return devices


def device_name(*devices: torch.device) -> str:
    """What a run computes on, for the manifest: the kind of its devices, and the models of GPUs, on which results depend."""
    if devices[0].type != "cuda":
        return devices[0].type
    return f"cuda ({' + '.join(sorted({torch.cuda.get_device_name(device) for device in devices}))})"


def as_memory_allows(
    compute: Callable[[Sequence[_In], torch.device], list[_Out]], items: Sequence[_In], device: torch.device
) -> list[_Out]:
    """``compute(items, device)``, split into halves for as long as a GPU has too little memory.

    A single item that does not fit, or that the libraries of a GPU fail at, is computed on the CPU, with a note: that costs
    time, but never ends the run.

    Args:
        compute: gives a result for each item.
        items: in order.
        device: to compute on.

    Returns:
        The results, in the order of the items.
    """
    if device.type == "cpu":
        return compute(items, device)
    try:
        return compute(items, device)
    except RuntimeError as error:
        if (trouble := _trouble(error, device)) is None:
            raise
        # The exception's frames hold tensors on the device, so it has to be left before trying again.
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) > 1:
        half = len(items) // 2
        return as_memory_allows(compute, items[:half], device) + as_memory_allows(compute, items[half:], device)
    note(trouble)
    return compute(items, torch.device("cpu"))


def downloaded(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies on the CPU of tensors of one device, all in one transfer, so that the program waits once; those there as they are.

    Numbers of several dtypes go through one that holds them all: none of these is of more bits than float64 has.
    """
    away = [x for x in tensors if x.device.type != "cpu"]
    if not away:
        return list(tensors)
    together = torch.cat([x.reshape(-1) for x in away]).cpu()
    parts = torch.split(together, [x.numel() for x in away])
    fetched = iter([part.view(x.shape).to(x.dtype) for part, x in zip(parts, away, strict=True)])
    return [x if x.device.type == "cpu" else next(fetched) for x in tensors]


def on_its_own_terms(function: Callable[_Arguments, _Out]) -> Callable[_Arguments, _Out]:
    """Decorator for public functions, which makes them independent of the caller's settings.

    - Arguments are checked and converted by the signature (``surgery.arguments.checked``).
    - Tensors made without a device are on the CPU, whatever the caller's default device is.
    - Arithmetic is exact (``exact_arithmetic``).
    - Errors of the system become ours (``naming_system_errors``).
    - Progress and notes reach whoever listens (``heard``).
    - ``help`` shows each of the keywords that are unpacked (``spelled_out``).
    """
    call: Callable[..., _Out] = function

    @functools.wraps(function)
    def wrapped(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Out:
        check_installation()
        fitting, named = checked(function, arguments, options)
        with naming_system_errors(), exact_arithmetic():
            if torch.get_default_device().type == "cpu":  # the context below slows each operation down
                return call(*fitting, **named)
            with torch.device("cpu"):
                return call(*fitting, **named)

    if (signature := spelled_out(function)) is not None:
        wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return heard(wrapped)


#: What torch's errors say when a GPU's memory is full: its own, and those of libraries, which allocate workspaces, and a handle
#: in each thread that uses them.
_FULL = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED", "CUSOLVER_STATUS_INTERNAL_ERROR")
#: What they say when a library could not do what it was asked for, as decompositions at times do not on a GPU and do on a CPU.
_FAILED = ("CUSOLVER_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")


def _trouble(error: RuntimeError, device: torch.device) -> str | None:
    """A note for an error of a GPU after which fewer matrices at a time, or the CPU, may do; None for all others."""
    if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _FULL):
        return f"{device} has not enough free memory for every matrix: the largest are done on the CPU"
    if is_unsolved(error):
        return f"the solvers of {device} fail for some matrices: these are done on the CPU"
    return None


def is_unsolved(error: RuntimeError) -> bool:
    """Whether a library has failed at a decomposition or a product, and not for want of memory."""
    failed = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # not in its list of names
    return failed or any(sign in str(error) for sign in _FAILED)


def _first_that_computes() -> torch.device:
    """The first CUDA device that computes, else an Apple GPU, else the CPU; a note of those that are passed over."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        if (reason := _why_not(device)) is None:
            return device if index else torch.device("cuda")
        note(f"{device} does not work and is passed over: {reason}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _why_not(device: torch.device) -> str | None:
    """Why a device does not compute, in torch's words; None if it does.

    One that is there may be too old, or too new, for the kernels that torch was built with, or in use by somebody else alone.
    """
    if device.type == "cpu":
        return None
    try:
        torch.ones(2, device=device).add_(1).sum().item()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
