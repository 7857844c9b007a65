"""The notes about matrices whose SVD did not reach its tolerance, or was not proven."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import few
from surgery.format.top_k_records import TopKRecord

#: How many of them the note names.
_NAMED = 3


def unconverged_note(found: Mapping[str, float], of: str, tolerance: float, hint: str) -> str:
    """The text of the note: how many there are, the worst of them by name, and what to do.

    Args:
        found: name -> largest residual over s_1; at least one.
        of: how many of what were solved, such as ``14 targets``.
        tolerance: the one that was asked for.
        hint: what it means and what to do.
    """
    worst = sorted(found, key=lambda key: -found[key])
    named = few((f"{key} (residual {found[key]:.1e})" for key in worst), most=_NAMED)
    return f"the SVD of {len(found)} of {of} did not reach the tolerance {tolerance:g}: {named}. {hint}"


def unproven_note(found: Mapping[str, TopKRecord], of: str) -> str:
    """The text of the note: of how many it is not proven that no larger singular value was missed, and the worst of them.

    Args:
        found: name -> what is known of it, or of the worst of its matrices; at least one.
        of: how many of what were to be proven, such as ``14 targets``.
    """
    worst = sorted(found, key=lambda key: found[key].rank, reverse=True)
    named = few((f"{key} ({found[key]})" for key in worst), most=_NAMED)
    return (
        f"for {len(found)} of {of} it is not proven that no larger singular value was missed: {named}. This "
        "does not make a fold less exact, but there may be larger directions than those that were kept; try another --rank or "
        "--seed"
    )
