"""How commands tell what became of updates: in their last line, and in a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from surgery.cli.tables import table

if TYPE_CHECKING:
    from surgery.format.top_k_records import TopKSummary
    from surgery.names import Train
    from surgery.run.merging import MergedTensor


def kept_of_update(kept: float | None, least: float | None, least_in: str | None = None) -> str:
    """What rounding kept of an update, as a part of a sentence that begins with a comma; empty if nothing was updated.

    Args:
        kept, least: of all updates together, and of the one that it kept least of.
        least_in: the name of that one, if it is to be told.
    """
    if kept is None or least is None:
        return ""
    all_of_it, worst = share_text(kept), share_text(least)
    where = "" if least_in is None else f" in {least_in}"
    return f", {all_of_it} of the update kept" + (f" (least {worst}{where})" if worst != all_of_it else "")


def share_text(share: float) -> str:
    """A share as a percentage. 100 % is all but for 0.05 %."""
    return f"{100 * share:.1f} %".replace("100.0", "100")


def size_text(size: float) -> str:
    """A size relative to another, as a percentage of two digits; of more from 100 % on, without a power of ten."""
    percent = 100 * size
    return f"{percent:.2g} %" if percent < 99.5 else f"{percent:,.0f} %"


def trainable_text(count: int, train: Train) -> str:
    """How many numbers there are to train, and in what."""
    return f"{count} trainable {'scales' if train == 'scales' else 'numbers in cores'}"


def top_k_text(known: TopKSummary) -> str:
    """Of how many matrices it is known that no larger singular value was missed."""
    counts = {"proven": known.proven, "likely": known.likely, "unknown": known.unknown}
    told = ", ".join(f"{verdict} for {count}" for verdict, count in counts.items() if count)
    margin = "" if known.margin is None else f", within {known.margin:.2e} of s_1 ({known.margin_in})"
    return f"no larger singular value missed: {told}{margin}"


def device_text(device: str) -> str:
    """A device as the manifest records it, without the processor's routines: these are for the bits, and not for a glance."""
    return device.rsplit(", ", 1)[0]


def table_of_merged(tensors: Sequence[MergedTensor]) -> str:
    """A table of the tensors that adapters change: those whose names differ in numbers alone have one row."""
    groups: dict[tuple[str, str], list[MergedTensor]] = {}
    for one in tensors:
        groups.setdefault((re.sub(r"\d+", "*", one.tensor), one.change), []).append(one)
    rows = [
        [
            name if len(some) > 1 else some[0].tensor,
            str(len(some)),
            change,
            span(one.rank for one in some if one.rank),
            median_share([one.size for one in some]),
            least_share([one.kept for one in some]),
        ]
        for (name, change), some in groups.items()
    ]
    return table(("tensors", "number", "change", "rank", "size", "kept"), rows, flush_right=(1, 3, 4, 5), names=(0,))


def span(values: Iterable[int]) -> str:
    """Numbers as the range that they are in; a dash for none."""
    found = sorted(set(values))
    return "-" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def median_share(sizes: Sequence[float | None]) -> str:
    """The median of those that are known, as a percentage; a dash for none."""
    known = sorted(size for size in sizes if size is not None)
    return size_text(known[len(known) // 2]) if known else "-"


def least_share(shares: Sequence[float | None]) -> str:
    """The least of those that are known, as a percentage; a dash for none."""
    known = [share for share in shares if share is not None]
    return share_text(min(known)) if known else "-"
