"""The scales or cores of one adapter: what ``attach`` returns, kept where PEFT looks for parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import OptionError, ScalesError, few
from surgery.format.manifest import Manifest
from surgery.peft.config import SpectralConfig, check_fingerprint
from surgery.peft.layer import SpectralLayer
from surgery.progress import note
from surgery.trained.spectral import CHOSEN, DELTA, FINGERPRINT, key_of_part, part_of_key
from surgery.training.attached_scales import Scales
from surgery.training.choice import check_alone
from surgery.training.lowrank import LowRankPath


class PathOfAdapter:
    """An adapter's path in its place.

    Args:
        layer: that has it.
        adapter: its name.
    """

    def __init__(self, layer: SpectralLayer, adapter: str) -> None:
        self.layer = layer
        self._adapter = adapter

    @property
    def path(self) -> LowRankPath:
        path: Any = self.layer.spectral_path[self._adapter]
        return path  # type: ignore[no-any-return]

    @property
    def modules(self) -> Sequence[nn.Module]:
        return self.layer.place.modules

    @property
    def used(self) -> tuple[bool, bool]:
        return self.layer.place.used

    def remove(self) -> None:
        raise OptionError(
            "the scales of an adapter cannot be detached alone",
            hint=f"model.delete_adapter({self._adapter!r}), or model.unload()",
        )


class AdapterScales(Scales):
    """The scales or cores of an adapter.

    Args:
        model: that PEFT's layers are in, without a wrapper.
        adapter: its name.
        config: of the adapter, which keeps the choice of directions.
        manifest: of the factorized checkpoint.
        homes: key of each target in the model -> the path that its delta is at home in, and which one it is there.
        paths: all of the adapter's.
    """

    def __init__(
        self,
        adapter: str,
        config: SpectralConfig,
        model: nn.Module,
        manifest: Manifest,
        homes: dict[str, tuple[PathOfAdapter, int]],
        paths: Sequence[PathOfAdapter],
    ) -> None:
        way: Any = config.train
        super().__init__(model, Path(config.folder), manifest, dict(homes), list(paths), way)
        self._adapter = adapter
        self._config = config
        #: The choice that is still to be made, held here for as long as the adapter is there.
        self.awaited: object = None
        self.remember()
        self._layers = {key: home.layer for key, (home, _) in homes.items()}
        if config.chosen is not None:
            self._take(
                {key: config.choice(key, self._targets[key].matrices[0], self._targets[key].rank) for key in self._homes}
            )

    @property
    def config(self) -> SpectralConfig:
        return self._config

    def whole(self, key: str) -> torch.Tensor:
        """The parameters of all directions of a target, float32 (B, numbers), on the CPU."""
        return self._whole(key)

    def _take(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Train the directions (B, k) of masks, where all are trained yet."""
        check_alone(list(self.parameters_anywhere()))
        self._restrict({key: mask.nonzero()[:, 1].view(len(mask), -1) for key, mask in masks.items()})

    def parameters_anywhere(self) -> Sequence[nn.Parameter]:
        """As ``parameters``, also those without values that PEFT makes before it loads them."""
        return [home.path.delta(i) for home, i in self._homes.values()]

    def _restrict(self, kept: Mapping[str, torch.Tensor]) -> bool:
        lacking = super()._restrict(kept)
        masks = self._masks or {}
        for key, mask in masks.items():
            home, _ = self._homes[key]
            shaped = mask.view(self._targets[key].scales_shape).to(torch.uint8)
            chosen: Any = self._layers[key].spectral_chosen[self._adapter]
            chosen[part_of_key(key)] = shaped.to(home.path.roots.device)
        self._config.keep_choice(masks)
        return lacking

    def remember(self) -> None:
        """Keep a copy of what is trained, for ``keep_in_float32``."""
        self._remembered = [delta.detach().clone() for delta in self.parameters_anywhere()]

    def keep_in_float32(self) -> None:
        """Give what is trained its dtype again: TRL rounds it to bfloat16 where a model is quantized.

        With the digits that it had, where it has not been changed since ``remember``.
        """
        for delta, before in zip(self.parameters_anywhere(), self._remembered, strict=True):
            if delta.dtype != torch.float32:
                is_same = before.shape == delta.shape and torch.equal(before.to(delta.device, delta.dtype), delta.detach())
                delta.data = before.to(delta.device, copy=True) if is_same else delta.data.float()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get ready for what a state dict has of this adapter, before it is loaded.

        Args:
            state: of any model that the adapter is in.

        Raises:
            OptionError: it belongs to other factors; or directions are chosen in it, and the model is distributed over
                processes already.
            ScalesError: something is missing, or was trained in another way or in other directions.
        """
        deltas = self._of_state(state, DELTA)
        if not deltas:
            return
        self.keep_in_float32()
        ending = f".{FINGERPRINT}.{self._adapter}"
        for name, value in state.items():
            if name.endswith(ending):
                said = bytes(value.cpu().tolist()).hex()
                check_fingerprint(said, self._manifest.fingerprint, self._folder)
        if unknown := sorted(deltas.keys() - self._homes.keys()):
            note(
                "the adapter holds scales or cores of weights that this model does not have; they are neither used nor kept: "
                + few(unknown)
            )
        if lost := sorted(self._homes.keys() - deltas.keys() - set(self._config.absent or ())):
            raise ScalesError(f"the adapter lacks the scales or cores of {few(map(repr, lost))}")
        self._check_directions(self._of_state(state, CHOSEN))
        for key in self._homes.keys() & deltas.keys():
            home, i = self._homes[key]
            if (numbers := home.path.delta(i).numel()) != deltas[key].numel():
                raise ScalesError(
                    f"the scales or cores of {key!r} in the adapter were trained in another way",
                    got=f"{deltas[key].numel()} numbers",
                    expected=f"{numbers}, for train={self.train!r}",
                    hint="the config of an adapter says how it was trained; if you pass one, pass the same train=",
                )

    def _of_state(self, state: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """Key of a target -> what a state dict has of it."""
        part = f".{kind}.{self._adapter}."
        return {key_of_part(name.rpartition(part)[2]): value for name, value in state.items() if part in name}

    def _check_directions(self, chosen: Mapping[str, Any]) -> None:
        """Train the directions of a state dict from here on, or refuse it where they are others than those of now."""
        masks = {
            key: chosen[key].cpu().reshape(self._targets[key].matrices[0], -1).bool() for key in self._homes if key in chosen
        }
        if self._masks is None:
            if masks:
                self._take({key: masks.get(key, torch.ones(*self._mask_shape(key), dtype=torch.bool)) for key in self._homes})
            return
        if any(not torch.equal(mask, masks.get(key, torch.ones_like(mask))) for key, mask in self._masks.items()):
            raise ScalesError(
                "the adapter that is to be loaded was trained in other directions than those that are chosen here",
                hint="load it into a model in which none are chosen yet: it brings its own",
            )

    def _mask_shape(self, key: str) -> tuple[int, int]:
        return self._targets[key].matrices[0], self._targets[key].rank
