"""The error of an extraction that finds nothing for a low-rank pair, without which PEFT has no LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surgery.errors import OptionError, few
from surgery.escapes import quoted
from surgery.extraction.records import ExtractedShard
from surgery.planning.targets import matches
from surgery.updates.writing.low_rank import glob_of_alike

_KEEP = "keep the tuned checkpoint itself"


def nothing_to_extract(
    results: Sequence[ExtractedShard], further: Sequence[str], apart: Sequence[str], can_be_pairs: Callable[[str], bool]
) -> OptionError:
    """The error, which tells what else has changed, and what helps if anything does.

    Args:
        results: of all jobs.
        further: the tensors of the tuned model that the base does not have.
        apart: globs over the names of tensors that were not to become pairs.
        can_be_pairs: whether ``--include`` of a glob, alone, would make pairs.
    """
    targets = [one for result in results for one in result.targets]
    others = [one for result in results for one in result.others]
    got = f"{len(targets)} weights were compared"
    if any(matrix.change for one in targets for matrix in one.matrices):
        return OptionError("there is nothing to extract: no change stands above its noise", got=got, hint="--rank 8 takes some")
    changed = [one.tensor for one in others if one.fate in ("changed", "resized")]
    in_one_alone = [*(one.tensor for one in others if one.fate == "gone"), *further]
    if in_one_alone:
        got += f"; only one of the models has {few(in_one_alone)}"
    if not changed:
        if in_one_alone:
            what, hint = (
                "all that both models have is the same",
                f"an adapter holds changes of weights of the base alone: {_KEEP}",
            )
        else:
            what = "the two models have the same weights"
            hint = "extract from the fine-tuned model, as it was saved with all its digits"
        return OptionError(f"there is nothing to extract: {what}", got=got, hint=hint)
    matrices = [one.tensor for one in others if one.fate == "changed" and len(one.shape or ()) > 1]
    globs = [glob for glob in dict.fromkeys(map(glob_of_alike, matrices)) if can_be_pairs(glob)]
    if globs:
        hint = " ".join(["make pairs of matrices that have changed:", *(f"--include {quoted(glob)}" for glob in globs[:4])])
        if any(matches(name, apart) and matches(name, globs) for name in matrices):
            hint += ", which neither --exclude nor --full may match"
    else:
        hint = f"an adapter needs at least one pair of matrices, and none that could become one has changed: {_KEEP}"
    return OptionError(
        "there is nothing to extract: none of the weights that would become pairs has changed",
        got=f"{got}; changed: {few(changed)}",
        hint=hint,
    )
