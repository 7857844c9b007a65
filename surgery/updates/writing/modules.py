"""Low-rank updates of a checkpoint's tensors as updates ``B A`` of a model's modules, in no adapter's layout yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from surgery.lossless.factors import Factors
from surgery.models.carriers import Carrier, Layer, carriers_of, terms_of
from surgery.models.placement import Place, TensorPart
from surgery.updates.writing.low_rank import LowRankTensor, Refusal

#: How a module is adapted: as a linear layer whose weight is (out, in) or (in, out), as an embedding or a convolution, as one
#: of the experts that the model stacks, or by one of its parameters, as the stack of experts is.
ModuleKind = Literal["linear", "transposed", "embedding", "convolution", "expert", "parameter"]
#: Names of embeddings, whose updates have names of their own.
_EMBEDDING = re.compile(r"(embed|embeddings?|embed_tokens|embedding_table|wte|wpe)\.weight$")


@dataclass(frozen=True, slots=True)
class Halved:
    """The update of one tensor.

    Attributes:
        left, right: float32 (m, r) and (n, r), or (B, m, r) and (B, n, r) of a stack.
        weights: float64 (r,), what the columns of B are multiplied with when they are in place; None for nothing.
    """

    left: torch.Tensor
    right: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """A module that an adapter changes.

    Attributes:
        name: of the module.
        kind: how it is adapted.
        parameter: the name of the parameter in the module.
        carrier: that parameter; None for one of the experts that the model stacks.
        tensors: what is in it, with the places of each.
        rank: of all of that; of a stack, of the matrix with most.
        shape: of its weight as an adapter sees it: (out, in); (out, in, kernel...) of a convolution; (B, out, in) of a stack.
    """

    name: str
    kind: ModuleKind
    parameter: str
    carrier: Carrier | None
    tensors: Sequence[tuple[LowRankTensor, Sequence[Place]]]
    rank: int
    shape: tuple[int, ...]

    @property
    def is_stack(self) -> bool:
        return self.kind == "parameter" and len(self.shape) == 3

    @property
    def is_turned(self) -> bool:
        """Whether the weight that the model holds is (in, out)."""
        if self.kind == "parameter":
            return self.is_stack and is_input_first(self.carrier)
        return self.kind in ("transposed", "embedding")

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B at a rank: (rank, in) and (out, rank); (rank, in, kernel...) and (out, rank, 1...) of a convolution; and
        (B rank, in) and (out, rank B) of a stack."""
        if self.is_stack:
            count, out, inputs = self.shape
            return (count * rank, inputs), (out, rank * count)
        out, *sizes = self.shape
        return (rank, *sizes), (out, rank, *(1,) * (len(sizes) - 1))

    def halves(
        self, rank: int, carriers: Mapping[str, Carrier], halved: Callable[[LowRankTensor], Halved]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, padded with zeros to a rank.

        Args:
            rank: at least the module's own.
            carriers: of the model.
            halved: the update of a tensor.

        Returns:
            float32, contiguous, on the CPU, of the shapes that ``shapes`` gives; of a convolution as matrices. Of a stack A
            holds one matrix after the other, and B the columns of one rank of all matrices side by side, as PEFT's
            ParamWrapper does.
        """
        count = self.shape[0] if self.is_stack else 1
        lefts: list[list[torch.Tensor]] = [[] for _ in range(count)]
        rights: list[list[torch.Tensor]] = [[] for _ in range(count)]
        for tensor, places in self.tensors:
            update = halved(tensor)
            for matrix, left, right in self._pairs(tensor, places, carriers, update):
                if self.is_turned:
                    left, right = right, left
                lefts[matrix].append(left if update.weights is None else left * update.weights)
                rights[matrix].append(right)
        if not self.is_stack:
            return _padded(rights[0], rank).T.contiguous(), _padded(lefts[0], rank).contiguous()
        _, out, inputs = self.shape
        A, B = torch.zeros(count, rank, inputs), torch.zeros(out, rank, count)
        for matrix in range(count):
            if lefts[matrix]:
                A[matrix] = _padded(rights[matrix], rank).T
                B[:, :, matrix] = _padded(lefts[matrix], rank)
        return A.view(count * rank, inputs), B.view(out, rank * count)

    def _pairs(
        self, tensor: LowRankTensor, places: Sequence[Place], carriers: Mapping[str, Carrier], update: Halved
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(matrix, left, right) in the coordinates of the parameter, for all parts of a tensor in it."""
        if self.carrier is None:
            yield 0, update.left, update.right
            return
        sides = [(update.left, update.right)] if update.left.ndim == 2 else zip(update.left, update.right, strict=True)
        factors = [Factors(left, left.new_ones(left.shape[1]), right) for left, right in sides]
        for _, term in terms_of(tensor, places, carriers, factors):
            yield term.matrix, term.left, term.right


def _padded(columns: list[torch.Tensor], rank: int) -> torch.Tensor:
    whole = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
    return nn.functional.pad(whole, (0, rank - whole.shape[1]))


@dataclass(frozen=True, slots=True)
class AdaptedModules:
    """All modules that an adapter changes.

    Attributes:
        modules: in the order of the tensors that they are made of.
        carriers: the parameters of the model that these are in, by their names.
        experts: parameter that stacks experts -> the tensors in it, each an expert of its own in ``modules``.
    """

    modules: Sequence[AdaptedModule]
    carriers: Mapping[str, Carrier]
    experts: Mapping[str, Sequence[LowRankTensor]]

    @property
    def rank(self) -> int:
        """The largest of the modules."""
        return max(module.rank for module in self.modules)


@dataclass(frozen=True, slots=True)
class Finding:
    """How modules are found for tensors.

    Attributes:
        refusal: how it is said that a tensor cannot be written.
        single_experts: whether experts that a checkpoint has one by one are adapted so, where the model stacks them.
        layers_only: whether only linear layers and convolutions are adapted, with weights of their own.
        by_weight: last parts of names of linear layers that are adapted by their parameter.
    """

    refusal: Refusal
    single_experts: bool
    layers_only: bool = False
    by_weight: tuple[str, ...] = ()

    def modules(
        self, model: nn.Module | None, tensors: Sequence[LowRankTensor], places: Mapping[str, Sequence[Place]]
    ) -> AdaptedModules:
        """The modules with these tensors.

        Args:
            model: without weights; None where transformers does not know it, and modules are named as in the checkpoint.
            tensors: that are updated.
            places: of each tensor in the model; ignored without one. What has none is left out.

        Raises:
            OptionError: a tensor that no update ``B A`` of a module can change.
        """
        if model is None:
            places, carriers = _as_named(tensors)
        else:
            used = {place.parameter for one in tensors for place in places.get(one.tensor, ())}
            carriers = carriers_of(model, used)
        found: dict[str, tuple[ModuleKind, str, Carrier | None, list[tuple[LowRankTensor, list[Place]]]]] = {}
        experts: dict[str, list[LowRankTensor]] = {}
        for one in tensors:
            by_parameter: dict[str, list[Place]] = {}
            for place in places.get(one.tensor, ()):
                by_parameter.setdefault(place.parameter, []).append(place)
            for parameter, inside in by_parameter.items():
                if self.single_experts and len(inside[0].shape) == 3 and one.view == "matrix":
                    experts.setdefault(parameter, []).append(one)
                    found[one.tensor] = ("expert", self._module_of(one.tensor, one), None, [(one, inside)])
                    continue
                carrier = carriers[parameter]
                if model is None and not self.layers_only and _EMBEDDING.search(parameter) and one.view == "matrix":
                    raise self.refusal.of(one.key, "an embedding, by its name")
                kind = self._kind(one, carrier)
                name = parameter.rpartition(".")[0] if kind == "parameter" else self._module_of(parameter, one)
                if kind == "linear" and name.rpartition(".")[2] in self.by_weight:
                    kind = "parameter"
                found.setdefault(parameter, (kind, name, carrier, []))[3].append((one, inside))
        modules = [_adapted(*of) for of in found.values()]
        return AdaptedModules(modules, carriers, experts)

    def _module_of(self, tensor: str, one: LowRankTensor) -> str:
        """The module that a tensor is the weight of."""
        module, _, last = tensor.rpartition(".")
        if last != "weight":
            raise self.refusal.of(one.key, "no weight of a module")
        return module

    def _kind(self, one: LowRankTensor, carrier: Carrier) -> ModuleKind:
        """How a parameter is adapted. Refuses what an adapter changes in another way than fold, or not at all."""
        layer = carrier.layers[0]
        if layer.kind == "convolution" and getattr(layer.module, "groups", 1) != 1:
            raise self.refusal.of(one.key, "a convolution in groups")
        if layer.kind not in ("linear", "transposed", "convolution") and (
            self.layers_only or not (layer.kind == "embedding" or _is_adapted_alone(layer, carrier.shape))
        ):
            raise self.refusal.of(one.key, layer.described)
        if len(carrier.layers) > 1:
            # PEFT 0.21 adds to such a weight for one of the modules only, or when it merges once for each.
            raise self.refusal.of(one.key, "a weight that several modules share")
        return "parameter" if layer.kind == "unknown" else layer.kind  # type: ignore[return-value]


def _is_adapted_alone(layer: Layer, shape: Sequence[int]) -> bool:
    """Whether a parameter that its module uses in a way of its own can be adapted without the module: a matrix that is its
    weight, as of a router, or a stack of matrices. Modules with layers inside have vectors in such shapes."""
    inside = any(True for child in layer.module.children() for _ in child.parameters())
    if layer.readers or inside or type(layer.module) is nn.Module:
        return False
    return (len(shape) == 2 and layer.name == "weight") or (len(shape) == 3 and shape[0] > 1)


def is_input_first(carrier: Carrier | None) -> bool:
    """Whether a module says of its stack of experts that it is (experts, in, out), which is what PEFT asks it."""
    return carrier is not None and bool(getattr(carrier.layers[0].module, "is_transposed", False))


def _adapted(
    kind: ModuleKind, name: str, carrier: Carrier | None, tensors: Sequence[tuple[LowRankTensor, Sequence[Place]]]
) -> AdaptedModule:
    shape = tuple(tensors[0][0].shape) if carrier is None else carrier.shape
    parameter = "weight" if carrier is None else carrier.layers[0].name
    if kind in ("transposed", "embedding"):
        shape = shape[::-1]
    if kind != "parameter" or len(shape) != 3:
        rank = sum(one.rank * len(inside) for one, inside in tensors)
        return AdaptedModule(name, kind, parameter, carrier, tensors, rank, shape)
    ranks = [0] * shape[0]
    for one, inside in tensors:
        for place in inside:
            for matrix in place.part.at[0]:
                ranks[int(matrix)] += one.rank
    if is_input_first(carrier):
        shape = (shape[0], shape[2], shape[1])
    return AdaptedModule(name, kind, parameter, carrier, tensors, max(ranks), shape)


def _as_named(tensors: Sequence[LowRankTensor]) -> tuple[dict[str, list[Place]], dict[str, Carrier]]:
    """Places and carriers in a model that is not transformers': modules are named as in the checkpoint."""
    places, carriers = {}, {}
    for one in tensors:
        places[one.tensor] = [Place(one.tensor, tuple(one.shape), TensorPart.whole(one.tensor, one.shape))]
        kind = {"matrix": "linear", "convolution": "convolution", "stack": "unknown"}[one.view]
        layer: Any = Layer(nn.Module(), one.tensor.rpartition(".")[2], kind)
        carriers[one.tensor] = Carrier([layer], tuple(one.shape), False)
    return places, carriers
