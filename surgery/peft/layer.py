"""What PEFT sees of a parameter with scales or cores: the paths of all adapters, of which those that are active are added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from surgery.training.attached_path import AttachedPath
from surgery.training.inner import Inner, joined
from surgery.training.lowrank import LowRankPath, Summand


class InLayers(Protocol):
    """What is trained of an adapter in all layers, by what these need of it."""

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get ready for a state dict, before it is loaded."""


class SpectralLayer(Summand, BaseTunerLayer):
    """The paths of one parameter, of each adapter one.

    It stands beside the parameter, in the place that ``attach`` has for a path, and wraps no layer. Where the parameter holds a
    residual, what that lacks is always added, also with all adapters off or deleted.

    Attributes:
        spectral_delta: adapter -> what is trained of the targets that are at home here, under their keys as parts of a name.
        spectral_chosen: adapter -> uint8 masks of the directions that are trained, likewise; empty before any are chosen.
        spectral_fingerprint: adapter -> of the factors, 32 bytes; in one layer of a model.
        spectral_path: adapter -> path.
        spectral_restoring: what is left of the last adapter that was deleted, where the parameter holds a residual; else None.
        trained: adapter -> all that is trained of it.
        place: the hooks by which layers use this.
        unmerged: the weight without the adapters that are merged into it, where some are.
    """

    adapter_layer_names = ("spectral_delta",)
    other_param_names = ("spectral_chosen", "spectral_fingerprint", "spectral_path")

    spectral_restoring: LowRankPath | None
    place: AttachedPath[SpectralLayer]

    def __init__(self) -> None:
        super().__init__()
        self.spectral_delta = nn.ModuleDict()
        self.spectral_chosen = nn.ModuleDict()
        self.spectral_fingerprint = BufferDict(persistent=True)
        self.spectral_path = nn.ModuleDict()
        self.spectral_restoring = None
        self.trained: dict[str, InLayers] = {}
        self.unmerged: torch.Tensor | None = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._parts: list[LowRankPath] = []

    # BaseTunerLayer has them for wrappers around layers, and would look for a layer in this.
    @property
    def weight(self) -> Any:
        raise AttributeError("a SpectralLayer has no weight")

    @property
    def bias(self) -> Any:
        raise AttributeError("a SpectralLayer has no bias")

    def add(self, adapter: str, path: LowRankPath) -> None:
        """Take the path of an adapter, for which nothing is at home here yet."""
        self.spectral_delta[adapter] = nn.ParameterDict()
        self.spectral_chosen[adapter] = BufferDict(persistent=True)
        self.spectral_path[adapter] = path

    @property
    def idle(self) -> bool:
        return not self._parts

    @property
    def left(self) -> torch.Tensor:  # type: ignore[override]
        return self._parts[0].left

    @property
    def lacking(self) -> bool:
        """Whether the parameter holds a residual."""
        return any(path.lacking for path in self._paths())

    def _paths(self) -> list[LowRankPath]:
        paths: list[Any] = [*self.spectral_path.values(), self.spectral_restoring]
        return [path for path in paths if path is not None]

    def forward(self, x: torch.Tensor, apply: Callable[..., Any], owner: Any) -> Any:
        """``apply`` as of a ``LowRankPath``, for the sum of the active ones."""
        first, *others = self._parts
        if not others:
            return first(x, apply, owner)

        def applied(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, inner: Inner, owner: Any) -> Any:
            kind, device = left.dtype, left.device
            lefts = [left, *(path.left.to(device, kind) for path in others)]
            rights = [right, *(path.right.to(device, kind) for path in others)]
            inners = [inner, *(path.inner().to(kind) for path in others)]
            return apply(x, torch.cat(lefts, dim=-1), torch.cat(rights, dim=-1), joined(inners), owner)

        return first(x, applied, owner)

    def refresh(self) -> None:
        """Find what is to be added, after a change of the adapters that are there, active, enabled or merged."""
        names = [] if self._disable_adapters else self.active_adapters
        parts: list[Any] = [self.spectral_path[name] for name in names if name in self.spectral_path]
        for path in parts:
            path.untouched, path.restores = False, path is parts[0]
        self._parts = [] if self.merged else parts or self.restoring()

    def pause(self) -> None:
        """Add nothing, until the next ``refresh``."""
        self._parts = []

    def restoring(self) -> list[LowRankPath]:
        """The path, as with nothing trained, that adds what the residual lacks; none where the parameter lacks nothing."""
        lacking = next((path for path in self._paths() if path.lacking), None)
        if lacking is None:
            return []
        lacking.untouched = lacking.restores = True
        return [lacking]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        if self.merged and not enabled:  # as PEFT's own layers do, or the reference of a trainer would be the trained model
            self.unmerge()
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.spectral_path:
            self.trained.pop(adapter_name, None)
            path: Any = self.spectral_path[adapter_name]
            if path.lacking:
                self.spectral_restoring = path
        super().delete_adapter(adapter_name)
        self.refresh()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back that was there before adapters were merged into it."""
        if self.unmerged is not None:
            weight = self.place.weight()
            weight.copy_(self.unmerged)
            self.unmerged = None
        self.merged_adapters = []
        self.refresh()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.spectral_path:
            path: Any = self.spectral_path[adapter_name]
            for delta in self.spectral_delta[adapter_name].parameters():
                delta.data = delta.data.to(device or path.left.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast as ``nn.Module`` does, but keep what is trained in float32, as ``LowRankPath`` does."""
        before = [delta.data for delta in self.spectral_delta.parameters()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for delta, value in zip(self.spectral_delta.parameters(), before, strict=True):
            if delta.dtype != value.dtype:
                delta.data = value.to(delta.device)
        return self


def layers_of(model: nn.Module) -> Sequence[SpectralLayer]:
    """All of them in a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, SpectralLayer)]


def prepare_for_state_dicts(model: nn.Module) -> None:
    """Let the adapters of a model get ready for each state dict before it is loaded: it may be of fewer directions.

    What PEFT loads goes through the model that the layers are in, under any wrapper.
    """
    if not any(getattr(hook, "hook", hook) is _before_loading for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]


def _before_loading(model: nn.Module, state_dict: Any, *_: Any) -> None:
    adapters = {id(scales): scales for layer in layers_of(model) for scales in layer.trained.values()}
    for scales in adapters.values():
        scales.prepare(state_dict)
