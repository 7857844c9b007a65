"""Updates of stacks of experts, which PEFT adapts as parameters (``target_parameters``): which sides of a matrix they have.

Source: ``ParamWrapper`` of PEFT. 0.17 and 0.18 take every stack for (experts, in, out); 0.19.0 does, but for modules that say
that they are just that; all since 0.19.1 take them for (experts, out, in), but for modules that say that they are not.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence

from surgery.errors import OptionError
from surgery.updates.adapters.content import AdapterContent, ModuleUpdate
from surgery.updates.adapters.homes import Home, Homes

#: The first release that takes stacks as all after it do.
_TODAY = (0, 19, 1)


def sides_of_stacks(
    stacks: Sequence[tuple[str, ModuleUpdate]], homes: Homes, content: AdapterContent
) -> Mapping[str, tuple[Home, bool]]:
    """Parameter -> where it is, and whether A reads the rows of its matrices (rows, columns) rather than their columns.

    The shapes tell it, or those of another parameter of the module. Of square matrices the release of PEFT does.

    Raises:
        OptionError: a parameter is no stack, its update does not fit, or it cannot be told which way.
    """
    found: list[tuple[str, str, Home, bool | None]] = []
    told: dict[str, bool] = {}
    for parameter, one in stacks:
        home = homes.in_model(parameter) or homes.named(parameter)
        if home is None or len(home.shape) != 3:
            raise OptionError(
                f"{content.where}: {parameter!r} is no stack of matrices in this checkpoint",
                got=None if home is None else list(home.shape),
            )
        reads_rows = _reads_rows(content.version, _is_input_first(parameter, homes, content.where))
        count, rows, columns = home.shape
        sides = (math.prod(one.A.shape[1:]), len(one.B))
        if not count or len(one.A) % count or one.A.ndim != 2 or sides not in ((rows, columns), (columns, rows)):
            raise OptionError(
                f"{content.where}: the adapter's update of {parameter!r} does not fit its weight",
                got=[list(one.A.shape), list(one.B.shape)],
                expected=f"for {list(home.shape)}",
            )
        if rows != columns:
            told[one.module] = reads_rows = sides == (rows, columns)
        found.append((parameter, one.module, home, reads_rows))
    sided = {}
    for parameter, module, home, reads_rows in found:
        if home.shape[1] == home.shape[2]:
            reads_rows = told.get(module, reads_rows)
        if reads_rows is None:
            raise OptionError(
                f"{content.where}: it cannot be told which side of {parameter!r} is the input of the adapter's update",
                got=f"square matrices, {list(home.shape)}, and peft_version = {reprlib.repr(content.version)}",
                expected="in its adapter_config.json the release of PEFT that it was trained with, other than 0.19.0",
                hint="merge_and_unload() of the PEFT that it was trained with",
            )
        sided[parameter] = (home, reads_rows)
    return sided


def _reads_rows(version: object, is_input_first: bool) -> bool | None:
    """Whether PEFT of a version lets A read the rows of a stack's matrices; None where it is not known.

    Args:
        version: ``peft_version`` of the adapter's config, which PEFT writes since 0.18.
        is_input_first: whether the module of today's transformers says that it holds (experts, in, out). That of transformers 4
            did not say so: 0.19.0 may have asked either.
    """
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(\.dev)?", version) if isinstance(version, str) else None
    if found is None:
        return True if is_input_first else None
    release, is_between = tuple(int(number) for number in found.groups()[:3]), found[4] is not None
    if release > _TODAY or (release == _TODAY and not is_between):
        return is_input_first
    is_known = not is_between and (release < (0, 19, 0) or not is_input_first)
    return True if is_known else None


def _is_input_first(parameter: str, homes: Homes, where: str) -> bool:
    """Whether a module holds its experts as (experts, in, out), as PEFT asks it."""
    if homes.model is None:
        raise OptionError(
            f"{where}: {parameter!r} is a stack of experts of a model that transformers does not know",
            expected="a config.json of one that it does",
        )
    home = homes.in_model(parameter)
    carrier = None if home is None else home.carrier
    return carrier is not None and bool(getattr(carrier.layers[0].module, "is_transposed", False))
