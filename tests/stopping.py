"""Runs that are interrupted at a tensor."""

from __future__ import annotations

from surgery.progress import Silent


class StopAt(Silent):
    """Interrupts a run when it comes to a tensor."""

    def __init__(self, tensor: str) -> None:
        super().__init__()
        self._tensor = tensor

    def item(self, name: str) -> None:
        if name == self._tensor:
            raise KeyboardInterrupt
