"""What is said of matrices whose SVD did not reach its tolerance."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import few

#: As many are named.
_NAMED = 3


def unconverged_note(found: Mapping[str, float], of: str, tolerance: float, hint: str) -> str:
    """How many they are, the worst of them by name, and what to do.

    Args:
        found: their largest residuals over s_1, by their names; at least one.
        of: what they are some of: ``14 targets``.
        tolerance: that was to be reached.
        hint: what it means and what to do.
    """
    worst = sorted(found, key=lambda key: -found[key])
    named = few((f"{key} (residual {found[key]:.1e})" for key in worst), most=_NAMED)
    return f"the SVD of {len(found)} of {of} did not reach the tolerance {tolerance:g}: {named}. {hint}"
