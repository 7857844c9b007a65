"""The header of a safetensors file: parsing, where every byte of the file has to be accounted for, and writing.

Format: https://huggingface.co/docs/safetensors (u64 little-endian header length, JSON, data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from surgery.errors import FormatError
from surgery.escapes import has_surrogates
from surgery.files.json_files import decode_json
from surgery.names import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a header describes it.

    Attributes:
        name: of the tensor.
        dtype: as the format names it, such as ``BF16``.
        shape: its sizes; empty for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the header of a safetensors file says of one tensor; for a packed weight, what the tensor in the file stands for.

    Attributes:
        name: of the tensor, or of the weight.
        dtype: as the format names it, such as ``BF16``; of a packed weight one of ``names.PACKED_BITS``.
        shape: its sizes; empty for a scalar.
        start, end: where its bytes are, counted from the start of the data; ``end`` is behind the last one.
        packed: the tensor in the file that holds the numbers of a packed weight; None for a tensor that stands for itself.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    packed: Stored | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def stored(self) -> Stored:
        """The tensor as it is in the file."""
        return self.packed or Stored(self.name, self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header.

    Attributes:
        raw: the bytes before the data (length prefix and JSON), as they are in the file.
        tensors: the entries in the order of their data.
        metadata: the free-form ``__metadata__``.
    """

    raw: bytes = field(repr=False)
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]

    @property
    def data_bytes(self) -> int:
        return self.tensors[-1].end if self.tensors else 0

    @property
    def file_bytes(self) -> int:
        return len(self.raw) + self.data_bytes

    def is_like(self, other: Header) -> bool:
        """Whether two headers describe the same tensors in the same places, whatever these stand for."""
        places = ([(entry.stored, entry.start) for entry in header.tensors] for header in (self, other))
        return len(self.tensors) == len(other.tensors) and next(places) == next(places)

    def unpacked(self, weights: Mapping[str, Stored]) -> Header:
        """The same header with packed weights in the place of the tensors that hold their numbers.

        Args:
            weights: name of a tensor in a file -> the weight that it stands for.
        """
        if weights.keys().isdisjoint(entry.name for entry in self.tensors):
            return self
        return replace(self, tensors=tuple(_unpacked(entry, weights.get(entry.name)) for entry in self.tensors))


def _unpacked(entry: TensorEntry, weight: Stored | None) -> TensorEntry:
    if weight is None:
        return entry
    return TensorEntry(weight.name, weight.dtype, weight.shape, entry.start, entry.end, entry.stored)


def header_length(prefix: bytes, *, file: str, file_bytes: int) -> int:
    """The length of the header's JSON in bytes, which follows the length prefix of 8 bytes.

    Args:
        prefix: the first bytes of the file.
        file: name for messages.
        file_bytes: size of the whole file.

    Raises:
        FormatError: it is longer than the file, or than the format allows.
    """
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
        raise FormatError(
            f"{file}: no safetensors file, or cut off within its header",
            got=f"{file_bytes} bytes, a header length of {length}",
            hint="fetch the file again",
        )
    return length


def parse_header(raw: bytes, *, file: str, file_bytes: int | None = None) -> Header:
    """Parse and check the bytes before the data.

    Args:
        raw: length prefix and JSON.
        file: name for messages.
        file_bytes: size of the whole file, when known; the data must fill it exactly.

    Raises:
        FormatError: the header is not valid JSON, or contradicts itself, the format or the size of the file.
    """
    if len(raw) < 8 or len(raw) != 8 + int.from_bytes(raw[:8], "little"):
        raise FormatError(f"{file}: the header is cut off")
    try:
        parsed = decode_json(raw[8:].decode("utf-8"))
    except ValueError as error:
        raise FormatError(
            f"{file}: the header is not valid JSON ({error})",
            hint="the file is damaged or no safetensors file: fetch it again",
        ) from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{file}: the header is no JSON object", got=type(parsed).__name__)
    return header_from_json(parsed, raw=raw, file=file, file_bytes=file_bytes)


def header_from_json(parsed: dict[str, Any], *, raw: bytes, file: str, file_bytes: int | None = None) -> Header:
    """Check a header that has been decoded from JSON, and make a ``Header`` of it; arguments as for ``parse_header``."""
    metadata = parsed.get("__metadata__")
    metadata = {} if metadata is None else metadata  # the safetensors library reads null as no metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{file}: __metadata__ is no map of strings to strings")
    entries = [_entry(name, value, file) for name, value in parsed.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            raise FormatError(
                f"{file}: tensor {entry.name!r} overlaps another or leaves a gap",
                got=f"data_offsets [{entry.start}, {entry.end}]",
                expected=f"a start of {position}",
            )
        position = entry.end
    if file_bytes is not None and len(raw) + position != file_bytes:
        raise FormatError(
            f"{file}: the file's size does not fit its header",
            got=f"{file_bytes} bytes",
            expected=f"{len(raw) + position} bytes",
            hint="the file is truncated or damaged: fetch it again",
        )
    return Header(raw=raw, tensors=tuple(entries), metadata=metadata)


def resized(entry: TensorEntry, dtype: str) -> TensorEntry:
    """The entry of the same tensor in another dtype (or its own), with offsets that start at 0; then it is not packed."""
    if dtype == entry.dtype:
        return replace(entry, start=0, end=entry.nbytes)
    return TensorEntry(entry.name, dtype, entry.shape, 0, math.prod(entry.shape) * DTYPE_BITS[dtype] // 8)


def make_header(tensors: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors one after the other: length prefix and JSON, padded to 8 bytes.

    Args:
        tensors: in the order of their data; of their offsets only the sizes count.
        metadata: for ``__metadata__``.
    """
    lines = [f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"))}'] if metadata else []
    position = 0
    for entry in tensors:
        stored = entry.stored
        lines.append(described_entry(stored.name, stored.dtype, stored.shape, position, position + entry.nbytes))
        position += entry.nbytes
    text = f"{{{','.join(lines)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def described_entry(name: str, dtype: str, shape: Iterable[int], start: int, end: int) -> str:
    """The entry of a tensor in a header, as JSON text: dicts for a hundred thousand tensors take ten times the memory."""
    described = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return f"{json.dumps(name)}:{json.dumps(described, separators=(',', ':'))}"


def _entry(name: str, value: Any, file: str) -> TensorEntry:
    """Check what a header says of one tensor. Raises FormatError."""
    where = f"{file}: tensor {name!r}"
    if has_surrogates(name):
        raise FormatError(f"{where}: the name is no Unicode text")
    if not isinstance(value, dict):
        raise FormatError(f"{where} has no description")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str):
        raise FormatError(f"{where} has no dtype", got=repr(dtype)[:80])
    if dtype not in DTYPE_BITS:
        raise FormatError(
            f"{where} has a dtype that the format does not know",
            got=repr(dtype)[:80],
            expected=f"one of {', '.join(DTYPE_BITS)}",
        )
    if not _naturals(shape):
        raise FormatError(f"{where} has no valid shape", got=repr(shape)[:80])
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where} has no valid data_offsets", got=repr(offsets)[:80])
    numel = 1
    for size in shape:
        numel *= size
        if numel >= 1 << 63:
            raise FormatError(f"{where} has an impossible shape", got=repr(shape)[:80])
    bits = numel * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise FormatError(
            f"{where}: its bytes do not fit its shape",
            got=f"{offsets[1] - offsets[0]} bytes",
            expected=f"{bits // 8} bytes for {dtype} {list(shape)}" if bits % 8 == 0 else f"a multiple of 8 bits, not {bits}",
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value
    )
