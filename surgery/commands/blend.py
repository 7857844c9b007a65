"""The verb ``blend``: a weighted mean of the scales or cores of several trainings of the same factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from surgery.device import on_its_own_terms
from surgery.errors import OptionError, ScalesError
from surgery.format.name_map import match_names, note_renamed
from surgery.format.scales.entries import note_without_owner
from surgery.format.scales.reading import ScalesFile, note_reshaped, same_but_for_ones
from surgery.format.scales.writing import as_cores, distance, untouched, write_scales
from surgery.names import Train
from surgery.progress import Progress
from surgery.reports import Report
from surgery.run.output_paths import check_output_path
from surgery.trained.reading import read_alone, trained_path

Space = Literal["linear", "log"]


@dataclass(frozen=True, slots=True)
class BlendReport(Report):
    """What a blend wrote.

    Attributes:
        out: the file.
        weights: the weights of the files, as they were used: their sum is 1.
        space: the space in which the mean was taken.
        train: what the file holds: ``scales``, or ``core`` for cores.
        targets: how many targets there are.
        trainable: how many numbers the file holds.
        changed: how many of these numbers differ from an untouched file: from 1 for scales, from the identity for
            cores.
        fingerprint: the fingerprint of the factors that the numbers belong to; None if no file gives it.
    """

    out: Path
    weights: tuple[float, ...]
    space: Space
    train: Train
    targets: int
    trainable: int
    changed: int
    fingerprint: str | None


@on_its_own_terms
def blend(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    space: Space = "linear",
    factorized: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BlendReport:
    """Write the weighted mean of scales files that belong to the same factors.

    With weights w of sum 1, a scale becomes ``sum_j w_j g_j``, or in log space ``exp(sum_j w_j log g_j)``. A core
    becomes ``sum_j w_j C_j``. If some files hold scales and others cores, scales g count as the cores ``diag(g)``. The
    mean is computed in float64 and rounded once.

    A folded weight is linear in its scales or core. So the linear mean gives the mean of the folded models. A weight
    may be negative, in either space: then the effect of that training is subtracted. What a training stores for itself
    in a file, such as its choice of directions, is not in the blend. The factorized checkpoint is not needed.

    Args:
        files: one or more scales files, or folders of adapters as for ``show_scales``.
        out: the file to write.
        weights: one finite number for each file. surgery scales them to the sum 1. By default all are equal.
        space: ``linear``, or ``log``, which works for scales only.
        factorized: the checkpoint, if an adapter does not name its weights itself, see ``show_scales``.
        overwrite: replace ``out`` if it exists.
        progress: receives the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        What was written, with the weights as they were used.

    Raises:
        OptionError: there are no files, the numbers of weights and files differ, or the sum of the weights is not
            positive.
        ScalesError: the files have different factors, names or shapes; or, in log space, a scale is not positive or a
            file holds cores; or a mean is outside the range of float32.
        FormatError: a file is damaged.
        OutputError: ``out`` exists already, is one of the files, or cannot be written.

    Warns:
        SurgeryWarning: a file does not say which factors it belongs to, or holds half-precision values, or numbers that
            do not look like multipliers.
    """
    shares = _normalised(weights, len(files))
    given, out = [Path(file) for file in files], Path(out)
    paths = [trained_path(path) for path in given]
    check_output_path(out, paths, overwrite=overwrite)
    folder = None if factorized is None else Path(factorized)
    contents = [read_alone(path, folder) for path in paths]
    fingerprint = _fingerprint_of(paths, contents)
    train: Train = "core" if any(file.train == "core" for file in contents) else "scales"
    if train == "core":
        contents = [_of_cores(path, file, space) for path, file in zip(paths, contents, strict=True)]
    alike = [contents[0].values, *(_as_the_first(paths, contents, index) for index in range(1, len(paths)))]
    means = {}
    for key in alike[0]:
        mean = _mean(key, paths, [values[key].double() for values in alike], shares, space, train)
        if not bool(torch.isfinite(mean).all()):
            raise ScalesError(
                f"the blend of {key!r} is beyond the range of float32", hint="take weights that are closer to one another"
            )
        means[key] = mean
    write_scales(out, means, fingerprint, train)
    changed = sum(int(distance(mean, train).count_nonzero()) for mean in means.values())
    numbers = sum(mean.numel() for mean in means.values())
    return BlendReport(out, shares, space, train, len(means), numbers, changed, fingerprint)


def _normalised(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One weight for each of ``count`` files, scaled so that they sum to 1; all the same for None."""
    if not count:
        raise OptionError("no scales files to blend", expected="one or more")
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise OptionError("there must be one weight for each file", got=f"{len(given)} weights", expected=f"{count} weights")
    if not all(math.isfinite(weight) for weight in given):
        raise OptionError("a weight is no finite number", got=", ".join(map(str, given)))
    largest = max(map(abs, given))
    # Divided by the largest first, so that huge or tiny weights have a sum as well. A sum of 1e-9 after that is rounding.
    scaled = [weight / largest for weight in given] if largest else given
    total = math.fsum(scaled)
    if total < 1e-9:
        raise OptionError(
            "the sum of the weights is not positive, or too close to 0",
            got=f"{', '.join(f'{weight:g}' for weight in given)}, in all {sum(given):g}",
        )
    return tuple(weight / total for weight in scaled)


def _fingerprint_of(paths: Sequence[Path], contents: Sequence[ScalesFile]) -> str | None:
    """The fingerprint that all files have which name one; None if none does."""
    owned: dict[str, Path] = {}
    for path, file in zip(paths, contents, strict=True):
        if file.fingerprint is None:
            note_without_owner(path)
        else:
            owned.setdefault(file.fingerprint, path)
    if len(owned) > 1:
        (one, first), (other, second) = list(owned.items())[:2]
        raise ScalesError(
            f"{first} and {second} belong to different factors",
            got=f"fingerprint {other}",
            expected=f"fingerprint {one}",
            hint="blend scales that were trained with the same factorized folder",
        )
    return next(iter(owned), None)


def _of_cores(path: Path, file: ScalesFile, space: Space) -> ScalesFile:
    """A file as one of cores: scales g are the cores ``diag(g)``."""
    if file.train == "scales":
        return dataclasses.replace(file, values={key: as_cores(value) for key, value in file.values.items()}, train="core")
    if space == "log":
        raise ScalesError(f"{path} holds cores, of which there is no geometric mean", hint="blend in linear space")
    return file


def _as_the_first(paths: Sequence[Path], contents: Sequence[ScalesFile], index: int) -> dict[str, torch.Tensor]:
    """The scales of a file under the names and in the shapes of the first one."""
    first, path, values = paths[0], paths[index], contents[index].values
    names = match_names(values, contents[0].values)
    if not names.fits:
        odd, has, lacks = (names.missing[0], first, path) if names.missing else (names.unknown[0], path, first)
        what, hint = f"{odd!r} is in {has} and not in {lacks}", "blend scales that were trained with the same factorized folder"
        raise names.misfit(ScalesError, what, contents[0].values, expected="the same targets in all files", hint=hint)
    note_renamed(names, str(path), f"those in {first}")
    shapes = {}
    for key, one in contents[0].values.items():
        shapes[names.given[key]] = (there, meant) = list(values[names.given[key]].shape), list(one.shape)
        if not same_but_for_ones(there, meant):
            raise ScalesError(f"{key!r} has another shape in {path} than in {first}", got=there, expected=meant)
    note_reshaped(shapes, str(path))
    return {key: values[names.given[key]].reshape(one.shape) for key, one in contents[0].values.items()}


def _mean(
    key: str, paths: Sequence[Path], values: Sequence[torch.Tensor], weights: Sequence[float], space: Space, train: Train
) -> torch.Tensor:
    """The weighted mean of float64 tensors of one shape, as float32."""
    shares, stacked = torch.tensor(weights, dtype=torch.float64), torch.stack(list(values))
    if space == "linear":
        # The mean of the distances from what is untouched: so what is 1 in every file stays exactly 1, also if the weights do
        # not sum to 1.
        mean: torch.Tensor = torch.tensordot(shares, distance(stacked, train), dims=1)
        return (untouched(mean, train) + mean).float()
    for path, value in zip(paths, values, strict=True):
        if not bool((value > 0).all()):
            raise ScalesError(
                f"{path}: {key!r} has a scale that is not positive, and so has no logarithm",
                got=f"{value.min().item():g}",
                hint="blend in linear space",
            )
    mean = torch.tensordot(shares, stacked.log(), dims=1).exp()
    return mean.float()
