"""What ``surgery demo`` prints of its report: the losses, two sentences word by word, and which scales changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from surgery.cli.tables import table
from surgery.cli.text import can_show, cells, fitted, shown, size, terminal_width

if TYPE_CHECKING:
    from surgery.demo.run import DemoReport
    from surgery.demo.sentence import SentenceLoss, WordLoss

#: Columns that the bars take at most, with their labels.
_BARS = 80
#: An indent of what is quoted.
_INDENT = "  "


def demo_text(report: DemoReport) -> str:
    """The report for people, in lines that fit the terminal."""
    most, median = report.sentences
    projections = dict(sorted(report.changed_by_projection.items(), key=lambda item: -item[1]))
    layers = {f"layer {number}": change for number, change in report.changed_by_layer.items()}
    untouched = (
        "gives the original files back, byte for byte" if report.untouched_fold_identical else "DIFFERS from the original files"
    )
    parts = [
        _losses(report),
        _paragraph(
            f"Trainable: {report.trainable / report.weights:.2%} of the weights. Loss: nats per byte of held-out English",
            f"prose; the model had learned Python source code. Folding untouched scales {untouched}.",
        ),
        _paragraph(
            f"{report.sentences_gained} of {report.sentences_measured} held-out sentences have become more probable.",
            "Under a word each + is a doubling of its probability, each - a halving, as many as fit.",
        ),
        _paragraph(f"The sentence that gained most, {_gain(most)}:"),
        marked(most.words),
        _paragraph(f"The sentence of median gain, {_gain(median)}:"),
        marked(median.words),
        _paragraph("How far the trained scales g are from 1, the mean of |g - 1| in percent:"),
        bars(projections, layers),
    ]
    return "\n\n".join(parts)


def _paragraph(*parts: str) -> str:
    return fitted(" ".join(parts), indent="")


def _losses(report: DemoReport) -> str:
    rows = [
        ["original model", f"{report.weights:,} weights", size(report.source_bytes), f"{report.loss_before:.4f}", ""],
        ["factorized", f"{report.targets} matrices", size(report.factorized_bytes), "", f"{report.seconds_factorize:.1f}"],
        [
            f"scales, {report.steps} steps",
            f"{report.trainable:,} trainable",
            size(report.scales_bytes),
            f"{report.loss_attached:.4f}",
            f"{report.seconds_train:.1f}",
        ],
        [
            "folded model",
            f"{report.weights:,} weights",
            size(report.source_bytes),
            f"{report.loss_folded:.4f}",
            f"{report.seconds_fold:.1f}",
        ],
    ]
    return table(["", "numbers", "on disk", "loss", "seconds"], rows, flush_right=range(1, 5))


def _gain(sentence: SentenceLoss) -> str:
    return f"{sentence.loss_before:.3f} -> {sentence.loss_folded:.3f} nats per byte"


def marked(words: tuple[WordLoss, ...]) -> str:
    """Words in lines that fit the terminal, under each line one with the marks of its words."""
    width = terminal_width()
    lines: list[tuple[str, str]] = []
    text = marks = ""
    for word in words:
        one = shown(word.text)
        if text and width is not None and cells(f"{_INDENT}{text} {one}") > width:
            lines.append((text, marks))
            text = marks = ""
        if text:
            text, marks = f"{text} ", f"{marks} "
        text += one
        marks += _mark(word, cells(one))
    lines.append((text, marks))
    return "\n".join(f"{_INDENT}{one}".rstrip() for line in lines for one in line)


def _mark(word: WordLoss, width: int) -> str:
    """A + for each doubling of a word's probability, a - for each halving, padded to the width of the word."""
    doublings = (word.nats_before - word.nats_folded) / math.log(2)
    return (("+" if doublings > 0 else "-") * min(int(abs(doublings)), width)).ljust(width)


def bars(*groups: Mapping[str, float]) -> str:
    """Bars of one scale, in groups: for each value its name, the value as a percentage, and a bar."""
    largest = max(max(group.values()) for group in groups)
    names = max(len(name) for group in groups for name in group)
    room = max(min(terminal_width() or _BARS, _BARS) - len(_INDENT) - names - len("  12.3  "), 1)
    full = "█" if can_show("█", err=False) else "#"

    def bar(name: str, value: float) -> str:
        cells_of_bar = round(room * value / largest) if largest else 0
        return f"{_INDENT}{name:<{names}}  {100 * value:4.1f}  {full * cells_of_bar}".rstrip()

    return "\n\n".join("\n".join(bar(name, value) for name, value in group.items()) for group in groups)
