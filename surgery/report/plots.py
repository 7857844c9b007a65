"""The pictures of a report: what each shows of a group, drawn and described in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from surgery.report.drawing import (
    FAINT,
    GREW,
    INK,
    LINES_HEIGHT,
    SHRANK,
    TURNED,
    Panel,
    Picture,
    canvas,
    faded,
    finished,
    heat_map,
    index_axis,
    layer_lines,
    line_indices,
    map_height,
    plain_log,
    shade,
    step_axis,
)
from surgery.report.summary import Floats, Group, Target, in_steps, median, steps
from surgery.report.words import cosine, number, percent


def spectra_picture(groups: Sequence[Group], layers: tuple[int, int]) -> Picture:
    """Singular values over the index on two log scales, one line a layer; those of the tuned model on top."""
    tuned = "amplification" in groups[0].targets[0]

    def panel(group: Group) -> Panel:
        at = line_indices(group.k)
        before = group.table(lambda target: target["singular_values"])
        after = group.table(lambda target: target["tuned"]["singular_values"]) if tuned else None
        with canvas(LINES_HEIGHT) as (figure, axes):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            layer_lines(axes, group, layers, at, before[:, at - 1], after[:, at - 1] if after is not None else None)
            index_axis(axes, group.k)
            axes.set_ylabel("singular value")
            plain_log(axes)
        first, last = before[:, 0], before[:, -1]
        words = f"Singular values fall from {_range(first)} at index 1 to {_range(last)} at index {group.k}"
        if after is not None:
            words += f"; in the tuned model from {_range(after[:, 0])} to {_range(after[:, -1])}"
        return finished(figure, group, words + ".")

    return Picture([panel(group) for group in groups])


def energy_picture(groups: Sequence[Group], layers: tuple[int, int]) -> Picture:
    """The share of the squared norm in the leading directions, over the rank, one line a layer."""
    tuned = "amplification" in groups[0].targets[0]

    def panel(group: Group) -> Panel:
        # A matrix of zeros has no energy to share.
        ranks = sorted({int(rank) for target in group.targets for rank in target["energy"]}) or [1]

        def held_by(of: Callable[[Target], Target]) -> Floats:
            return group.table(lambda target: [of(target)["energy"].get(str(rank)) for rank in ranks], len(ranks))

        before, after = held_by(lambda target: target), held_by(lambda target: target["tuned"]) if tuned else None
        with canvas(LINES_HEIGHT) as (figure, axes):
            axes.set_xscale("log", base=2)
            axes.axhline(0.5, color=FAINT, linewidth=1)
            layer_lines(axes, group, layers, np.array(ranks), before, after)
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
            index_axis(axes, ranks[-1], "rank")
            axes.set_ylabel("energy held")
        marks = [rank for rank in (1, 16, ranks[-1]) if rank in ranks]
        held = ", ".join(f"rank {rank} holds {_range(before[:, ranks.index(rank)], percent)}" for rank in dict.fromkeys(marks))
        return finished(figure, group, f"Of the energy, {held}.")

    return Picture([panel(group) for group in groups])


#: Rows of the picture of amplification: the key in ``spectra.json``, and what the row is called.
_AMPLIFICATIONS = (("amplification", "by order"), ("in_place", "in place"))


def amplification_picture(groups: Sequence[Group], r: int) -> Picture:
    """Amplification by index and layer, as colours around 1: above of values by their order, below of directions in place."""
    tables = [[group.table(itemgetter(key)) - 1 for key, _ in _AMPLIFICATIONS] for group in groups]
    drawn = [[in_steps(table, steps(group.k)) for table in pair] for group, pair in zip(groups, tables, strict=True)]
    sizes = np.concatenate([np.abs(table[np.isfinite(table)]) for pair in drawn for table in pair])
    limit = _round_up(float(np.quantile(sizes, 0.98))) if sizes.size else 0.01

    def panel(group: Group, pair: list[Floats], cells: list[Floats]) -> Panel:
        words = []
        with canvas(map_height(group), rows=2, above=0.24) as (figure, *both):
            for axes, table, shown, (_, name) in zip(both, pair, cells, _AMPLIFICATIONS, strict=True):
                heat_map(axes, group, shown, faded(np.where(shown < 0, 0, 1), (SHRANK, GREW), np.abs(shown) / limit))
                axes.set_title(name, fontsize=9, loc="left", pad=3)
                step_axis(axes, group.k, label=name == _AMPLIFICATIONS[-1][1])
                words.append(_of_amplification(group, table, name, r))
        return finished(figure, group, " ".join(words))

    return Picture([panel(*item) for item in zip(groups, tables, drawn, strict=True)], -limit, limit)


def _of_amplification(group: Group, table: Floats, name: str, r: int) -> str:
    known = table[np.isfinite(table)]
    if not known.size:
        return f"No amplification {name} is known."
    row, index = np.unravel_index(int(np.nanargmax(np.abs(table))), table.shape)
    layer = group.rows[row].layer
    where = "outside of the layers" if layer is None else f"in layer {layer}"
    words = f"Amplification {name} goes from {_factor(1 + known.min())} to {_factor(1 + known.max())}; its median is "
    words += _signed_median(table[:, :r], f"over the first {min(r, group.k)} directions")
    if group.k > r:
        words += f" and {_signed_median(table[:, r:], 'over the others')}"
    return words + f". It is farthest from 1 {where} at direction {index + 1}: {_factor(1 + table[row, index])}."


def rotation_picture(groups: Sequence[Group], r: int) -> Picture:
    """Cosines between directions and what they became by index and layer: left ones above, right ones below."""
    tables = [[group.table(itemgetter(side)) for side in ("left_cosine", "right_cosine")] for group in groups]
    drawn = [[in_steps(table, steps(group.k)) for table in pair] for group, pair in zip(groups, tables, strict=True)]
    known = np.concatenate([table[np.isfinite(table)] for pair in drawn for table in pair])
    low = next((x for x in (0.999, 0.99, 0.9, 0.5) if known.size and np.quantile(known, 0.02) >= x), 0.0)

    def panel(group: Group, pair: list[Floats], cells: list[Floats]) -> Panel:
        words = []
        with canvas(map_height(group), rows=2, above=0.24) as (figure, *both):
            for axes, table, shown, side in zip(both, pair, cells, ("left", "right"), strict=True):
                heat_map(axes, group, shown, faded(np.zeros(shown.shape, dtype=int), (TURNED,), (1 - shown) / (1 - low)))
                axes.set_title(side, fontsize=9, loc="left", pad=3)
                step_axis(axes, group.k, label=side == "right")
                top = table[:, :r][np.isfinite(table[:, :r])]
                part = f"the {side} cosines of the first {min(r, group.k)} directions "
                part += (
                    f"go from {cosine(top.min())} to {cosine(top.max())}, median {cosine(float(np.median(top)))}"
                    if top.size
                    else "are unknown"
                )
                blank = 1 - float(np.isfinite(table).mean())
                words.append(part + (f", {percent(blank)} of all cosines are left blank" if blank else ""))
        text = "; ".join(words)
        return finished(figure, group, text[0].upper() + text[1:] + ".")

    return Picture([panel(*item) for item in zip(groups, tables, drawn, strict=True)], low, 1.0)


#: Rows of the picture of the update: the key in ``spectra.json``, what the row is called, and the share that chance gives in an
#: m x n matrix.
_SHARES: tuple[tuple[str, str, Callable[[int, int, int], float]], ...] = (
    ("in_left", "in left", lambda m, n, r: r / m),
    ("in_right", "in right", lambda m, n, r: r / n),
    ("in_both", "in both", lambda m, n, r: r * r / (m * n)),
    ("rescaling", "rescaling", lambda m, n, r: r / (m * n)),
)


def update_picture(groups: Sequence[Group], layers: tuple[int, int], r: int) -> Picture:
    """Shares of the update's energy in the base's top subspaces, one dot a layer, with what chance would have."""

    def shares(group: Group, key: str) -> list[tuple[int | None, float]]:
        found = ((row.layer, row.median(lambda target: target["update"] and target["update"][key])) for row in group.rows)
        return [(layer, share) for layer, share in found if share is not None]

    def chance(group: Group, of: Callable[[int, int, int], float]) -> float:
        shapes = (target["shape"] for target in group.targets)
        return median(of(m, n, min(r, m, n)) for m, n in shapes) or 0.0

    everything = [
        share for group in groups for key, _, of in _SHARES for _, share in (*shares(group, key), (None, chance(group, of)))
    ]
    low = 10 ** math.floor(math.log10(max(min((share for share in everything if share > 0), default=0.1), 1e-8)))

    def panel(group: Group) -> Panel:
        words = []
        with canvas(1.2) as (figure, axes):
            axes.set_xscale("log")
            axes.set_xlim(low * 0.8, 1.25)
            for y, (key, name, of) in enumerate(_SHARES):
                axes.axhline(y, color=FAINT, linewidth=0.6, zorder=0)
                found = shares(group, key)
                for layer, share in found:
                    axes.plot(
                        max(share, low), y, "o", color=shade(layer, layers), markersize=4.5, alpha=0.85, markeredgewidth=0
                    )
                expected = chance(group, of)
                axes.plot([max(expected, low)] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=1.8, solid_capstyle="butt")
                middle = median(share for _, share in found)
                words.append(f"{name} {percent(middle)} (chance {percent(expected)})")
            axes.set_ylim(len(_SHARES) - 0.45, -0.55)
            axes.yaxis.set_major_locator(FixedLocator(range(len(_SHARES))))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _SHARES[round(y)][1]))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
            axes.xaxis.set_minor_locator(NullLocator())
            decades = round(math.log10(1 / low))
            axes.xaxis.set_major_locator(
                FixedLocator([10.0**-power for power in range(0, decades + 1, max(1, math.ceil(decades / 4)))])
            )
            axes.set_xlabel("share of the update's energy")
        return finished(figure, group, f"Median shares of the update's energy: {', '.join(words)}.")

    return Picture([panel(group) for group in groups], low)


def _range(values: Floats, word: Callable[[float], str] = number) -> str:
    """The least and the greatest of the values, in words."""
    known = values[np.isfinite(values)]
    if not known.size:
        return "unknown"
    low, high = word(float(known.min())), word(float(known.max()))
    return low if low == high else f"{low} to {high}"


def _signed_median(values: Floats, where: str) -> str:
    known = values[np.isfinite(values)]
    return f"{_factor(1 + float(np.median(known)))} {where}" if known.size else f"unknown {where}"


def _round_up(value: float) -> float:
    """A value rounded up to 1, 2 or 5 times a power of ten, and to 1e-6 at least."""
    value = max(value, 1e-6)
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if value <= factor * power * (1 + 1e-9))


def _factor(value: float) -> str:
    return f"{value:.4g}"
