"""How an opened model is quantized, and what is said where something needs a weight in it that is not read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import OptionError, SourceError, SurgeryError, few
from surgery.files.json_files import read_json_object
from surgery.format.header import Header, TensorEntry
from surgery.quantized.original import original_of
from surgery.quantized.recognize import MODELOPT_FILE, Quantization, quantization_of, read_quantization
from surgery.quantized.unread import UnreadWeight
from surgery.source.file_names import CARD
from surgery.source.protocol import Source, read_text

#: What ways of storing weights are read.
READ = "weights of 16 or 32 bits, or quantized in a way that is read (docs/recipes.md, Quantized models)"


def quantization_in(source: Source, headers: Mapping[str, Header], config: Mapping[str, Any] | None = None) -> Quantization:
    """How a model is quantized.

    Args:
        source: the model.
        headers: of all its weight files, by name, as they are in the files.
        config: its ``config.json``; None: that of the source.

    Raises:
        SourceError: by a method that is not known, so that it is not known what any of its weights mean.
        FormatError: a weight without its scales, or with scales that do not fit it.
    """
    config = source.config() if config is None else config
    if MODELOPT_FILE in source.selection.others:
        config = with_modelopt(config, source.fetch(MODELOPT_FILE), f"{source.name}/{MODELOPT_FILE}")
    found = read_quantization(config, headers, source.name)
    if found.unknown is not None:
        what, got = found.unknown
        raise SourceError(f"{source.name} is {what}", got=got, expected=READ, hint=factorize_instead(source))
    return found


def with_modelopt(config: Mapping[str, Any], path: Path, where: str) -> Mapping[str, Any]:
    """A config that also says what a file of ModelOpt beside it does, if it says nothing of a quantization itself.

    Args:
        config: the config.
        path: of the file beside it.
        where: the file, for messages.
    """
    described = read_json_object(path, where).get("quantization")
    # Without an algorithm for weights only keys and values are quantized, at inference.
    if quantization_of(config) is not None or not isinstance(described, dict) or not described.get("quant_algo"):
        return config
    return {**config, "quantization_config": {**described, "quant_method": "modelopt"}}


def original(source: Source) -> str:
    """The model that a quantized one was made from, in words."""
    card = next((file for file in source.selection.others if file.casefold() == CARD), None)
    text = ""
    if card is not None:
        try:
            text = read_text(source.fetch(card), card)
        except SurgeryError:  # an error about the model is more use than one about its card
            text = ""
    return original_of(source.record.repo_id or source.name, text)


def factorize_instead(source: Source) -> str:
    """What to do about a model that is quantized in a way that is not read, as a hint."""
    return (
        f"surgery factorize {original(source)}; of what is trained of that, surgery export makes an adapter, which goes onto "
        "this model as well"
    )


def not_read(what: str, weights: Iterable[UnreadWeight], hint: str) -> SourceError:
    """The error for something that needs weights that are not read.

    Args:
        what: what needs them, as a sentence that goes on with their methods.
        weights: they, at least one.
        hint: what to do.
    """
    some = list(weights)
    methods = list(dict.fromkeys(one.method for one in some))
    return SourceError(
        f"{what} {few(methods, between=' and ')}, which {'are' if methods[1:] else 'is'} not read",
        got=few(one.main for one in some),
        expected=READ,
        hint=hint,
    )


def check_dequantizable(model: str, quantization: Quantization, original: str) -> None:
    """Refuse to dequantize a model of which some weights are not read.

    Args:
        model: its name, for messages.
        quantization: of it.
        original: the model that it was made from, in words.

    Raises:
        SourceError: names some of them.
    """
    if quantization.unread:
        what = f"{model} cannot be dequantized: it holds weights in"
        raise not_read(what, quantization.unread.values(), f"run it without --dequantize, or take {original}")


def with_unread(entries: Mapping[str, TensorEntry], quantization: Quantization) -> dict[str, TensorEntry]:
    """The tensors of a model as they would be if what is not read of it were not quantized, as far as their shapes are known.

    With these an adapter finds the weights that it changes, so that it can be told which of them are not read.
    """
    found = {name: entry for name, entry in entries.items() if name not in quantization.unread_tensors}
    for weight in quantization.unread.values():
        if weight.shape is not None:
            found[weight.name] = TensorEntry(weight.name, "BF16", weight.shape, 0, 2 * math.prod(weight.shape))
    return found


@contextmanager
def finding_unread(quantization: Quantization, hint: str) -> Iterator[None]:
    """Around what looks for weights by name: an error there also tells that some are not read, and what to do (``hint``).

    Of a weight whose shape is not known it is the module that the error names.
    """
    try:
        yield
    except OptionError as error:
        named = [one.name for one in quantization.unread.values() if repr(_module(one)) in error.what]
        check_not_unread(named, quantization, hint)
        if quantization.unread:
            methods = few(dict.fromkeys(one.method for one in quantization.unread.values()), between=" and ")
            some = f"{len(quantization.unread)} weights of this model are in {methods}, which is not read"
            error.hint = f"{some}: {hint}" + (f"; else {error.hint}" if error.hint else "")
        raise


def check_not_unread(changed: Collection[str], quantization: Quantization, hint: str) -> None:
    """Refuse an adapter that changes weights that are not read.

    Args:
        changed: the tensors that it changes.
        quantization: of the model.
        hint: what to do.

    Raises:
        OptionError: names one of them, and how it is stored.
    """
    found = [one for name, one in quantization.unread.items() if name in changed]
    if not found:
        return
    raise OptionError(
        f"the adapter changes {_module(found[0])!r}, whose weight is in {found[0].method}, which is not read"
        + (f", and {len(found) - 1} more like it" if found[1:] else ""),
        got=found[0].main,
        expected=READ,
        hint=hint,
    )


def _module(weight: UnreadWeight) -> str:
    return weight.name.removesuffix(".weight")
