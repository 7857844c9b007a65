"""What the cards of results tell of them, besides what a manifest says."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.names import Train


@dataclass(frozen=True, slots=True)
class FoldedChanges:
    """How the weights of a folded model differ from those of the source.

    Attributes:
        changed: how many targets had scales other than 1, or a core other than the identity.
        adapted: how many tensors a LoRA adapter changed.
        dequantized: whether FP8 weights have become bfloat16.
        train: whether scales or cores were folded.
    """

    changed: int
    adapted: int = 0
    dequantized: bool = False
    train: Train = "scales"


@dataclass(frozen=True, slots=True)
class ExportedUpdate:
    """What an adapter has that scales or cores were exported as.

    Attributes:
        modules: how many it changes.
        rank: of all of them.
        train: whether it holds scales or cores; None for a LoRA that was trained on the residual.
        kind: what it was exported to: ``peft``, ``peft-trainable``, ``peft-pissa``, ``diffusers`` or ``kohya``.
    """

    modules: int
    rank: int
    train: Train | None = "scales"
    kind: str = "peft"
