"""The model that a quantized one was made from, as far as its card or its name tell."""

from __future__ import annotations

import re

from surgery.escapes import quoted

#: The part of a card between its first two lines of hyphens.
_FRONT = re.compile(r"\s*---[^\S\n]*\n(.*?)\n---", re.DOTALL)
_BASE = re.compile(r"^base_model:[^\S\n]*(\S[^\n]*)?((?:\n[^\S\n]*-[^\S\n][^\n]*)*)", re.MULTILINE)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: What names of quantized models have behind the name of the original.
_METHOD = re.compile(
    r"[-_.](unsloth[-_])?(gptq|awq|svdq(uant)?|quip|qtip|e8p(rvq)?|squeezellm|bnb|exl[23]|gguf|ggml|mlx|hqq|aqlm|quanto|eetq|spqr|vptq|higgs|fp-?quant|auto-?round|torchao"
    r"|nvfp4|mxfp[48]|fp[48]|nf4|bitnet|quark|sinq|qat|quantized|compressed|marlin|u?int[2-8]\w*|w\d+a\d+\w*|q\d_\w+|i[48]"
    r"|[2-8](\.\d+)?[-_]?bits?|[2-8](\.\d+)?bpw)(?![^-_.])",
    re.IGNORECASE,
)


def base_in_card(card: str) -> str | None:
    """The one model that a card names as the one that its model was made from; None if it names none, or several.

    Args:
        card: the text of a README.md, of whose front matter ``base_model`` is read.
    """
    front = _FRONT.match(card)
    found = None if front is None else _BASE.search(front[1])
    if found is None:
        return None
    listed = [line.strip().removeprefix("-") for line in (found[2] or "").splitlines() if line.strip()]
    inline = (found[1] or "").strip()
    names = {one.strip().strip("'\"") for one in (*inline.strip("[]").split(","), *listed)} - {""}
    named = [name for name in names if _REPOSITORY.fullmatch(name)]
    return named[0] if len(named) == 1 else None


def name_without_method(name: str) -> str | None:
    """The name of a repository or folder up to where it tells how its model is quantized; None if it does not tell."""
    last = name.rstrip("/").rpartition("/")[2]
    found = _METHOD.search(last)
    return last[: found.start()] or None if found else None


def original_of(name: str, card: str) -> str:
    """The model that a quantized one was made from, in words.

    Args:
        name: of the repository or folder of the quantized one.
        card: the text of its card; empty if there is none.
    """
    if (told := base_in_card(card)) is not None and told.casefold() != name.casefold():
        return f"{quoted(told)} (the original, by its card)"
    if (guessed := name_without_method(name)) is not None:
        return f"{quoted(guessed)} (which seems to be the original, by the name of this one)"
    return "the original model, before it was quantized"
