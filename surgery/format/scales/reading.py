"""Reading and checking the tiny trainable file: its scales or cores, with or without the checkpoint that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surgery.errors import ScalesError, SurgeryError
from surgery.format.header import TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.name_map import NameMap, match_names, note_renamed
from surgery.format.safetensors import ShardReader
from surgery.format.scales.beside import read_beside
from surgery.format.scales.entries import check_owner, entries_of, fingerprint_in, owner_of, plain_shape, seen_as, train_of
from surgery.format.scales.no_scales import refuse_other_tensors
from surgery.format.scales.path import scales_file
from surgery.lossless.rounding import check_dense
from surgery.names import TRAINED, TRAINS, Train
from surgery.progress import note

#: Multipliers are 1 before a training, and stay nearer to it than to 0 but for a few. Of fewer than four nothing is said.
_NEAR_ZERO, _NEARLY_ALL, _FEW = 0.5, 0.9, 4


@dataclass(frozen=True, slots=True)
class ScalesFile:
    """The contents of a scales file, read without the factorized checkpoint.

    Attributes:
        values: maps the key of each target to its scales, float32 (k,), or (B, k) for a stack; or to its core, float32
            (k, k), or (B, k, k) for a stack. All are finite, on the CPU, and sorted by name.
        fingerprint: the fingerprint of the factors that the scales belong to; None if the file does not say.
        train: what the file holds: ``scales``, or ``core`` for cores.
        beside: what a training stores for itself (docs/format.md), under the names ``chosen`` and ``orthogonal``. Each
            of them maps the key of a target to a tensor on the CPU: uint8 (k,) or (B, k) for ``chosen``, float32 for
            ``orthogonal``.
    """

    values: dict[str, torch.Tensor]
    fingerprint: str | None
    train: Train = "scales"
    beside: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trained:
    """The contents of a scales file that belongs to a factorized checkpoint.

    Attributes:
        values: key of each target -> as ``ScalesFile.values``.
        train: which of the two they are.
        beside: as ``ScalesFile.beside``.
    """

    values: dict[str, torch.Tensor]
    train: Train
    beside: dict[str, dict[str, torch.Tensor]]


def read_scales_alone(path: Path) -> ScalesFile:
    """Read a scales file without the checkpoint that it belongs to. Names are taken as they are.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: no such file, no scales in it, damaged metadata, or a tensor whose dtype, shape or numbers scales
            cannot have.

    Warns:
        SurgeryWarning, or a note where somebody listens: it holds half-precision values, float64 values that float32
            has not, numbers that do not look like multipliers, or more than scales; or nothing tells whether they are scales
            of stacks or cores.
    """
    path = scales_file(path)
    with _open(path) as reader:
        refuse_other_tensors(reader.header, path)
        owner = owner_of(reader.header.metadata, path)
        fingerprint = fingerprint_in(owner, path)
        entries, others = entries_of(reader.header, (), owner, path)
        train = train_of(owner, path) or seen_as(entries, path)
        shapes = {entry.name: plain_shape(entry, train, path) for entry in entries}
        note_reshaped({entry.name: (entry.shape, shapes[entry.name]) for entry in entries}, str(path))
        values = _checked(_read(reader, {entry.name: entry for entry in entries}, shapes, path), sorted(shapes), train, path)
        beside = read_beside(reader, others, {name: name for name in values}, values, train)
    return ScalesFile(values, fingerprint, train, beside)


def read_scales(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read the scales or cores of a factorized checkpoint, as ``read_trained`` does, and return its ``values``."""
    return read_trained(path, manifest).values


def read_trained(path: Path, manifest: Manifest) -> Trained:
    """Read the scales or cores of a factorized checkpoint, and what a training keeps beside them.

    Names that differ from those of the targets as ``surgery.format.name_map`` tells, and shapes that differ in sizes of 1, are
    taken for what they stand for.

    Args:
        path: the file, or a folder that holds one.
        manifest: of the checkpoint.

    Returns:
        ``values``: for the key of each target of the manifest float32 (k,), or (B, k) for a stack; cores are (k, k) or
        (B, k, k).

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: no such file, or something else than scales; made for other factors, or a tensor is missing, unknown,
            misshapen or not finite; or some are scales and others are cores.

    Warns:
        SurgeryWarning, or a note where somebody listens: the file says nothing about its factors, or has other names
            or shapes than these; it holds half-precision values, float64 values that float32 has not, numbers that do not look
            like multipliers, or more than scales.
    """
    path = scales_file(path)
    with _open(path) as reader:
        refuse_other_tensors(reader.header, path, manifest)
        owner = owner_of(reader.header.metadata, path)
        check_owner(owner, manifest, path)
        found, others = entries_of(reader.header, {target.key for target in manifest.targets}, owner, path)
        entries = {entry.name: entry for entry in found}
        shapes = {name: list(entry.shape) for name, entry in entries.items()}
        given, train = _check_shapes(shapes, manifest, train_of(owner, path), str(path))
        named = {key: entries[name] for key, name in given.items()}
        shaped = _read(reader, named, {target.key: target.shape_of(train) for target in manifest.targets}, path)
        values = _checked(shaped, shaped, train, path)
        beside = read_beside(reader, others, given, values, train)
    return Trained(values, train, beside)


def train_in(path: Path, manifest: Manifest) -> Train | None:
    """Whether a file holds scales or cores, by its header alone; None where it cannot be read, or does not tell."""
    try:
        with _open(path) as reader:
            said = train_of(owner_of(reader.header.metadata, path), path)
            shapes = {entry.name: list(entry.shape) for entry in reader.header.tensors}
    except SurgeryError:
        return None
    targets = {target.key: target for target in manifest.targets}
    given = match_names(shapes, targets).given
    return said or (_by_shapes(_fitting(shapes, given, targets)) if given else None)


def _open(path: Path) -> ShardReader:
    if not path.is_file():
        is_address = re.match(r"\w\w+:/", str(path)) is not None
        raise ScalesError(
            f"there is no scales file {path}",
            got="a link that leads nowhere" if path.is_symlink() else None,
            hint="scales are read from a file on this machine: hf download fetches one"
            if is_address
            else "a fresh one is surgery/scales.safetensors in the factorized folder",
        )
    return ShardReader(path, name=str(path))


def _read(
    reader: ShardReader, named: Mapping[str, TensorEntry], shapes: Mapping[str, Sequence[int]], path: Path
) -> dict[str, torch.Tensor]:
    """Read the numbers of entries, in float32 and in the given shapes."""
    values, rounded = {}, 0
    for key, entry in named.items():
        value = reader.read(entry) if entry.dtype != "F64" else reader.read_bytes(entry).view(torch.float64)
        single = value.float()
        if bool((single.isinf() & value.isfinite()).any()):
            raise ScalesError(f"{path}: {entry.name!r} holds a number beyond the range of float32", got=f"{entry.dtype}")
        rounded += int(((single != value) & ~value.isnan()).sum())
        values[key] = single.reshape(list(shapes[key]))
    if rounded:
        total = sum(value.numel() for value in values.values())
        note(f"{path}: {rounded} of {total} numbers are rounded from F64 to float32")
    return values


def check_scales(values: Mapping[str, torch.Tensor], manifest: Manifest) -> dict[str, torch.Tensor]:
    """Check scales against the targets of a manifest; arguments, result, errors and notes as for ``read_scales``."""
    for name, value in values.items():
        check_dense(value, f"scales: {name!r}")
    given, train = _check_shapes({name: list(value.shape) for name, value in values.items()}, manifest, None, "scales")
    shapes = {target.key: target.shape_of(train) for target in manifest.targets}
    named = {key: values[name].reshape(list(shapes[key])) for key, name in given.items()}
    return _checked(named, named, train, None)


def train_of_values(values: Mapping[str, torch.Tensor], manifest: Manifest) -> Train:
    """Whether the values of a checkpoint, as ``read_scales`` and ``check_scales`` give them, are scales or cores."""
    return "core" if any(values[target.key].shape != target.scales_shape for target in manifest.targets) else "scales"


def _checked(
    values: Mapping[str, torch.Tensor], names: Iterable[str], train: Train, file: Path | None
) -> dict[str, torch.Tensor]:
    """The scales of these names, float32, on the CPU; with a note if they do not look like multipliers."""
    where = str(file or "scales")
    checked = {name: _finite(name, values[name], where) for name in names}
    multipliers = [value if train == "scales" else value.diagonal(dim1=-2, dim2=-1) for value in checked.values()]
    # Somebody's own tensors that are all 0 are meant: they take the kept directions out.
    if _look_like_changes(multipliers) and (file is not None or any(value.any() for value in checked.values())):
        meant = (
            "scales are near 0: they look like changes g - 1, or logarithms, and not like the multipliers g, which are 1"
            if train == "scales"
            else "numbers on the diagonals of the cores are near 0: they look like changes C - I, and not like C, which is I"
        )
        note(f"{where}: nearly all {meant} where nothing has changed")
    return checked


def _look_like_changes(scales: Iterable[torch.Tensor]) -> bool:
    """Whether numbers that are meant as multipliers, which are 1 where nothing has changed, nearly all lie near 0."""
    sizes = torch.cat([value.flatten() for value in scales]).abs()
    return len(sizes) >= _FEW and bool((sizes < _NEAR_ZERO).double().mean() >= _NEARLY_ALL)


def _finite(name: str, value: torch.Tensor, where: str) -> torch.Tensor:
    """A tensor in float32, on the CPU; NaN and infinity are refused."""
    value = value.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise ScalesError(f"{where}: {name!r} holds NaN or infinity", hint="the training diverged: take an earlier checkpoint")
    return value


def _check_shapes(
    values: Mapping[str, list[int]], manifest: Manifest, said: Train | None, where: str
) -> tuple[dict[str, str], Train]:
    """Match names and shapes with the targets: key of each target -> the name that its scales have; and what they are.

    Args:
        said: what they are; None where only their shapes tell.
    """
    targets = {target.key: target for target in manifest.targets}
    names = match_names(values, targets)
    if not names.fits:
        raise _other_names(names, where, list(targets))
    note_renamed(names, where)
    fitting = _fitting(values, names.given, targets)
    train = said or _by_shapes(fitting)
    other: Train = "core" if train == "scales" else "scales"
    if wrong := [key for key in names.given if key not in fitting[train]]:
        # Of a file that is partly this and partly that, one that is otherwise, and not one that is misshapen.
        key = next((key for key in wrong if key in fitting[other]), wrong[0])
        why, hint = "", None
        if key in fitting[other]:
            expected = f"its metadata says {TRAINED[train]}" if said else f"others have {TRAINED[train]}"
            why = f": that of its {other}, where {expected}"
            hint = "one file has the scales of all targets, or the cores of all; diag(g) is the core of scales g"
        raise ScalesError(
            f"{where}: {names.given[key]!r} has the wrong shape{why}",
            got=values[names.given[key]],
            expected=list(targets[key].shape_of(train)),
            hint=hint,
        )
    note_reshaped({name: (values[name], targets[key].shape_of(train)) for key, name in names.given.items()}, where)
    return names.given, train


def _fitting(
    shapes: Mapping[str, list[int]], given: Mapping[str, str], targets: Mapping[str, TargetRecord]
) -> dict[Train, set[str]]:
    """The targets whose shapes are those of scales, and those whose shapes are those of cores. Of rank 1 they are the same."""
    return {
        train: {key for key, name in given.items() if same_but_for_ones(shapes[name], targets[key].shape_of(train))}
        for train in TRAINS
    }


def _by_shapes(fitting: Mapping[Train, set[str]]) -> Train:
    return "core" if len(fitting["core"]) > len(fitting["scales"]) else "scales"


def _other_names(names: NameMap, where: str, targets: list[str]) -> ScalesError:
    hint = "use the factorized folder these scales were trained with"
    if names.unknown:
        what = f"{where}: {names.unknown[0]!r} is no target of this checkpoint" + _and_more(names.unknown)
        if names.given:
            hint += "; tensors that are not scales belong in another file"
    else:
        what = f"{where}: the scales of {names.missing[0]!r} are missing" + _and_more(names.missing)
    expected = f"{len(targets)}, one for each target, such as {(names.missing or targets)[0]!r}"
    return names.misfit(ScalesError, what, targets, expected=expected, hint=hint)


def same_but_for_ones(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are the same but for sizes of 1, and so are those of the same numbers in the same order."""
    return [size for size in shape if size != 1] == [size for size in other if size != 1]


def note_reshaped(shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]], where: str) -> None:
    """Warn where a shape is taken for another one: name -> the shape that is there, and the one that is meant."""
    for name, (there, meant) in shapes.items():
        if list(there) != list(meant):
            note(f"{where}: {name!r} is of shape {list(there)}, and is taken for {list(meant)}")
            return


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
