"""Which weight a model holds: the one that was factorized, its residual, or neither."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery.errors import OptionError, SourceError
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.safetensors import TORCH_DTYPES
from surgery.format.sample import SampleHash
from surgery.lossless.factors import Factors
from surgery.models.carriers import Carrier, is_sharded
from surgery.models.packed import held_at, held_in, is_plain, loaded_name
from surgery.models.placement import Place, Positions, homes
from surgery.models.terms import Term
from surgery.names import FACTORIZABLE_DTYPES

#: By how much what a quantized weight computes may be off: in four bits 10 % on random vectors and 1 to 5 % on the leading
#: ones. Of another model it is 100 % and more.
_QUANTIZATION_ERROR = 0.4
_PROBES = 8
#: transformers 5.23 does so with all of modelopt's, and with the experts of NVFP4.
_LOADED_WRONGLY = (
    "load the model that was factorized; if it was, its loader leaves out scales: surgery fold FACTORIZED "
    "FACTORIZED/surgery/scales.safetensors --dequantize writes what it holds as bfloat16, which can be loaded and trained"
)


@dataclass(frozen=True, slots=True)
class HeldTarget:
    """A target as a model holds it.

    Attributes:
        target: of the checkpoint.
        places: where its tensor is in the model.
        carriers: the parameters there, by their names.
        factors: of each of its matrices.
        terms: made of these, as they lie in the parameters.
    """

    target: TargetRecord
    places: Sequence[Place]
    carriers: Mapping[str, Carrier]
    factors: Sequence[Factors]
    terms: Sequence[Term]


def is_residual(held: HeldTarget, dtype: torch.dtype, stored: Callable[[], torch.Tensor]) -> bool:
    """Whether the residual of a target is in a model, and not the original weight.

    Told by a sample of the entries; where these have been quantized, by what the layer makes of singular and of random vectors.

    Args:
        held: the target.
        dtype: that a quantized layer gets its input in.
        stored: gives the tensor in the residual checkpoint.

    Raises:
        SourceError: it is neither.
        OptionError: only a part of it is in the model, or it is quantized and joined with other weights, or in a layer that is
            for inference alone.
    """
    target, places, carriers = held.target, held.places, held.carriers
    if any(carriers[place.parameter].quantized for place in places):
        if len(held.terms) > 1 or places[0].part.axes != (0, 1) or list(places[0].shape) != target.shape:
            raise OptionError(
                f"{target.tensor!r} is quantized in this model, and stored there in another way than in the checkpoint",
                hint="load it unquantized",
            )
        layer = carriers[places[0].parameter].layers[0].module
        leading = [held.terms[0].left.T @ _images(layer, held.terms[0].right.T, dtype).T]
        if _is_original(leading, held.factors):
            return False
        if target.residual_sample_sha256 is not None:
            # Next to nothing is left of the leading directions, as in any other model: it must be this one all over.
            generator = torch.Generator().manual_seed(0)
            probes = torch.randn(_PROBES, target.shape[1], generator=generator, dtype=torch.float32)
            expected = probes @ stored().float().T
            if (_images(layer, probes, dtype) - expected).norm() <= _QUANTIZATION_ERROR * expected.norm():
                return True
        raise _neither(target, "a quantized weight", "values, nearly,")
    matrices = target.seen_as.matrices(_gathered(target, places, carriers))
    if target.dtype in FACTORIZABLE_DTYPES:
        digest = _hash_as(matrices, TORCH_DTYPES[target.dtype])
        if digest is None or digest not in (target.sample_sha256, target.residual_sample_sha256):
            dtype_of_model = str(matrices.dtype).removeprefix("torch.")
            fewer = matrices.dtype.itemsize < TORCH_DTYPES[target.dtype].itemsize
            hint = f'load the model with dtype="auto": {dtype_of_model} cannot hold its weights' if fewer else None
            raise _neither(target, f"{dtype_of_model} {target.shape}", "bytes", hint)
        return digest != target.sample_sha256
    # Quantized, and dequantized when it was loaded: an overlay, of which nothing but the factors is at hand.
    leading = [f.U.T.to(w.device) @ w.float() @ f.V.to(w.device) for f, w in zip(held.factors, matrices, strict=True)]
    if not _is_original(leading, held.factors):
        raise _neither(target, "another weight", "leading singular values", _LOADED_WRONGLY)
    return False


def held_elsewhere(model: nn.Module, manifest: Manifest, absent: Sequence[TargetRecord]) -> tuple[TargetRecord, str] | None:
    """Find a target that is not under its name in a model, and the parameter that holds its weight or residual.

    So it is where a loader was told other names than it knows by itself. Told by a sample of the entries, as ``is_residual``
    does it; what is quantized or offloaded cannot be told.
    """
    tensors = [
        *(loaded_name(skipped.tensor) for skipped in manifest.skipped),
        *(name for t in manifest.targets for name in t.tensors),
    ]
    loaded = {id(held_at(model, name)) for name in homes(model, tensors).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in loaded or parameter.is_meta or not is_plain(parameter) or is_sharded(parameter):
            continue
        for target in absent:
            if tuple(target.shape) == tuple(parameter.shape) and target.dtype in FACTORIZABLE_DTYPES:
                digest = _hash_as(target.seen_as.matrices(parameter.detach()), TORCH_DTYPES[target.dtype])
                if digest is not None and digest in (target.sample_sha256, target.residual_sample_sha256):
                    return target, name
    return None


def _is_original(leading: Sequence[torch.Tensor], factors: Sequence[Factors]) -> bool:
    """Whether ``U^T W V`` is nearly ``diag(s)``."""
    expected = torch.stack([factor.s.diag() for factor in factors])
    error = torch.stack(list(leading)).cpu() - expected
    return bool(error.norm() <= _QUANTIZATION_ERROR * expected.norm())


def _neither(target: TargetRecord, got: str, what: str, hint: str | None = None) -> SourceError:
    return SourceError(
        f"{target.key!r} of the model is neither the original weight nor its residual",
        got=got,
        expected=f"the {what} of {target.dtype} {target.shape}",
        hint=hint or "load the model from the original or the factorized folder, and attach before training",
    )


def _images(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x W^T``, float32, on the CPU, by running a linear layer whose weight is quantized; x: (any, in)."""
    device = held_in(layer, "weight").device
    inputs = torch.cat([x, x.new_zeros(1, x.shape[1])]).to(device, dtype)
    # As in training: without a gradient to compute, bitsandbytes packs the weight for inference, for good.
    with torch.enable_grad():
        outputs: torch.Tensor = layer(inputs.requires_grad_())
    if not outputs.requires_grad:
        raise OptionError(
            f"a {type(layer).__name__} of the model passes no gradients on, so that layers before it would not be trained",
            hint="load the model dequantized, or in a way that can be trained",
        )
    images = outputs.detach().float().cpu()
    return images[:-1] - images[-1:]


def _gathered(target: TargetRecord, places: Sequence[Place], carriers: Mapping[str, Carrier]) -> torch.Tensor:
    """A target's tensor, put together from its places in the model, in their dtype and on their device.

    Raises:
        OptionError: some of it is not in the model.
    """
    whole: torch.Tensor | None = None
    count = 0
    for place in places:
        carrier, piece = carriers[place.parameter], place.part
        with carrier.present():
            weight = carrier.weight()
            if weight.is_meta:
                raise OptionError(f"{place.parameter!r} has no values: it is on the meta device", hint="load the weights first")
            for axis, at in enumerate(piece.at):
                weight = _selected(weight, axis, at)
        count += weight.numel()
        in_order = piece.axes == tuple(range(len(target.shape))) and all(
            isinstance(of, range) and of == range(size) for of, size in zip(piece.of, target.shape, strict=False)
        )
        if in_order and len(places) == 1:
            return weight.contiguous()
        if whole is None:
            whole = torch.empty(target.shape, dtype=weight.dtype, device=weight.device)
        stacked = [axis for axis, of in enumerate(piece.axes) if of is None]
        kept = [axis for axis in range(weight.ndim) if axis not in stacked]
        order = sorted(kept, key=lambda axis: piece.axes[axis] or 0)
        values = weight.permute(*stacked, *order)[(0,) * len(stacked)]
        index = [torch.as_tensor(piece.of[axis]).to(whole.device) for axis in order]
        whole[torch.meshgrid(*index, indexing="ij")] = values.to(whole.device)
    if whole is None or count != whole.numel():
        raise OptionError(f"only a part of {target.tensor!r} is in this model", got=count, expected=math.prod(target.shape))
    return whole


def _selected(tensor: torch.Tensor, axis: int, at: Positions) -> torch.Tensor:
    if isinstance(at, range):
        return tensor.narrow(axis, at.start, len(at))
    return tensor.index_select(axis, at.to(tensor.device))


def _hash_as(matrices: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The hash of a sample of matrices (B, m, n) in the dtype of the checkpoint; None if that does not hold its values."""
    sample = SampleHash(dtype)
    sample.update(matrices)
    return sample.hexdigest() if sample.exact else None
