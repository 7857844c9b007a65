"""What a scales file holds, as the parameters of a way to train it."""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.errors import ScalesError
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.scales.reading import read_trained
from surgery.format.scales.writing import as_cores, distance
from surgery.training.ways import Way, change_from, numbers_of_way, saved_as

#: By how much, relative to a core, the core that parameters amount to may differ from it: both were rounded to float32.
_TOLERANCE = 1e-4


class TrainedFile:
    """A scales file of a checkpoint, read.

    Args:
        path: of the file, or of a folder that holds one.
        manifest: of the checkpoint.

    Attributes:
        file: what is in it.

    Raises:
        ScalesError, FormatError, ReadError: see ``read_trained``.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.file = read_trained(path, manifest)
        self._path = path

    def values(self, target: TargetRecord, way: Way) -> torch.Tensor:
        """The scales or core of a target, as ``saved_as`` of the way says which.

        Raises:
            ScalesError: scales are wanted, and it is a core that turns directions.
        """
        value = self.file.values[target.key]
        if saved_as(way) == self.file.train:
            return value
        if self.file.train == "scales":
            return as_cores(value)
        if (scales := _scales_in(value)) is None:
            raise ScalesError(
                f"{self._path}: the core of {target.key!r} turns directions, which scales do not",
                got="a file of cores",
                expected="scales, or cores that are diagonal",
                hint='attach with train="core"',
            )
        return scales

    def parameters(self, target: TargetRecord, way: Way) -> torch.Tensor:
        """The parameters of all directions of a target, float32 (B, numbers).

        Raises:
            ScalesError: it has a core that this way cannot train, or parameters that are damaged or amount to another core.
        """
        value = self.values(target, way)
        k, count = target.rank, target.matrices[0]
        if way != "orthogonal":
            return distance(value, saved_as(way)).reshape(count, -1)
        given = self.file.beside.get("orthogonal", {}).get(target.key)
        if given is not None:
            return self._checked(given, value, target)
        if (scales := _scales_in(value)) is None:
            raise ScalesError(
                f"{self._path}: the core of {target.key!r} has not been trained as an orthogonal one",
                expected="a file that was saved by such a training, or one of scales",
                hint='attach with train="core", which takes any core',
            )
        parameters = value.new_zeros(count, numbers_of_way(way, k))
        parameters[:, -2 * k : -k] = scales.reshape(count, k) - 1  # diag(1 + a), with A and b zero
        return parameters

    def _checked(self, given: torch.Tensor, core: torch.Tensor, target: TargetRecord) -> torch.Tensor:
        """Parameters that a file keeps beside a core, held against it."""
        k, count = target.rank, target.matrices[0]
        shape = [*target.scales_shape[:-1], numbers_of_way("orthogonal", k)]
        if list(given.shape) != shape:
            raise ScalesError(
                f"{self._path}: the orthogonal parameters of {target.key!r} are misshapen",
                got=list(given.shape),
                expected=shape,
            )
        parameters = given.float().reshape(count, -1)
        apart = change_from("orthogonal", parameters.double(), k) - distance(core.reshape(count, k, k).double(), "core")
        if not bool(apart.norm() <= _TOLERANCE * core.double().norm()):  # NaN is not either
            raise ScalesError(
                f"{self._path}: the orthogonal parameters of {target.key!r} do not amount to its core",
                hint='the file has been changed; train="core" passes over them',
            )
        return parameters

    def chosen(self, target: TargetRecord) -> torch.Tensor:
        """Which directions of a target are trained, bool (B, k): all where the file does not say.

        Raises:
            ScalesError: that is damaged, or a direction that is not chosen has been changed.
        """
        k, count = target.rank, target.matrices[0]
        given = self.file.beside.get("chosen", {}).get(target.key)
        if given is None:
            return torch.ones(count, k, dtype=torch.bool)
        fits = tuple(given.shape) == target.scales_shape and bool(((given == 0) | (given == 1)).all())
        chosen = given.reshape(count, -1).bool()
        if not fits or len(set(chosen.sum(dim=1).tolist())) != 1 or not bool(chosen.any()):
            raise ScalesError(
                f"{self._path}: the choice of directions of {target.key!r} is damaged",
                got=f"{given.dtype} {list(given.shape)}",
                expected=f"1 for each that is trained, else 0, of shape {list(target.scales_shape)}; as many in each matrix",
            )
        if not self.is_untouched_outside(target, chosen):
            raise ScalesError(f"{self._path}: directions of {target.key!r} have been changed that are not among those chosen")
        return chosen

    def is_untouched_outside(self, target: TargetRecord, chosen: torch.Tensor) -> bool:
        """Whether a target is untouched but in the directions (B, k) that are chosen."""
        change = distance(self.file.values[target.key], self.file.train).reshape(len(chosen), -1)
        inside = chosen if self.file.train == "scales" else (chosen.unsqueeze(2) & chosen.unsqueeze(1)).flatten(1)
        return not bool(change[~inside].any())


def _scales_in(core: torch.Tensor) -> torch.Tensor | None:
    """The scales that a core amounts to; None if it turns directions."""
    scales = core.diagonal(dim1=-2, dim2=-1)
    return scales if torch.equal(as_cores(scales), core) else None
