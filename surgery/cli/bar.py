"""Progress for people: one bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress

from surgery.cli.text import can_show, cells, clock, duration, redraw, shorten, shown, size, tell, terminal_width

#: Seconds between two checks whether a phase has something to show, and between two drawings of its bar.
_LOOK, _DRAW = 0.5, 0.1
#: Off a terminal: seconds before the first line of a phase, and the least and the most between two lines.
_FIRST_LINE, _LEAST_GAP, _MOST_GAP = 5.0, 2.0, 60.0
#: Off a terminal: seconds before the first line of a phase whose length is not known.
_FIRST_WITHOUT_TENTHS = 20.0
#: Seconds over which the rate is averaged.
_RATE_SECONDS = 30.0
_EIGHTHS = "▏▎▍▌▋▊▉█"


class Bar:
    """Shows the progress of an operation on stderr; a ``surgery.progress.Progress`` that several threads may call.

    On a terminal it draws a bar. Elsewhere, as in the log of a job, it writes a line for each tenth, or each minute if that is
    sooner, and none for a phase that is over within seconds.
    """

    def __init__(self, *, quiet: bool, notes: bool = True) -> None:
        self._quiet, self._notes = quiet, notes and not quiet
        self._drawn = 0  # cells
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._phase: _Phase | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()

    def start(self, label: str, total_bytes: int) -> None:
        self.finish()
        if self._quiet:
            return
        with self._lock:
            self._phase = _Phase(label, total_bytes)
            self._over.clear()
            # Drawn by a thread, so that the bar moves also while nothing is reported, as during a large matrix.
            thread = threading.Thread(target=self._look, name="surgery-progress", daemon=True)
            with suppress(RuntimeError):  # the system starts no more threads, and the work can do without this one
                thread.start()
                self._thread = thread
            self._show()

    def item(self, name: str) -> None:
        with self._lock:
            if self._phase is not None:
                self._phase.name = name
                self._show()

    def advance(self, n_bytes: int) -> None:
        with self._lock:
            if self._phase is not None:
                self._phase.advance(n_bytes)
                self._show()

    def note(self, message: str) -> None:
        if not self._notes:
            return
        with self._lock:
            self._clear()
            tell(f"note: {message}")
            self._show(at_once=True)

    def finish(self) -> None:
        with self._lock:
            self._phase = None
            self._clear()
            self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _look(self) -> None:
        while not self._over.wait(_LOOK):
            with self._lock:
                self._show()

    def _show(self, *, at_once: bool = False) -> None:
        phase, now = self._phase, time.monotonic()
        if phase is None:
            return
        if not self._on_terminal:
            if phase.is_due(now):
                tell(phase.line(now))
        elif at_once or now - phase.last >= _DRAW:
            phase.last = now
            self._draw(phase.bar(now, _room()))

    def _clear(self) -> None:
        if self._drawn:
            self._draw("")
            redraw("")

    def _draw(self, line: str) -> None:
        length = cells(line)
        redraw(line, over=min(self._drawn, _room()) - length)
        self._drawn = length


class _Phase:
    """How far a phase of an operation is.

    Attributes:
        name: the file or tensor that is worked on.
        last: the time of ``time.monotonic`` when it was last shown.
    """

    def __init__(self, label: str, total: int) -> None:
        self.name = ""
        self._label, self._total, self._done = label, total, 0
        self._since = time.monotonic()
        self.last = self._since
        self._last_line, self._tenths = self._since, 0
        self._points = deque([(self._since, 0)])

    def advance(self, count: int) -> None:
        now = time.monotonic()
        self._done += count
        if len(self._points) > 1 and now - self._points[-2][0] < _LOOK:
            self._points.pop()
        self._points.append((now, self._done))
        while len(self._points) > 2 and now - self._points[1][0] >= _RATE_SECONDS:
            self._points.popleft()

    def is_due(self, now: float) -> bool:
        """Whether a log should get a line now; if so, it counts as written."""
        tenths = 10 * self._done // self._total if self._total else 0
        gap = _LEAST_GAP if tenths > self._tenths else _MOST_GAP
        if self._last_line == self._since:
            gap = min(gap, _FIRST_WITHOUT_TENTHS) if not self._total else max(gap, _FIRST_LINE)
        due = now - self._last_line >= gap
        if due:
            self._last_line, self._tenths = now, tenths
        return due

    def line(self, now: float) -> str:
        """The line for a log."""
        if not self._total:
            parts = [f"{duration(now - self._since)} so far"]
        else:
            parts = [f"{self._percent()}%", f"{size(self._done)} of {size(self._total)}"]
            if (rate := self._rate(now)) > 0:
                parts += [f"{size(rate)}/s", f"{duration(self._left(rate))} left"]
        return f"{self._label}: {', '.join(parts)}" + (f", {self.name}" if self.name else "")

    def bar(self, now: float, width: int) -> str:
        """The bar for a terminal of so many cells: as much as fits, the numbers first."""
        name = shown(self.name, err=True)
        if not self._total:
            text = f"{self._label} {clock(now - self._since)}"
            room = width - cells(text) - 1
            return f"{text} {shorten(name, room, err=True)}" if name and room >= 8 else shorten(text, width, err=True)
        rate = self._rate(now)
        head, share = f"{self._label} ", f"{self._percent():3}%"
        amount = f" {_amount(self._done, self._total)}"
        speed, left = f" {size(rate) + '/s':>10}", f" {clock(self._left(rate)) if rate > 0 else '-:--':>5}"
        room = width - len(head + share + speed + left)
        if room - len(amount) >= 32:
            room, speed = room - len(amount), amount + speed
        if room >= 24:
            length = min(40, room // 3)
            return f"{head}{share} {_bar(self._share(), length - 1)}{speed}{left} {shorten(name, room - length - 1, err=True)}"
        if room >= 6:
            return f"{head}{share} {_bar(self._share(), room - 1)}{speed}{left}"
        for text in (head + share + speed + left, head + share + speed, head + share):
            if len(text) <= width:
                return text
        return share[: max(width, 0)]

    def _share(self) -> float:
        return min(1.0, self._done / self._total)

    def _percent(self) -> int:
        return int(100 * self._share())

    def _left(self, rate: float) -> float:
        return max(0, self._total - self._done) / rate

    def _rate(self, now: float) -> float:
        """Bytes per second, averaged over the last ``_RATE_SECONDS``."""
        since, before = self._points[0]
        return (self._done - before) / (now - since) if now > since else 0.0


def _room() -> int:
    """How many cells a bar may take: all but the last column, after which a terminal may begin a new line."""
    return (terminal_width(err=True) or 80) - 1


def _bar(share: float, width: int) -> str:
    if not can_show(_EIGHTHS, err=True):
        return "[" + ("#" * int(share * (width - 2))).ljust(width - 2, ".") + "]"
    full, part = divmod(int(share * 8 * (width - 2)), 8)
    return "|" + (_EIGHTHS[-1] * full + (_EIGHTHS[part - 1] if part else "")).ljust(width - 2) + "|"


def _amount(done: int, total: int) -> str:
    """Two sizes in the unit of the larger one, such as ``4.9/12.3 GB``, with a width that does not change with ``done``."""
    number, unit = size(total).split(" ")
    return f"{done / total * float(number):{len(number)}.{1 if '.' in number else 0}f}/{number} {unit}"
