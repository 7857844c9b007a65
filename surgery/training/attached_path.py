"""A low-rank path in its place in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.models.carriers import Layer
from surgery.names import ATTACHED_NAME
from surgery.training.lowrank import Adding, LowRankPath
from surgery.training.lowrank_weight import Shadow


class AttachedPath:
    """A path in its place: the hooks that make the layers of a parameter use it.

    Attributes:
        path: a submodule of the first of the layers.
        modules: the layers.
    """

    def __init__(self, path: LowRankPath, layers: Sequence[Layer]) -> None:
        self.path = path
        self.modules = [layer.module for layer in layers]
        self._kinds = [layer.kind for layer in layers]
        self._handles: list[Any] = []
        self._hooks: list[Adding | Shadow] = []
        first = layers[0]
        self._owner, self._name = first.module, ATTACHED_NAME + ("" if first.name == "weight" else f"_{first.name}")
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

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(self._owner, self._name)
