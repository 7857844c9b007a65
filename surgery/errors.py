"""The exception hierarchy. Every failure a user can cause or meet is one of these.

SurgeryError
 +-- OptionError     (ValueError)   an option or argument that makes no sense here
 +-- SourceError     (OSError)      the model cannot be found, reached or used
 +-- FormatError     (ValueError)   a file breaks its own format
 +-- WeightError     (ValueError)   a weight that cannot be factorized (NaN, infinity)
 +-- ScalesError     (ValueError)   scales that do not fit the factors
 +-- OutputError     (OSError)      the output folder or the disk under it
 +-- MissingExtra    (ImportError)  an optional package is needed for this
"""

from __future__ import annotations


class SurgeryError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what went wrong, naming the file and the tensor, as one sentence without a full stop.
        got: what was found.
        expected: what would have been right.
        hint: what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        lines = [what]
        if got is not None:
            lines.append(f"  got:      {got}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if hint is not None:
            lines.append(f"  try:      {hint}")
        super().__init__("\n".join(lines))
        self.what, self.got, self.expected = what, got, expected


class OptionError(SurgeryError, ValueError):
    """An option or argument that makes no sense, alone or with the others."""


class SourceError(SurgeryError, OSError):
    """The model cannot be found, reached or used."""


class FormatError(SurgeryError, ValueError):
    """A file breaks its own format: truncated, garbage, or inconsistent."""


class WeightError(SurgeryError, ValueError):
    """A weight holds a value that cannot be factorized (NaN or infinity)."""


class ScalesError(SurgeryError, ValueError):
    """Scales that do not fit the factors they are applied to."""


class OutputError(SurgeryError, OSError):
    """The output folder or the disk under it cannot be used."""


class MissingExtra(SurgeryError, ImportError):
    """An optional package is needed for what was asked."""


class SurgeryWarning(UserWarning):
    """A note that nobody else hears: what works but is probably not meant, or what an operation has done by itself."""
