"""The pictures of a report with their captions and legends, as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from surgery.report import plots
from surgery.report.drawing import SHADES, Panel, Picture, diverging_colors, turning_colors
from surgery.report.summary import Group, median, relative_update
from surgery.report.words import html_text, number, percent

#: The most groups that get pictures: with more the page would be too long to scroll through.
MAX_PANELS = 24


def pictures(spectra: dict[str, Any], groups: Sequence[Group]) -> str:
    """All pictures as HTML, with a note on groups that they leave out and on matrices that they put together."""
    r, tuned = spectra["options"]["subspace"], spectra["tuned"] is not None
    drawn = _drawn(groups, tuned=tuned)
    numbers = [row.layer for group in groups for row in group.rows if row.layer is not None]
    layers = (min(numbers), max(numbers)) if numbers else (0, 0)
    notes = []
    if len(drawn) < len(groups):
        chosen = "changed the most" if tuned else "hold the most matrices"
        notes.append(f"Of {len(groups)} groups, the {len(drawn)} that {chosen} are drawn; the others are in the tables.")
    stacked = [group for group in drawn if group.stacked]
    if stacked:
        most = max(len(row.targets) for group in stacked for row in group.rows)
        notes.append(
            f"Where a layer has several matrices of a group, such as experts (up to {most:,} here), each line, dot or cell is "
            "their median."
        )
    if any(row.layer is None for group in drawn for row in group.rows):
        notes.append("Matrices outside of the layers are drawn in the colour of the text, and have a dash for a number.")
    parts = [f'<p class="note">{" ".join(notes)}</p>\n'] if notes else []

    layer_key = [_layer_key(layers)] if len(set(numbers)) > 1 else []
    two = (
        [
            '<span class="swatch wide"></span>base (wide and pale)',
            '<span class="swatch thin"></span>tuned (thin); where only one line shows, they lie on each other',
        ]
        if tuned
        else []
    )
    parts.append(
        _figure(
            "spectra",
            "Singular values before and after" if tuned else "Singular values",
            "Both axes are logarithmic: a straight line is a power law.",
            [*layer_key, *two],
            plots.spectra_picture(drawn, layers),
        )
    )
    if tuned:
        parts += _pictures_of_change(drawn, layers, layer_key, r)
    parts.append(
        _figure(
            "energy",
            "Energy by rank",
            "The share of the squared norm that the leading directions hold together. "
            "The less a curve needs to reach half, the better a low rank stands for the matrix.",
            [*layer_key, *two, '<span class="swatch half"></span>half'],
            plots.energy_picture(drawn, layers),
        )
    )
    return "".join(parts)


def _pictures_of_change(drawn: Sequence[Group], layers: tuple[int, int], layer_key: list[str], r: int) -> list[str]:
    steps = (
        "The first 16 directions have a column each, later ones share columns that get wider, with the median of their values."
    )
    amplification = plots.amplification_picture(drawn, r)
    rotation = plots.rotation_picture(drawn, r)
    update = plots.update_picture(drawn, layers, r)
    hatched = '<span class="swatch hatched"></span>'
    return [
        _figure(
            "amplification",
            "Amplification",
            "Above, singular values of the tuned model over those of the base by their place in the order; below, each "
            "direction of the base in place, uᵀ W′ v / s. Red grew, blue shrank, and what has the colour of the page did not "
            f"change. {steps}",
            [
                _bar(diverging_colors(), percent(amplification.low, signed=True), percent(amplification.high, signed=True))
                + " or more",
                f"{hatched}no value",
            ],
            amplification,
        ),
        _figure(
            "rotation",
            "Rotation",
            "The cosine between a direction and the one that it became, wherever that is in the order: what has the colour of "
            f"the page did not turn. {steps}",
            [
                _bar(turning_colors(), number(rotation.low) + (" or less" if rotation.low else ""), "1"),
                f"{hatched}not identified: the matrix does not determine this direction, in one of the models, or it is gone",
            ],
            rotation,
        ),
        _figure(
            "update",
            "Where the update lies",
            f"The share of the update's energy inside the subspaces of the base's first {r} left directions, right directions, "
            f"and both; and the share that new scales of these {r} directions explain. On a logarithmic scale"
            f"{f'; shares below {percent(update.low)} are drawn there' if update.low < 1e-7 else ''}.",
            [
                *layer_key,
                '<span class="dot"></span>one layer',
                '<span class="tick"></span>chance: what a random update would have',
            ],
            update,
        ),
    ]


def _drawn(groups: Sequence[Group], *, tuned: bool) -> list[Group]:
    """The groups that get pictures, in the order of the checkpoint."""

    def weight(group: Group) -> float:
        return median(map(relative_update, group.targets)) or 0.0 if tuned else len(group.targets)

    order = sorted(range(len(groups)), key=lambda i: -weight(groups[i]))
    return [groups[i] for i in sorted(order[:MAX_PANELS])]


def _figure(name: str, heading: str, caption: str, key: Sequence[str], picture: Picture) -> str:
    legend = f'<ul class="key">{"".join(f"<li>{item}</li>" for item in key)}</ul>\n' if key else ""
    panels = "".join(_panel(f"{name}-{i}", heading, panel) for i, panel in enumerate(picture.panels))
    return (
        f'<h3 id="{name}">{heading}</h3>\n<figure aria-labelledby="{name}">\n<figcaption>{caption}</figcaption>\n{legend}'
        f'<div class="panels">\n{panels}</div>\n</figure>\n'
    )


def _panel(name: str, heading: str, panel: Panel) -> str:
    width, height = (number(length) for length in panel.size)
    group = html_text(panel.group)
    # Ids are unique inside a drawing only; on a page they must differ from those of the other drawings.
    svg = panel.svg.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return (
        f'<div class="panel">\n<p class="name"><bdi>{group}</bdi></p>\n<p class="about">{panel.about}</p>\n'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{heading}: {group}, {panel.about}</title>\n'
        f'<desc id="{name}-desc">{html.escape(panel.description)}</desc>\n{svg}\n</svg>\n</div>\n'
    )


def _layer_key(layers: tuple[int, int]) -> str:
    shades = ", ".join(f"var(--layer-{i})" for i in range(SHADES))
    return _gradient(shades, f"layer {layers[0]}", f"layer {layers[1]}")


def _bar(colors: Sequence[str], low: str, high: str) -> str:
    return _gradient(", ".join(colors), low, high)


def _gradient(colors: str, low: str, high: str) -> str:
    return f'{low}<span class="bar" style="background: linear-gradient(to right, {colors})"></span>{high}'
