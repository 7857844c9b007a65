"""Where the parameters that an adapter names are in a checkpoint: by the names of its tensors, or by transformers' skeleton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import MissingExtra, OptionError, SourceError
from surgery.files.json_files import read_json_object
from surgery.format.header import TensorEntry
from surgery.format.name_map import NameMap, find_names
from surgery.models.carriers import Carrier, carriers_of
from surgery.models.placement import TensorPart, locate, parameter_names
from surgery.models.skeleton import skeleton
from surgery.names import CONFIG_FILE
from surgery.progress import note


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an adapter says of a parameter that it changes.

    Attributes:
        shape: that the parameter should have, for messages: (out, in...).
        fits: whether a parameter of this shape can be what is meant.
        is_embedding: whether it is the weight of an embedding.
    """

    shape: Sequence[int]
    fits: Callable[[Sequence[int]], bool]
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Home:
    """Where a parameter is.

    Attributes:
        parameter: its name, in the checkpoint or in transformers' model.
        shape: of the parameter.
        pieces: the parts of the checkpoint's tensors that it is made of.
        carrier: how the model uses it; None where it was found by the name of a tensor.
    """

    parameter: str
    shape: tuple[int, ...]
    pieces: Sequence[TensorPart]
    carrier: Carrier | None

    @property
    def tensor(self) -> str | None:
        """The tensor that the parameter is, as it is stored; None if it is put together or moved."""
        piece = self.pieces[0]
        whole = len(self.pieces) == 1 and piece == TensorPart.whole(piece.tensor, self.shape)
        return piece.tensor if whole else None


class Homes:
    """Finds parameters in a checkpoint.

    Args:
        folder: with the ``config.json`` of the checkpoint; None where there is none.
        entries: of all its tensors.
    """

    def __init__(self, folder: Path | None, entries: Mapping[str, TensorEntry]) -> None:
        self._folder, self._entries = folder, entries

    @cached_property
    def model(self) -> nn.Module | None:
        """Transformers' skeleton; None if it does not know the model."""
        return None if self._folder is None else skeleton(self._folder)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {} if self.model is None else dict(self.model.named_modules())

    @cached_property
    def _config(self) -> dict[str, Any]:
        path = None if self._folder is None else self._folder / CONFIG_FILE
        return read_json_object(path, str(path)) if path is not None and path.is_file() else {}

    @cached_property
    def _loaded(self) -> dict[str, tuple[tuple[int, ...], list[TensorPart]]]:
        """Parameter of the skeleton -> its shape, and what it is made of; empty without a skeleton."""
        found: dict[str, tuple[tuple[int, ...], list[TensorPart]]] = {}
        if self.model is not None:
            for places in locate(self.model, {name: entry.shape for name, entry in self._entries.items()}).values():
                for place in places:
                    found.setdefault(place.parameter, (place.shape, []))[1].append(place.part)
        return found

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Name of a parameter that no tensor is loaded into -> the other name of it that has one."""
        if self.model is None:
            return {}
        names = parameter_names(self.model).values()
        by_id = {id(self.model.get_parameter(name)): name for name in self._loaded}
        pairs = ((name, by_id.get(id(self.model.get_parameter(name)))) for name in names if name not in self._loaded)
        return {name: other for name, other in pairs if other is not None}

    @cached_property
    def _carriers(self) -> dict[str, Carrier]:
        return {} if self.model is None else carriers_of(self.model, self._loaded)

    def is_of_vocabulary(self, shape: Sequence[int]) -> bool:
        """Whether a weight has as many rows as there are words, so that it may be one parameter with another."""
        sizes = [one.get("vocab_size") for one in (self._config, *self._config.values()) if isinstance(one, dict)]
        return bool(shape) and shape[0] in sizes

    @cached_property
    def has_transposed(self) -> bool:
        """Whether any module of the checkpoint has its weight as (in, out), by the length of its bias."""
        for name, entry in self._entries.items():
            bias = self._entries.get(f"{name.removesuffix('.weight')}.bias")
            if name.endswith(".weight") and len(entry.shape) == 2 and bias is not None and len(bias.shape) == 1:
                rows, columns = entry.shape
                if bias.shape[0] == columns != rows:
                    return True
        return False

    def named(self, name: str) -> Home | None:
        """The tensor of this very name."""
        entry = self._entries.get(name)
        return None if entry is None else Home(name, entry.shape, [TensorPart.whole(name, entry.shape)], None)

    def in_model(self, name: str) -> Home | None:
        """The parameter of transformers' model of this name, with or without the name of the model inside a head."""
        prefix = "" if self.model is None else str(getattr(self.model, "base_model_prefix", ""))
        for given in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            one = self._tied.get(given, given)
            if one in self._loaded:
                shape, pieces = self._loaded[one]
                return Home(one, shape, pieces, self._carriers[one])
        return None

    def own_parameters(self, module: str) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a module's own parameters, as it defines them; by the tensors' names without a skeleton."""
        model = self.model
        if model is None:
            mine = ((name, entry.shape) for name, entry in self._entries.items() if name.rpartition(".")[0] == module)
            return sorted(mine)
        prefix = str(getattr(model, "base_model_prefix", ""))
        for name in (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
            if name in self._modules:
                own = self._modules[name].named_parameters(recurse=False)
                return [(f"{name}.{parameter}", tuple(value.shape)) for parameter, value in own]
        return []

    def find(self, wanted: Mapping[str, Wanted], where: str) -> dict[str, Home]:
        """The home of each parameter that an adapter names.

        Args:
            wanted: name -> what is known of it.
            where: the adapter, for messages.

        Raises:
            OptionError: a parameter is in neither name space, or of another shape.
            MissingExtra, SourceError: see ``surgery.models.skeleton``.
        """
        found: dict[str, Home] = {}
        for name, one in wanted.items():
            home = self.named(name)
            if home is not None and one.fits(home.shape):
                found[name] = home
        if len(found) == len(wanted):
            return {name: self._looked_at(home, wanted[name]) for name, home in found.items()}
        names, all_of_it = self._renamed(wanted, {name: entry.shape for name, entry in self._entries.items()})
        if all_of_it:
            homes = {name: self.named(names.given[name]) for name in wanted}
            return {name: self._looked_at(home, wanted[name]) for name, home in homes.items() if home is not None}
        if self.model is not None:
            for name, one in wanted.items():
                if name not in found and (home := self.in_model(name)) is not None and one.fits(home.shape):
                    found[name] = home
            if len(found) < len(wanted):
                in_model, all_of_it = self._renamed(wanted, {name: shape for name, (shape, _) in self._loaded.items()})
                if all_of_it:
                    renamed = {name: self.in_model(in_model.given[name]) for name in wanted}
                    return {name: home for name, home in renamed.items() if home is not None}
                names = in_model
        if len(found) < len(wanted):
            if (error := self._without_bias(wanted, where)) is not None:
                raise error
            raise self._misfit([name for name in wanted if name not in found], names, wanted, where)
        return {name: self._looked_at(home, wanted[name]) for name, home in found.items()}

    def _looked_at(self, home: Home, wanted: Wanted) -> Home:
        """The home of a parameter found by name; where it may be shared, as the model has it."""
        if home.carrier is not None or not (wanted.is_embedding or self.is_of_vocabulary(home.shape)):
            return home
        try:
            return self.of_tensor(home) or home
        except (MissingExtra, SourceError):
            if self._config.get("tie_word_embeddings") is False:
                return home
            raise

    def of_tensor(self, home: Home) -> Home | None:
        """The parameter of transformers' model that the tensor of a home, found by name, is in; None if it is in none."""
        name = self._by_tensor.get(home.parameter)
        return None if name is None else Home(name, *self._loaded[name], self._carriers[name])

    def tied(self, home: Home) -> list[str]:
        """The other tensors of the checkpoint that are one parameter with a home, as the model ties them."""
        if home.carrier is None or len(home.carrier.layers) == 1:
            return []
        same = [name for name, carrier in self._carriers.items() if carrier is home.carrier and name != home.parameter]
        others = (Home(name, *self._loaded[name], home.carrier).tensor for name in same)
        return [tensor for tensor in others if tensor is not None]

    @cached_property
    def _by_tensor(self) -> dict[str, str]:
        return {piece.tensor: name for name, (_, pieces) in self._loaded.items() for piece in pieces}

    def _renamed(self, wanted: Mapping[str, Wanted], shapes: Mapping[str, Sequence[int]]) -> tuple[NameMap, bool]:
        """The map of all names to others with one prefix or suffix, and whether all are found and fit."""
        names = find_names(shapes, dict.fromkeys(wanted, ()), alike=lambda name, there: wanted[name].fits(shapes[there]))
        all_of_it = names.is_complete and all(wanted[name].fits(shapes[there]) for name, there in names.given.items())
        if all_of_it:
            others = [(name, names.given[name]) for name in sorted(wanted) if name != names.given[name]]
            if others:
                note(
                    "the adapter's names differ from the checkpoint's, and all are found: "
                    f"{others[0][0]!r} is taken for {others[0][1]!r}"
                )
        return names, all_of_it

    def _without_bias(self, wanted: Mapping[str, Wanted], where: str) -> OptionError | None:
        """The error if all that an adapter names is there but for biases, which the modules do not have; None if it is not."""
        biases = [name for name in wanted if name.endswith(".bias")]
        rest = {name: one for name, one in wanted.items() if name not in biases}
        if not biases or not rest:
            return None
        try:
            homes = self.find(rest, where)
        except OptionError:
            return None
        for name in biases:
            module = name.removesuffix(".bias")
            home = homes.get(f"{module}.weight")
            there = f"{module if home is None else home.parameter.removesuffix('.weight')}.bias"
            if self.named(there) is None and (self.model is None or self.in_model(there) is None):
                return OptionError(
                    f"{where}: the adapter changes the bias of {module!r}, a layer that has no bias in this checkpoint",
                    got=repr(name),
                    expected="biases of layers that have one",
                    hint="merge onto the model that the adapter was trained on, if its layers have biases. PEFT does not merge "
                    "a lora_bias without one either: load the adapter beside the model with PEFT, or train without lora_bias",
                )
        return None

    def _misfit(self, lacking: Sequence[str], names: NameMap, wanted: Mapping[str, Wanted], where: str) -> OptionError:
        name = lacking[0]
        module = name.removesuffix(".weight")
        here = self.named(name) or (None if self.model is None else self.in_model(name))
        if here is not None:
            return OptionError(
                f"{where}: the adapter's update of {module!r} does not fit its weight",
                got=list(wanted[name].shape),
                expected=f"{list(here.shape)}, as the checkpoint has it, and no convolution in groups",
                hint="merge onto the model that the adapter was trained on, with the vocabulary that it had",
            )
        there = self.model is not None and name in parameter_names(self.model)
        return names.misfit(
            OptionError,
            f"{where}: the adapter changes {module!r}, which is no module with a weight in this checkpoint",
            wanted,
            expected="modules of the checkpoint, all of them under its names, or with one prefix or suffix"
            + (": this one's weight is not in its files" if there else ""),
            hint="merge onto the model that the adapter was trained on; or merge_and_unload() of PEFT",
        )
