"""The weight files that a job has acquired, until it needs them no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self


class HeldFiles:
    """Weight files that are released once: when ``release`` is called, at the latest when the context is left.

    Args:
        files: their names.
        release: releases one of them.
    """

    def __init__(self, files: Iterable[str], release: Callable[[str], object]) -> None:
        self._held = list(files)
        self._release = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Release all that are held still."""
        while self._held:
            self._release(self._held.pop())
