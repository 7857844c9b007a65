"""What the metadata and the entries of a scales file say: whose it is, what it holds, and which of its tensors are scales."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgery.errors import ScalesError, few
from surgery.files.json_files import decode_json
from surgery.format.header import Header, TensorEntry
from surgery.format.manifest import Manifest
from surgery.names import FORMAT_VERSION, SCALES_METADATA_KEY, TRAINS, Train
from surgery.progress import note

#: The shapes of what is trained of a target.
SHAPES: Mapping[Train, str] = MappingProxyType(
    {"scales": "(k,), or (B, k) for a stack", "core": "(k, k), or (B, k, k) for a stack"}
)
#: How many dimensions it has, but for a stack.
_LEAST: Mapping[Train, int] = MappingProxyType({"scales": 1, "core": 2})
_DTYPES = ("F32", "F64", "F16", "BF16")
#: What trainings keep for themselves, each under the key of a target, a dot and this, and its dtype: which directions have been
#: chosen (1 where they have; of the shape of scales), and the parameters of orthogonal cores.
BESIDE: Mapping[str, str] = MappingProxyType({"chosen": "U8", "orthogonal": "F32"})
#: What trainings keep beside what they train.
_COUNTERS = re.compile(r"(.*[._])?(steps?|epochs?|iter(ation)?s?|lr|learning_rate|loss|seed|count|num_batches_tracked)")


def entries_of(
    header: Header, wanted: Collection[str], owner: Mapping[str, Any] | None, path: Path
) -> tuple[list[TensorEntry], dict[str, dict[str, TensorEntry]]]:
    """The entries that may be scales, and those of what a training keeps for itself.

    Single numbers that a training keeps beside them are left out, with a note.

    Args:
        header, path: of the file.
        wanted: names that are scales whatever they look like.
        owner: what ``owner_of`` gave.

    Returns:
        The former; and kind -> name of the scales that it belongs to -> entry.
    """
    kinds = owner.get("beside") if owner is not None else None
    kept: dict[str, dict[str, TensorEntry]] = {kind: {} for kind in BESIDE if isinstance(kinds, list) and kind in kinds}
    entries, others = [], []
    for entry in header.tensors:
        name, _, kind = entry.name.rpartition(".")
        is_counter = entry.dtype not in _DTYPES or _COUNTERS.fullmatch(entry.name)
        if kind in kept and entry.name not in wanted:
            if entry.dtype != BESIDE[kind]:
                raise ScalesError(
                    f"{path}: {entry.name!r} has a dtype that it cannot have", got=entry.dtype, expected=BESIDE[kind]
                )
            kept[kind][name] = entry
        elif entry.name not in wanted and math.prod(entry.shape) == 1 and is_counter:
            others.append(entry.name)
        elif entry.dtype in _DTYPES:
            entries.append(entry)
        else:
            raise ScalesError(
                f"{path}: {entry.name!r} has a dtype that scales cannot have",
                got=entry.dtype,
                expected="F32",
                hint="other tensors of a training are passed over if the metadata lists them, as scales.save does"
                if kind in BESIDE
                else None,
            )
    if not entries:
        raise ScalesError(f"{path} holds no scales")
    if others:
        note(f"{path} holds tensors that are not scales, and are not used: {few(sorted(others))}")
    if half := sorted({entry.dtype for entry in entries} & {"BF16", "F16"}):
        note(
            f"{path} holds {' and '.join(half)} numbers: next to 1 they are spaced by "
            f"{'2^-7' if 'BF16' in half else '2^-10'}; train them in float32"
        )
    return entries, kept


def seen_as(entries: Sequence[TensorEntry], path: Path) -> Train:
    """What a file holds that does not say it, and of which no checkpoint is known: only of stacks are cores seen as such.

    Warns:
        SurgeryWarning, or a note where somebody listens: they may be cores, and are taken for the scales of stacks.
    """
    shapes = [[size for size in entry.shape if size != 1] for entry in entries]
    square = all(len(shape) in (2, 3) and shape[-1] == shape[-2] for shape in shapes if shape)
    if square and any(len(shape) == 3 for shape in shapes):
        return "core"
    if square and any(shapes):
        note(f"{path} does not say whether it holds scales or cores: its square matrices are taken for the scales of stacks")
    return "scales"


def can_have_shape(shape: Sequence[int], train: Train) -> bool:
    """Whether scales, or cores, can have a shape, where no checkpoint says it."""
    square = train == "scales" or shape[-1:] == shape[-2:-1]
    return len(shape) in (_LEAST[train], _LEAST[train] + 1) and 0 not in shape and square


def plain_shape(entry: TensorEntry, train: Train, path: Path) -> list[int]:
    """The shape of scales or a core where no checkpoint says it: other dimensions must be of size 1."""
    shape, least = list(entry.shape), _LEAST[train]
    if len(shape) > least + 1:
        shape = [size for size in shape if size != 1] or [1] * least
    if not can_have_shape(shape, train):
        raise ScalesError(
            f"{path}: {entry.name!r} has a shape that {'scales' if train == 'scales' else 'a core'} cannot have",
            got=list(entry.shape),
            expected=SHAPES[train],
        )
    return shape


def owner_of(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
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


def train_of(owner: Mapping[str, Any] | None, path: Path) -> Train | None:
    """What a file says that it holds; None if nothing. One that says whose it is holds scales unless it says otherwise."""
    said = None if owner is None else owner.get("train", "scales" if "fingerprint" in owner else None)
    if said is None or said in TRAINS:
        return said
    raise ScalesError(
        f"{path} holds something that this version does not know",
        got=f"train {said!r}"[:80],
        expected=" or ".join(map(repr, TRAINS)),
    )


def fingerprint_in(owner: Mapping[str, Any] | None, path: Path) -> str | None:
    if owner is None or not owner.keys() - {"train", "beside"}:
        return None
    fingerprint = owner.get("fingerprint")
    if owner.get("format_version") != FORMAT_VERSION or not re.fullmatch("[0-9a-f]{64}", str(fingerprint)):
        raise ScalesError(
            f"{path}: its metadata is damaged, or of another version",
            got=ascii(json.dumps(owner))[:120],
            expected=f"format_version {FORMAT_VERSION} and a fingerprint, a sha256",
        )
    return str(fingerprint)


def note_without_owner(path: Path) -> None:
    """Tell a note: a scales file does not say which factors it belongs to."""
    note(f"{path} does not say which factors it belongs to (its metadata has no fingerprint); checked by names and shapes only")


def check_owner(owner: Mapping[str, Any] | None, manifest: Manifest, path: Path) -> None:
    """Refuse scales that say they belong to other factors."""
    if owner is None or not owner.keys() - {"train", "beside"}:
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
