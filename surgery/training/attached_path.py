"""A low-rank path in its place in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from surgery.models.carriers import Layer
from surgery.models.packed import held_in
from surgery.names import ATTACHED_NAME
from surgery.training.lowrank import Adding, LowRankPath, Summand
from surgery.training.lowrank_weight import Shadow


class PathInPlace(Protocol):
    """A path in its place, by what ``Scales`` needs of it.

    Attributes:
        path: the path.
        modules: the layers that use its parameter.
        used: see ``AttachedPath.used``.
    """

    @property
    def path(self) -> LowRankPath: ...

    @property
    def modules(self) -> Sequence[nn.Module]: ...

    @property
    def used(self) -> tuple[bool, bool]: ...

    def remove(self) -> None: ...


def name_in(layer: Layer) -> str:
    """The attribute of a layer's module that has the path of the layer's parameter."""
    return ATTACHED_NAME + ("" if layer.name == "weight" else f"_{layer.name}")


_Path = TypeVar("_Path", bound=Summand)


class AttachedPath(Generic[_Path]):
    """A path in its place: the hooks that make the layers of a parameter use it.

    Attributes:
        path: a submodule of the first of the layers.
        modules: the layers.
    """

    def __init__(self, path: _Path, layers: Sequence[Layer]) -> None:
        self.path = path
        self.modules = [layer.module for layer in layers]
        self._kinds = [layer.kind for layer in layers]
        self._handles: list[Any] = []
        self._hooks: list[Adding | Shadow] = []
        self._first = first = layers[0]
        self._owner, self._name = first.module, name_in(first)
        first.module.add_module(self._name, path)
        for layer in layers:
            if layer.kind == "unknown":
                shadow = Shadow(path, layer.module, layer.name)
                for module in (layer.module, *layer.readers):
                    self._handles.append(module.register_forward_pre_hook(shadow.enter))
                    # Also after an exception, with which a recomputation under gradient checkpointing may end.
                    self._handles.append(module.register_forward_hook(shadow.leave, always_call=True))
                self._hooks.append(shadow)
            else:
                adding = Adding(path, layer.kind)
                self._handles.append(layer.module.register_forward_hook(adding, with_kwargs=True))
                self._hooks.append(adding)

    @property
    def used(self) -> tuple[bool, bool]:
        """Whether any of the layers has been run, and whether all have that may be read in another way than by being run.

        An embedding beside others of the same weight may be there for its name alone, as T5's ``shared`` is.
        """
        used = [hook.used for hook in self._hooks]
        return any(used), any(used) and all(ran for ran, kind in zip(used, self._kinds, strict=True) if kind != "embedding")

    @property
    def described(self) -> str:
        """The parameter in words, for a message."""
        return self._first.described

    def parameter(self) -> torch.Tensor:
        return held_in(self._owner, self._first.name)

    def weight(self) -> torch.Tensor:
        """The parameter's values, of which any change is one of the parameter."""
        return self.parameter().detach()

    def used_by(self, module: nn.Module) -> Adding | Shadow:
        """What tells whether one of the layers has been run."""
        return next(hook for hook, other in zip(self._hooks, self.modules, strict=True) if other is module)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(self._owner, self._name)
