"""Held-out sentences, word by word: how probable each word is for the original model, and for the folded one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

#: Bytes that a model sees at a time. The last ones are the sentence.
_WINDOW = 256
#: How many sentences are measured at most.
_MEASURED = 32
#: Bytes of a sentence: long enough to say something, short enough for a few lines and for text before it in the window.
_LEAST, _MOST = 60, 150
#: Plain English with at most some quoted code.
_PLAIN = re.compile(rb"[A-Z][a-z][A-Za-z0-9\"'_(),;:\s-]{0,200}\.")


@dataclass(frozen=True, slots=True)
class WordLoss:
    """A word of a sentence, with the spaces before it.

    Attributes:
        text: the word, without spaces.
        nats_before: minus the log of the probability that the original model gives it after the text before it.
        nats_folded: the same for the folded model.
    """

    text: str
    nats_before: float
    nats_folded: float


@dataclass(frozen=True, slots=True)
class SentenceLoss:
    """A sentence, and how probable two models find it.

    Attributes:
        text: the sentence in one line.
        loss_before, loss_folded: in nats per byte of this sentence: of the original model, and of the folded one.
        words: the words of the sentence in order.
    """

    text: str
    loss_before: float
    loss_folded: float
    words: tuple[WordLoss, ...]

    @property
    def gain(self) -> float:
        """By how many nats the whole sentence has become more probable; negative if it has become less so."""
        return sum(word.nats_before - word.nats_folded for word in self.words)


def measure_sentences(before: Any, folded: Any, text: torch.Tensor, trained_on: torch.Tensor) -> list[SentenceLoss]:
    """Some sentences of a text, evenly spread over it, those of the largest gain first.

    Args:
        before, folded: causal language models of bytes.
        text: held-out text, int64 (bytes,).
        trained_on: the training text, int64 (bytes,). Its topics share some sentences with the held-out ones: these
            are passed over.
    """
    data, seen = bytes(text.tolist()), in_one_line(bytes(trained_on.tolist()).decode())
    spans = _spread([(start, end) for start, end in find_sentences(data) if in_one_line(data[start:end].decode()) not in seen])
    windows = torch.stack([text[end - _WINDOW : end] for _, end in spans])
    nats = [_nats(model, windows) for model in (before, folded)]
    # A row of nats ends where its sentence ends.
    measured = [
        _measured(data[start:end], *(one[i, start - end :].tolist() for one in nats)) for i, (start, end) in enumerate(spans)
    ]
    return sorted(measured, key=lambda sentence: -sentence.gain)


def _measured(sentence: bytes, before: list[float], folded: list[float]) -> SentenceLoss:
    """The report of a sentence, from the nats of its bytes."""
    words = []
    for word in re.finditer(rb"\s*\S+", sentence):
        start, end = word.span()
        words.append(WordLoss(word.group().decode().strip(), sum(before[start:end]), sum(folded[start:end])))
    return SentenceLoss(
        text=" ".join(word.text for word in words),
        loss_before=sum(before) / len(sentence),
        loss_folded=sum(folded) / len(sentence),
        words=tuple(words),
    )


def find_sentences(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each plain sentence of a text that has enough text before it to fill a window."""
    for paragraph in re.finditer(rb"(?:[^\n]+\n)+", data):
        start = paragraph.start()
        for end in (*(gap.end() for gap in re.finditer(rb"\.\s+(?=[A-Z])", paragraph.group())), len(paragraph.group())):
            one = data[start : paragraph.start() + end]
            begin, stop = start + len(one) - len(one.lstrip()), start + len(one.rstrip())
            if _LEAST <= stop - begin <= _MOST and stop >= _WINDOW and _PLAIN.fullmatch(data, begin, stop):
                yield begin, stop
            start = paragraph.start() + end


def in_one_line(text: str) -> str:
    """A text with one space in place of each line end and indent, to compare texts."""
    return " ".join(text.split())


def _spread(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most so many of them, spread evenly."""
    count = min(len(spans), _MEASURED)
    return [spans[i * len(spans) // count] for i in range(count)]


@torch.no_grad()
def _nats(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Minus the log probability of each byte but the first: int64 (n, w) -> float32 (n, w - 1)."""
    logits = torch.cat([model(input_ids=some).logits for some in torch.split(windows, 16)])
    return -logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
