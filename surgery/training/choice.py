"""Which directions of a target to train: those that a loss depends on most."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import nn

from surgery.errors import OptionError
from surgery.models.carriers import is_sharded
from surgery.training.ways import Way, weight_of_directions


def check_alone(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse parameters whose size others rely on already.

    Raises:
        OptionError: they are sharded, or in DistributedDataParallel.
    """
    if any(map(is_sharded, parameters)) or _are_replicated(parameters):
        raise OptionError(
            "directions cannot be chosen in a model that is distributed over processes already",
            hint="choose in the bare model, and wrap or shard it then; or choose in one process, save, and load the file after "
            "attach in all of them",
        )


def _are_replicated(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether they are in a DistributedDataParallel, which has buckets of their size.

    It leaves no trace on its parameters, and would go on with gradients that are not those of all processes.
    """
    if not _is_distributed():
        return False
    from torch.nn.parallel import DistributedDataParallel

    own = {id(parameter) for parameter in parameters}
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return any(id(parameter) in own for wrapper in wrappers for parameter in wrapper.parameters())


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed_gradients(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Their gradients, of all processes together; 0 for a parameter that had no part in the loss.

    Raises:
        OptionError: there are none, or they are not finite.
    """
    flat = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    device = flat[0].device
    known = torch.tensor([float(any(parameter.grad is not None for parameter in parameters))], device=device)
    whole = torch.cat([known, *(gradient.detach().float().flatten().to(device) for gradient in flat)])
    if _is_distributed():
        torch.distributed.all_reduce(whole)
    if not whole[0] > 0:
        raise OptionError(
            "there are no gradients to choose directions by",
            hint="run some backward passes first, without a step: loss.backward() adds up what choose looks at",
        )
    if not bool(torch.isfinite(whole).all()):
        raise OptionError("the gradients hold NaN or infinity", hint="clear them, and run some other backward passes")
    return list(torch.split(whole[1:], [parameter.numel() for parameter in parameters]))


def leading(way: Way, gradient: torch.Tensor, k: int, keep: int) -> torch.Tensor:
    """The directions of each matrix that a loss depends on most, (B, min(k, keep)) int64 on the CPU, ascending.

    Among equal ones, those of larger singular values.

    Args:
        way: what is trained.
        gradient: (B, numbers) of its parameters.
        k: directions of each matrix.
        keep: how many are wanted.
    """
    weights = weight_of_directions(way, gradient.cpu(), k)
    order = weights.argsort(dim=1, descending=True, stable=True)
    return order[:, :keep].sort(dim=1).values


def replace_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter data of another size, and no gradient; the object stays, and so do those who know it.

    Its gradients are gathered by a node of autograd that remembers the size for as long as any loss is there that was
    computed with the parameter. With data of another dtype in between torch makes a new one.
    """
    parameter.grad = None
    parameter.data = data.double()
    parameter.data = data
