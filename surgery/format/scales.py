"""The tiny trainable file: one multiplier per kept singular direction."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.errors import ScalesError, few
from surgery.files.file_writer import FileWriter
from surgery.files.json_files import decode_json
from surgery.format.header import Header, TensorEntry, make_header
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import TargetRecord
from surgery.format.name_map import NameMap, match_names, note_renamed
from surgery.format.no_scales import refuse_other_tensors
from surgery.format.safetensors import ShardReader
from surgery.format.scales_path import scales_file
from surgery.lossless.rounding import check_dense
from surgery.memory import bytes_of
from surgery.names import FORMAT_VERSION, SCALES_METADATA_KEY
from surgery.progress import note

#: Multipliers are 1 before a training, and stay nearer to it than to 0 but for a few. Of fewer than four nothing is said.
_NEAR_ZERO, _NEARLY_ALL, _FEW = 0.5, 0.9, 4
_DTYPES = ("F32", "F64", "F16", "BF16")
#: What trainings keep beside what they train.
_COUNTERS = re.compile(r"(.*[._])?(steps?|epochs?|iter(ation)?s?|lr|learning_rate|loss|seed|count|num_batches_tracked)")


@dataclass(frozen=True, slots=True)
class ScalesFile:
    """A scales file as it is, without the factorized checkpoint.

    Attributes:
        values: key of a target -> float32 (k,), or (B, k) for a stack, on the CPU, finite; sorted by name.
        fingerprint: of the factors that they belong to; None where the file does not say.
    """

    values: dict[str, torch.Tensor]
    fingerprint: str | None


def write_scales(path: Path, scales: Mapping[str, torch.Tensor], fingerprint: str | None) -> None:
    """Write scales, with the fingerprint of the factors that they belong to.

    Args:
        path: the file, replaced as a whole.
        scales: key of a target -> (k,), or (B, k) for a stack, written as float32.
        fingerprint: that of the manifest of the factorized checkpoint; None, where it is not known, leaves it out.
    """
    belongs_to = json.dumps({"format_version": FORMAT_VERSION, "fingerprint": fingerprint})
    named = sorted(scales.items())
    entries = [TensorEntry(name, "F32", tuple(value.shape), 0, 4 * value.numel()) for name, value in named]
    with FileWriter(path) as writer:
        writer.write(make_header(entries, {} if fingerprint is None else {SCALES_METADATA_KEY: belongs_to}))
        for _, value in named:
            writer.write(bytes_of(value.detach().to("cpu", torch.float32).contiguous()))
        writer.commit(path.name)


def write_untouched(path: Path, targets: Collection[TargetRecord], fingerprint: str) -> None:
    """Write the scales of all targets, each 1, as ``write_scales`` does. Those of one shape share memory: there may be many."""
    ones = {shape: torch.ones(shape) for shape in {target.scales_shape for target in targets}}
    write_scales(path, {target.key: ones[target.scales_shape] for target in targets}, fingerprint)


def read_scales_alone(path: Path) -> ScalesFile:
    """Read a scales file without the checkpoint that it belongs to. Names are taken as they are.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: no such file, no scales in it, damaged metadata, or a tensor whose dtype, shape or numbers scales
            cannot have.

    Warns:
        SurgeryWarning, or a note where somebody listens: it holds half-precision values, float64 values that float32
            has not, numbers that do not look like multipliers, or more than scales.
    """
    path = scales_file(path)
    with _open(path) as reader:
        refuse_other_tensors(reader.header, path)
        fingerprint = _fingerprint(reader.header.metadata, path)
        entries = _entries(reader.header, (), path)
        shapes = {entry.name: _plain_shape(entry, path) for entry in entries}
        note_reshaped({entry.name: (entry.shape, shapes[entry.name]) for entry in entries}, str(path))
        values = _read(reader, {entry.name: entry for entry in entries}, shapes, path)
    return ScalesFile(_checked(values, sorted(values), path), fingerprint)


def read_scales(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read the scales of a factorized checkpoint.

    Names that differ from those of the targets as ``surgery.format.name_map`` tells, and shapes that differ in sizes of 1, are
    taken for what they stand for.

    Args:
        path: the file, or a folder that holds one.
        manifest: of the checkpoint.

    Returns:
        Key of a target -> float32 (k,), or (B, k) for a stack, on the CPU, for each target of the manifest.

    Raises:
        FormatError: no safetensors file, or a damaged one.
        ScalesError: no such file, or something else than scales; made for other factors, or a tensor is missing, unknown,
            misshapen or not finite.

    Warns:
        SurgeryWarning, or a note where somebody listens: the file says nothing about its factors, or has other names
            or shapes than these; it holds half-precision values, float64 values that float32 has not, numbers that do not look
            like multipliers, or more than scales.
    """
    path = scales_file(path)
    with _open(path) as reader:
        refuse_other_tensors(reader.header, path, manifest)
        _check_owner(reader.header.metadata, manifest, path)
        entries = {entry.name: entry for entry in _entries(reader.header, {target.key for target in manifest.targets}, path)}
        shapes = {name: list(entry.shape) for name, entry in entries.items()}
        given = _check_shapes(shapes, manifest, str(path))
        named = {key: entries[name] for key, name in given.items()}
        values = _read(reader, named, {target.key: target.scales_shape for target in manifest.targets}, path)
    return _checked(values, values, path)


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


def _entries(header: Header, wanted: Collection[str], path: Path) -> list[TensorEntry]:
    """The entries that may be scales. Single numbers that a training keeps beside them are left out, with a note."""
    entries, others = [], []
    for entry in header.tensors:
        is_counter = entry.dtype not in _DTYPES or _COUNTERS.fullmatch(entry.name)
        if entry.name not in wanted and math.prod(entry.shape) == 1 and is_counter:
            others.append(entry.name)
        elif entry.dtype in _DTYPES:
            entries.append(entry)
        else:
            raise ScalesError(f"{path}: {entry.name!r} has a dtype that scales cannot have", got=entry.dtype, expected="F32")
    if not entries:
        raise ScalesError(f"{path} holds no scales")
    if others:
        note(f"{path} holds what is no scale, and is not used: {few(sorted(others))}")
    if half := sorted({entry.dtype for entry in entries} & {"BF16", "F16"}):
        note(
            f"{path} holds {' and '.join(half)} scales: next to 1 they are spaced by "
            f"{'2^-7' if 'BF16' in half else '2^-10'}; train them in float32"
        )
    return entries


def _plain_shape(entry: TensorEntry, path: Path) -> list[int]:
    """The shape (k,) or (B, k) of scales where no checkpoint says it: other dimensions must be of size 1."""
    shape = list(entry.shape)
    if len(shape) > 2:
        shape = [size for size in shape if size != 1]
    if len(shape) not in (1, 2) or 0 in shape:
        raise ScalesError(
            f"{path}: {entry.name!r} has a shape that scales cannot have",
            got=list(entry.shape),
            expected="(k,), or (B, k) for a stack",
        )
    return shape


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
        note(f"{path}: {rounded} of {total} scales are rounded from F64 to float32")
    return values


def _owner(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What a scales file says it belongs to; None if nothing."""
    if SCALES_METADATA_KEY not in metadata:
        return None
    said = metadata[SCALES_METADATA_KEY]
    try:
        owner = decode_json(said)
    except ValueError as error:
        raise ScalesError(f"{path}: its metadata is damaged ({error})", got=said[:80], expected="a JSON object") from None
    if not isinstance(owner, dict):
        raise ScalesError(f"{path}: its metadata is damaged", got=said[:80], expected="a JSON object")
    return owner


def _fingerprint(metadata: Mapping[str, str], path: Path) -> str | None:
    owner = _owner(metadata, path)
    if owner is None:
        return None
    fingerprint = owner.get("fingerprint")
    if owner.get("format_version") != FORMAT_VERSION or not re.fullmatch("[0-9a-f]{64}", str(fingerprint)):
        raise ScalesError(
            f"{path}: its metadata is damaged, or of another version",
            got=ascii(metadata[SCALES_METADATA_KEY])[:120],
            expected=f"format_version {FORMAT_VERSION} and a fingerprint, a sha256",
        )
    return str(fingerprint)


def note_without_owner(path: Path) -> None:
    """Tell a note: a scales file does not say which factors it belongs to."""
    note(f"{path} does not say which factors it belongs to (its metadata is missing); checked by names and shapes only")


def _check_owner(metadata: Mapping[str, str], manifest: Manifest, path: Path) -> None:
    """Refuse scales that say they belong to other factors."""
    owner = _owner(metadata, path)
    if owner is None:
        note_without_owner(path)
        return
    for what, expected in (("format_version", FORMAT_VERSION), ("fingerprint", manifest.fingerprint)):
        if owner.get(what) != expected:
            raise ScalesError(
                f"{path} belongs to other factors",
                got=f"{what} {owner.get(what)!r}",
                expected=f"{what} {expected!r}",
                hint="use the factorized folder these scales were trained with",
            )


def check_scales(values: Mapping[str, torch.Tensor], manifest: Manifest) -> dict[str, torch.Tensor]:
    """Check scales against the targets of a manifest; arguments, result, errors and notes as for ``read_scales``."""
    for name, value in values.items():
        check_dense(value, f"scales: {name!r}")
    given = _check_shapes({name: list(value.shape) for name, value in values.items()}, manifest, "scales")
    shapes = {target.key: target.scales_shape for target in manifest.targets}
    named = {key: values[name].reshape(list(shapes[key])) for key, name in given.items()}
    return _checked(named, named, None)


def _checked(values: Mapping[str, torch.Tensor], names: Iterable[str], file: Path | None) -> dict[str, torch.Tensor]:
    """The scales of these names, float32, on the CPU; with a note if they do not look like multipliers."""
    where = str(file or "scales")
    checked = {name: _finite(name, values[name], where) for name in names}
    # Somebody's own tensors that are all 0 are meant: they take the kept directions out.
    if _look_like_changes(checked.values()) and (file is not None or any(value.any() for value in checked.values())):
        note(
            f"{where}: nearly all scales are near 0: they look like changes g - 1, or logarithms, and not like the multipliers "
            "g, which are 1 where nothing has changed"
        )
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


def _check_shapes(values: Mapping[str, list[int]], manifest: Manifest, where: str) -> dict[str, str]:
    """Match names and shapes with the targets: key of each target -> the name that its scales have."""
    shapes = {target.key: target.scales_shape for target in manifest.targets}
    names = match_names(values, shapes)
    if not names.fits:
        raise _other_names(names, where, list(shapes))
    note_renamed(names, where)
    for key, name in names.given.items():
        if not same_but_for_ones(values[name], shapes[key]):
            raise ScalesError(f"{where}: {name!r} has the wrong shape", got=values[name], expected=list(shapes[key]))
    note_reshaped({name: (values[name], shapes[key]) for key, name in names.given.items()}, where)
    return names.given


def _other_names(names: NameMap, where: str, targets: list[str]) -> ScalesError:
    hint = "use the factorized folder these scales were trained with"
    if names.unknown:
        what = f"{where}: {names.unknown[0]!r} is no target of this checkpoint" + _and_more(names.unknown)
        if names.given:
            hint += "; what is no scales belongs into another file"
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
