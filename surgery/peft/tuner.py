"""``SpectralModel``: what PEFT puts into a model for a ``SpectralConfig``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import nn

from surgery.device import on_its_own_terms
from surgery.errors import OptionError
from surgery.names import SPECTRAL
from surgery.peft.adapter_scales import AdapterScales, PathOfAdapter
from surgery.peft.choosing import await_choice
from surgery.peft.config import SpectralConfig
from surgery.peft.installed import spectral_type
from surgery.peft.layer import SpectralLayer, layers_of, prepare_for_state_dicts
from surgery.peft.merging import check_mergeable, merge_adapters
from surgery.trained.spectral import CHOSEN, part_of_key
from surgery.training.attach_plan import AttachPlan, plan_attach
from surgery.training.attached_path import AttachedPath, name_in
from surgery.training.attached_scales import Scales
from surgery.training.lowrank import Adding, LowRankPath
from surgery.training.lowrank_weight import Shadow


class SpectralModel(BaseTuner):
    """A model with scales or cores as adapters of PEFT; made by ``get_peft_model`` and all that calls it."""

    prefix = "spectral_"
    tuner_layer_cls = SpectralLayer

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """PEFT's method: put an adapter into the model. The parameters are float32, and where the factors belong.

        Args:
            model: without wrappers.
            adapter_name: of a config that is there already.
            autocast_adapter_dtype: not used.
            low_cpu_mem_usage: not used.
            state_dict: not used: the targets are those of the factorized checkpoint.

        Raises:
            SourceError, OptionError, FormatError, MissingExtra: as of ``surgery.attach``; or the adapter belongs to other
                factors.
        """
        config = self._config_of(adapter_name)
        if any(layer.merged for layer in layers_of(model)):
            raise OptionError("adapters are merged into the model", hint="model.unmerge_adapter() first")
        is_first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        adapted = {id(path) for layer in layers_of(model) for path in layer.modules()}
        if any(isinstance(module, LowRankPath) and id(module) not in adapted for module in model.modules()):
            raise OptionError("scales are attached to this model already", hint="detach() them first")
        plan = _planned(model, config)
        _check_whole_modules(plan, config, model)
        absent = sorted(target.key for target in plan.absent)
        is_known = config.absent is not None and sorted(config.absent) == absent
        config.describe(plan.manifest, absent)
        scales = _put_in(model, adapter_name, config, plan)
        prepare_for_state_dicts(model)
        if not is_known:
            plan.note_absent()
        if config.choose is not None and scales.chosen is None and not config.inference_mode:
            scales.awaited = await_choice(scales, config.choose, config.choose_steps)
        self.targeted_module_names.extend(config.shapes.keys() - set(absent) - set(self.targeted_module_names))
        self._head, self._adapters = _hook_of_head(model), _adapters_in(model)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if is_first:
            self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )

    def _config_of(self, adapter: str) -> Any:
        """The config of an adapter, which is no other adapter's: a trainer may add a copy of one for a reference."""
        config = self.peft_config[adapter]
        if any(other is config for name, other in self.peft_config.items() if name != adapter):
            config = self.peft_config[adapter] = copy.deepcopy(config)
        return config

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        kept = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
            for parameter in module.parameters()
        }
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad = False

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Nothing is cast; and PEFT calls it whenever an adapter has got its values.
        scales_in(self.model, adapter_name).remember()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's method. What residuals lack is added as before, also when no adapter is left.

        Args:
            adapter_name: of the adapter.
        """
        super().delete_adapter(adapter_name)
        self._adapters = _adapters_in(self.model)

    def _create_and_replace(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError("no layer is replaced")

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return False

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # PEFT maps the names of what the model has, and masks come with the first choice.
        named = {key: key.replace(f".{CHOSEN}.", f".{CHOSEN}.{adapter_name}.") for key in state_dict if f".{CHOSEN}." in key}
        mapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return {named.get(key, key): value for key, value in mapped.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            OptionError: its output head has scales, and was not run: a trainer has multiplied with its weight by itself.
        """
        if not torch.compiler.is_compiling():
            for scales in self._adapters:
                scales.keep_in_float32()
        hook: Any = self._head
        if hook is None:
            return self.model(*args, **kwargs)
        hook.used = False
        output = self.model(*args, **kwargs)
        if not hook.used:
            raise OptionError(
                "the output head has scales and was not run: the trainer multiplies with its weight without the scales",
                hint="factorize without it (--exclude), or have the trainer use the model's own loss; in TRL, "
                'loss_type="nll" of SFTConfig',
            )
        return output

    def _check_merge_allowed(self) -> None:
        check_mergeable(layers_of(self.model))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's method: add adapters to the weights, so that the model runs as fast as without.

        Args:
            adapter_names: which ones; None for those that are active.
            safe_merge: refuse weights that are not finite.

        Raises:
            OptionError: weights are quantized, or elsewhere; or a sum is not finite.
        """
        self._check_merge_allowed()
        names = self.active_adapters if adapter_names is None else adapter_names
        merge_adapters(self.model, {name: scales_in(self.model, name) for name in names}, check=safe_merge, keep=True)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = layers_of(self.model)
        names = [] if not merge else self.active_adapters if adapter_names is None else adapter_names
        if any(layer.merged for layer in layers):
            names = []
            if not merge:
                for layer in layers:
                    layer.unmerge()
        if names or any(layer.lacking and not layer.merged for layer in layers):
            self._check_merge_allowed()
            merge_adapters(self.model, {name: scales_in(self.model, name) for name in names}, check=safe_merge, keep=False)
        for layer in layers:
            layer.place.remove()
        return super()._unload_and_optionally_merge(
            merge=False, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


def _planned(model: nn.Module, config: Any) -> AttachPlan:
    """The paths of an adapter; found while no other adapter has a part in what layers compute."""
    layers = layers_of(model)
    for layer in layers:
        layer.pause()
    try:
        return plan_attach(model, config.folder, config.train)
    finally:
        for layer in layers:
            layer.refresh()


def _check_whole_modules(plan: AttachPlan, config: Any, model: nn.Module) -> None:
    """Refuse modules that are to be trained whole and have targets. Raises OptionError."""
    inside = {id(layer.module) for _, layers in plan.paths for layer in layers}
    for name, module in model.named_modules():
        is_whole = any(name == one or name.endswith(f".{one}") for one in config.modules_to_save or ())
        if is_whole and any(id(other) in inside for other in module.modules()):
            raise OptionError(
                f"the module {name!r} is to be trained whole, and has scales", hint="factorize without it: --exclude"
            )


def _put_in(model: nn.Module, adapter: str, config: Any, plan: AttachPlan) -> AdapterScales:
    """Give the paths of an adapter to PEFT's layers, which are made where there are none."""
    places = [PathOfAdapter(_layer_for(path, layers), adapter) for path, layers in plan.paths]
    for place, (path, _) in zip(places, plan.paths, strict=True):
        place.layer.add(adapter, path)
    deltas = {key: plan.paths[number][0].delta(i) for key, (number, i) in plan.homes.items()}
    holders: dict[str, Any] = {key: places[number].layer.spectral_delta[adapter] for key, (number, _) in plan.homes.items()}
    for key, holder in holders.items():
        holder[part_of_key(key)] = deltas[key]
    for (path, _), keys in zip(plan.paths, plan.keys, strict=True):
        for i, key in enumerate(keys):
            path.lend(i, holders[key], part_of_key(key))
    homes = {key: (places[number], i) for key, (number, i) in plan.homes.items()}
    scales = AdapterScales(adapter, config, model, plan.manifest, homes, places)
    for place in places:
        place.layer.trained[adapter] = scales
    said = torch.tensor(list(bytes.fromhex(plan.manifest.fingerprint)), dtype=torch.uint8)
    places[0].layer.spectral_fingerprint[adapter] = said.to(places[0].path.left.device)
    return scales


def _layer_for(path: LowRankPath, layers: Any) -> SpectralLayer:
    """PEFT's layer for the parameter of a path."""
    there = getattr(layers[0].module, name_in(layers[0]), None)
    if isinstance(there, SpectralLayer):
        return there
    layer = SpectralLayer()
    layer.place = AttachedPath(layer, layers)
    return layer


def _hook_of_head(model: Any) -> Adding | Shadow | None:
    """What tells whether the output head has been run, if it has scales; else None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    places = [layer.place for layer in layers_of(model) if any(head is module for module in layer.place.modules)]
    return places[0].used_by(head) if places else None


def _adapters_in(model: nn.Module) -> list[AdapterScales]:
    """What is trained of all adapters of a model."""
    found = {id(scales): scales for layer in layers_of(model) for scales in layer.trained.values()}
    return [scales for scales in found.values() if isinstance(scales, AdapterScales)]


def scales_in(model: nn.Module, adapter: str) -> AdapterScales:
    """The scales or cores of an adapter. Raises OptionError if there is none of the name."""
    for layer in layers_of(model):
        if isinstance(scales := layer.trained.get(adapter), AdapterScales):
            return scales
    raise OptionError(f"the model has no adapter {adapter!r} of scales or cores")


@on_its_own_terms
def scales_of(model: nn.Module, adapter_name: str = "default") -> Scales:
    """The scales or cores of an adapter, as ``surgery.attach`` returns them.

    Use them to inspect the values, or to ``save`` them for ``surgery fold``.

    Args:
        model: a model with the adapter, with or without PEFT's wrapper.
        adapter_name: name of the adapter.

    Raises:
        OptionError: there is no such adapter.
    """
    return scales_in(model, adapter_name)


def register() -> None:
    """Make the method known to PEFT, once."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if spectral_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=SPECTRAL.lower(), config_cls=SpectralConfig, model_cls=SpectralModel, prefix="spectral_")
