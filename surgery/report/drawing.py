"""What all pictures are made of. A picture is a small SVG inside of a page, with the page's colours and fonts.

Text and axes are drawn in ``currentColor`` and lines in custom properties of the page (``--layer-0`` and so on), so
that one picture serves light and dark. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from surgery.report.summary import Floats, Group, steps
from surgery.report.words import MINUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Shades between the first and the last layer.
SHADES = 16
#: Placeholders for colours that the page decides: matplotlib's SVG writer takes only real colours.
INK, FAINT = "#010203", "#010204"
_SHADE = "#0102{:02x}"
_FIRST_SHADE = 0x10

#: In inches of 72 units; a phone is about 270 units wide. Fixed margins keep the axes of panels in line.
_WIDTH, _LEFT, _RIGHT, _BOTTOM = 3.6, 0.68, 0.24, 0.45
LINES_HEIGHT = 1.95
_LAYERS = "viridis"
#: Colours of values that shrank, grew and turned. They stand out from a light and from a dark page, and colour-blind eyes tell
#: them apart. What did not change has the page's own colour.
SHRANK, GREW, TURNED = "#2f7fc1", "#c9432b", "#9a5cc6"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "surgery",
    "font.family": "DejaVu Sans",  # what matplotlib brings along; the page sets its own
    "font.size": 9,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "hatch.linewidth": 0.6,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
    "text.usetex": False,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    Attributes:
        group: the name of the group it shows; not escaped.
        about: what it covers, in words.
        description: what it shows, in words and numbers.
        svg: what is drawn, without the element around it.
        size: width and height of the drawing in its own units.
    """

    group: str
    about: str
    description: str
    svg: str
    size: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels that share their scales.

    Attributes:
        panels: one for each group.
        low, high: the values at the ends of the colour scale.
    """

    panels: list[Panel]
    low: float = 0.0
    high: float = 0.0


def layer_colors(*, dark: bool) -> list[str]:
    """A shade for each step from the first to the last layer, that stands out from a light or a dark page."""
    start, stop = (0.32, 1.0) if dark else (0.0, 0.7)
    return [mpl.colors.to_hex(color) for color in mpl.colormaps[_LAYERS](np.linspace(start, stop, SHADES))]


def diverging_colors() -> list[str]:
    """The colour scale from shrunk to grown, with the unchanged in the middle."""
    return [SHRANK, "transparent", GREW]


def turning_colors() -> list[str]:
    """The colour scale from turned to unturned."""
    return [TURNED, "transparent"]


@contextmanager
def canvas(inner: float, rows: int = 1, above: float = 0.1) -> Iterator[Any]:
    """A figure and its axes, one below the other.

    Args:
        inner: height of the axes in inches.
        rows: how many there are.
        above: room over each, in inches.
    """
    height = rows * (above + inner) + _BOTTOM
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, height))
        figure.patch.set_visible(False)
        all_axes = []
        for row in range(rows):
            bottom = height - (row + 1) * (above + inner)
            box = (_LEFT / _WIDTH, bottom / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, inner / height)
            all_axes.append(figure.add_axes(box))
            all_axes[-1].patch.set_visible(False)
        yield (figure, *all_axes)


def finished(figure: Figure, group: Group, description: str) -> Panel:
    out = io.StringIO()
    with style.context(["default", _STYLE]):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    width, height = (72 * float(length) for length in figure.get_size_inches())
    return Panel(group.name, group.extent, description, _inline(out.getvalue()), (width, height))


def _inline(svg: str) -> str:
    """The drawing in an SVG file, made fit for a page: without prologue, fonts, and ids that other pictures may have too.

    Settings of matplotlib do what they can: no metadata, text as text, which also leaves out comments, and ids that are salted
    hashes. For the rest there are none up to version 3.11: it names every group, writes its own style sheet, six decimals in
    every path and old names of attributes, and takes no colour that is left to the page.
    """
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r' d="([^"]*)"', lambda found: f' d="{_rounded(found[1])}"', body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = body.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    for shade in range(SHADES):
        body = body.replace(_SHADE.format(_FIRST_SHADE + shade), f"var(--layer-{shade})")
    return "\n".join(filter(None, map(str.strip, body.split("\n"))))


def _rounded(path: str) -> str:
    """The data of an SVG path with coordinates rounded to a tenth of a unit, which is less than a pixel."""
    tokens = (token if token.isalpha() else f"{float(token):.1f}".removesuffix(".0") for token in path.split())
    return " ".join(tokens)


def shade(layer: int | None, layers: tuple[int, int]) -> str:
    if layer is None:
        return INK
    first, last = layers
    return _SHADE.format(_FIRST_SHADE + round((layer - first) / max(1, last - first) * (SHADES - 1)))


def layer_lines(
    axes: Axes, group: Group, layers: tuple[int, int], at: NDArray[np.int64], before: Floats, after: Floats | None
) -> None:
    for line, row in enumerate(group.rows):
        color = shade(row.layer, layers)
        if after is None:
            axes.plot(at, before[line], color=color, linewidth=1)
        else:
            axes.plot(at, before[line], color=color, linewidth=2.6, alpha=0.35, solid_capstyle="butt")
            axes.plot(at, after[line], color=color, linewidth=0.8)


def faded(which: NDArray[np.int64], colors: Sequence[str], strength: Floats) -> Floats:
    """Colours (rows, columns, 4): of each cell the one at ``which``, transparent at strength 0 and solid at 1."""
    solid = np.array([mpl.colors.to_rgb(color) for color in colors])[which]
    return np.concatenate([solid, np.clip(strength, 0, 1)[..., np.newaxis]], axis=-1)


def heat_map(axes: Axes, group: Group, cells: Floats, colors: Floats) -> None:
    """Cells (rows, columns) in their colours (rows, columns, 4), and hatching where they are NaN."""
    rows, columns = cells.shape
    colors = np.where(np.isfinite(cells)[..., np.newaxis], colors, 0)
    extent = (0, columns, rows, 0)
    axes.imshow(np.round(255 * colors).astype(np.uint8), interpolation="none", aspect="auto", extent=extent)
    unknown = [Path([(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1), (x, y)]) for y, x in np.argwhere(~np.isfinite(cells))]
    if unknown:
        together = Path.make_compound_path(*unknown)
        axes.add_patch(PathPatch(together, facecolor="none", edgecolor=FAINT, hatch="/" * 9, linewidth=0))
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=FAINT)
    every = max(1, math.ceil(rows / 8))
    places = [row for row in range(rows) if row % every == 0]
    names = [MINUS if group.rows[row].layer is None else str(group.rows[row].layer) for row in places]
    axes.set_yticks([row + 0.5 for row in places], labels=names)
    axes.tick_params(length=2)
    axes.set_ylabel("layer")


def map_height(group: Group) -> float:
    """The height of a heat map's axes, in inches."""
    return min(2.2, max(0.35, 0.14 * len(group.rows)))


def step_axis(axes: Axes, k: int, *, label: bool = True) -> None:
    """Label the horizontal axis of a picture whose columns are ``steps`` of ``k`` directions."""
    columns = steps(k)
    wanted = [index for index in (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if index <= k]
    places = [next(i for i, column in enumerate(columns) if index <= column.stop) + 0.5 for index in wanted]
    axes.set_xticks(places, labels=[str(index) for index in wanted] if label else [""] * len(wanted))
    if label:
        axes.set_xlabel("direction")


def index_axis(axes: Axes, k: int, label: str = "direction") -> None:
    """Label a horizontal log axis over ``k`` directions."""
    axes.set_xlim(0.9, max(k, 2) * 1.1)
    powers = [2**power for power in range(k.bit_length())]
    axes.xaxis.set_major_locator(FixedLocator(powers[:: 2 if len(powers) > 6 else 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda index, _: f"{index:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def plain_log(axes: Axes) -> None:
    """Label a vertical log axis with plain numbers, and with enough of them if it spans less than a power of ten."""
    low, high = axes.get_ylim()
    marks = [factor * 10.0**power for power in range(-12, 12) for factor in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) < 3:
        marks = [factor * 10.0**power for power in range(-12, 12) for factor in (1, 1.5, 2, 3, 4, 5, 7)]
        inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > 7:
        inside = [mark for mark in inside if f"{mark:e}".startswith("1")]
    axes.yaxis.set_major_locator(FixedLocator(inside[:: max(1, math.ceil(len(inside) / 7))]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def line_indices(k: int) -> NDArray[np.int64]:
    """The indices from 1 to ``k`` that a line is drawn through."""
    return np.array(sorted({column.start + 1 for column in steps(k)} | {k}))
