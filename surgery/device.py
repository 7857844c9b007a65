"""Choosing the device that linear algebra runs on."""

from __future__ import annotations

import torch

from surgery.errors import OptionError


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
        raise OptionError("unknown device", got=name, expected="auto, cpu, cuda, cuda:N or mps") from None
    usable = {
        "cpu": device.index in (None, 0),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in usable:
        raise OptionError("unknown device", got=name, expected="auto, cpu, cuda, cuda:N or mps")
    if not usable[device.type]:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise OptionError(f"device {name} is not there", got=f"{count} CUDA devices", hint="--device auto takes what there is")
    return device


def device_name(device: torch.device) -> str:
    """For the manifest: the kind of device, and the model of a GPU."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
