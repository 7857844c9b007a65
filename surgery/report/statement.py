"""``Statement``: a finding in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statement:
    """One question, its answer in a few words, and the numbers for it."""

    question: str
    answer: str
    details: str
