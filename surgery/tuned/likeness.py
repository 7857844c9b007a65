"""Whether a changed model looks like a fine-tuned version of the original, by the norms of its weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.progress import note

#: A fine-tuned matrix is at less than 60 degrees to the original, and has half to twice its norm: changes of up to half of
#: the norm, which are large ones, leave it within 30 degrees. Two models of other seeds are at 90.
_RELATED, _SIZES = 0.5, (0.5, 2.0)


@dataclass(frozen=True, slots=True)
class Norms:
    """Frobenius norms of an original matrix, of the tuned one, and of their difference.

    Attributes:
        key: of the target that the matrix belongs to.
        before, after, change: the three norms.
    """

    key: str
    before: float
    after: float
    change: float

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two matrices, as vectors of their entries; None where one is 0."""
        if not self.before or not self.after:
            return None
        ratio = self.after / self.before
        return (1 + ratio**2 - (self.change / self.before) ** 2) / (2 * ratio)


def note_what_is_unlikely(name: str, found: Sequence[Norms]) -> None:
    """Tell a note where a model does not look like a fine-tuned version of the original.

    That is so if no matrix has changed, if matrices are hardly related to the original ones, or if they are much larger or
    smaller.

    Args:
        name: of the model.
        found: the norms of each matrix that was compared.
    """
    if all(norms.change == 0 for norms in found):
        note(
            f"{name} has the same weights as the original in all {len(found)} matrices that were compared: the original was "
            "given twice, nothing was trained, or its steps were smaller than the rounding of the dtype it was saved in",
        )
        return
    known = [norms for norms in found if norms.before]
    apart = [norms for norms in known if norms.cosine is not None and norms.cosine < _RELATED]
    if len(apart) > len(known) / 2:
        change = statistics.median(norms.change / norms.before for norms in apart)
        note(
            f"{name} has hardly anything in common with the original in {len(apart)} of {len(known)} matrices: the change is "
            f"{change:.3g} times the weights' norm, and 1.41 between unrelated models of one size. It looks like a model of "
            "another seed, one that was trained from nothing, or one whose weights are in another order",
        )
    elif apart:
        note(
            f"{name} has hardly anything in common with the original in {len(apart)} of {len(known)} matrices, first "
            f"{apart[0].key!r}: they look as if they had been trained from scratch, and not fine-tuned",
        )
    low, high = _SIZES
    scaled = [norms for norms in known if norms not in apart and not low <= norms.after / norms.before <= high]
    if scaled:
        ratio = statistics.median(norms.after / norms.before for norms in scaled)
        note(
            f"{name} has {ratio:.3g} times the norm of the original in {len(scaled)} of {len(known)} matrices, first "
            f"{scaled[0].key!r}: it looks like weights without their quantization scales, or a merge with a wrong factor",
        )
