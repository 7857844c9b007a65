"""Reading safetensors files by header and byte range, and writing them as a stream.

The library's own ``save_file`` needs every tensor in memory and ``safe_open`` maps the file (a file truncated
underneath is then a bus error), so the two things this project lives on are done here: a header parsed with
every byte accounted for, and a writer that never holds more than what it is handed.

Format: https://huggingface.co/docs/safetensors (u64 little-endian header length, JSON, data).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeGuard

import torch

from surgery.errors import MEMORY_HINT, FormatError
from surgery.escapes import has_surrogates
from surgery.files.access import check_regular, read_errors, write_errors
from surgery.files.disk import write_all
from surgery.files.file_writer import FileWriter
from surgery.files.json_files import decode_json
from surgery.files.kinds import HEAD_BYTES, other_kind
from surgery.files.records import FileRecord, file_sha256
from surgery.files.watch import Stamp, Watch
from surgery.memory import bytes_of
from surgery.names import DTYPE_BITS
from surgery.timing import timed

MAX_HEADER_BYTES = 100_000_000
_COMPARED_BYTES = 4 << 20
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file, as its header has it. Offsets count from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


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


def header_length(prefix: bytes, *, file: str, file_bytes: int) -> int:
    """How many bytes of JSON follow the length prefix of 8 bytes.

    Args:
        prefix: the first bytes of the file.
        file: name for messages.
        file_bytes: size of the whole file.

    Raises:
        FormatError: more than the file has, or than the format allows.
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
        FormatError: anything that a reader relying on the header could be led astray by.
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
    """Check a decoded header object and turn it into a ``Header``; arguments as for ``parse_header``."""
    metadata = parsed.get("__metadata__")
    metadata = {} if metadata is None else metadata  # null is none, as the safetensors library reads it
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
    """The same tensor in another dtype, starting at 0; with its own one as many bytes as it has."""
    size = entry.nbytes if dtype == entry.dtype else math.prod(entry.shape) * DTYPE_BITS[dtype] // 8
    return TensorEntry(entry.name, dtype, entry.shape, 0, size)


def make_header(tensors: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data for tensors that follow one another, wherever they lay before."""
    lines = [f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"))}'] if metadata else []
    position = 0
    for entry in tensors:
        lines.append(_described(entry.name, entry.dtype, entry.shape, position, position + entry.nbytes))
        position += entry.nbytes
    text = f"{{{','.join(lines)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _described(name: str, dtype: str, shape: Iterable[int], start: int, end: int) -> str:
    """What a header says of a tensor, as text: of a hundred thousand, dicts would take ten times as much memory."""
    described = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return f"{json.dumps(name)}:{json.dumps(described, separators=(',', ':'))}"


def _entry(name: str, value: Any, file: str) -> TensorEntry:
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


class ShardReader:
    """Reads from one safetensors file by position. A context manager; for any number of threads.

    Plain reads rather than a memory map: a file that shrinks while it is read gives a ``FormatError`` and not a
    bus error. Whoever has read the last byte that is wanted calls ``check_unchanged``.

    Args:
        path: of the file.
        name: for messages.
        watch: makes sure that it is what it was when it was opened before, or when the run was planned.

    Raises:
        ReadError: it cannot be read.
        FormatError: it breaks the format, or has changed.
    """

    def __init__(self, path: Path, *, name: str | None = None, watch: Watch | None = None) -> None:
        self.name = name or path.name
        self._path = path
        self._is_pinned = watch is not None and watch.pinned
        with read_errors(path, self.name):
            check_regular(path, self.name)
            self._file: IO[bytes] = open(path, "rb", buffering=0)
        self._position = threading.Lock()
        try:
            self._stamp = Stamp.of(self._file)
            if watch is not None:
                watch.see(path, self.name, self._stamp)
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> Header:
        size = self._stamp.size
        with read_errors(self._path, self.name):
            head = self._file.read(HEAD_BYTES)
        try:
            length = header_length(head[:8], file=self.name, file_bytes=size)
            with read_errors(self._path, self.name):
                self._file.seek(8)
                rest = self._file.read(length)
            return parse_header(head[:8] + rest, file=self.name, file_bytes=size)
        except FormatError:
            kind = other_kind(head, size, self._path)
            if kind is None:
                raise
            raise FormatError(f"{self.name} is {kind.what}", expected="a safetensors file", hint=kind.hint) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """No more reading; as often as one likes."""
        self._file.close()

    def check_unchanged(self) -> None:
        """Make sure that all that was read is of one file, which is still there.

        Raises:
            FormatError: it has been written to since it was opened, or replaced.
            ReadError: it is gone.
        """
        now = Stamp.of(self._file)
        if self._is_pinned:  # removing it changes its ctime, and nothing that is read
            self._stamp.check(replace(now, ctime_ns=self._stamp.ctime_ns), self.name)
            return
        self._stamp.check(now, self.name)
        self._stamp.check(Stamp.at(self._path, self.name), self.name)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """What the header says of each tensor, by name."""
        return {entry.name: entry for entry in self.header.tensors}

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` bytes after the start of the data.

        Raises:
            FormatError: the file ends early.
            ReadError: it cannot be read.
        """
        position, done = len(self.header.raw) + offset, 0
        with read_errors(self._path, self.name), self._position:
            self._file.seek(position)
            while done < len(buffer):
                count = self._file.readinto(buffer[done:])  # type: ignore[attr-defined]  # raw files have it
                if not count:
                    raise FormatError(
                        f"{self.name}: ended while it was being read",
                        got=f"{position + done} bytes",
                        expected=f"{self.header.file_bytes} bytes",
                        hint="something changes the file: start again when it is whole",
                    )
                done += count

    def read_bytes(self, entry: TensorEntry) -> torch.Tensor:
        """The payload of one tensor, as uint8 of shape (nbytes,) on the CPU."""
        return self._read(entry.start, entry.nbytes)

    def read(self, entry: TensorEntry, first: int = 0, count: int | None = None) -> torch.Tensor:
        """A float tensor in its own dtype, on the CPU: whole, or ``count`` of its rows along the first dimension."""
        start, stop = self.span(entry, first, count)
        return self.shaped(self._read(start, stop - start), entry, count)

    @staticmethod
    def span(entry: TensorEntry, first: int, count: int | None) -> tuple[int, int]:
        """Where in the data a tensor is, or ``count`` of its rows along the first dimension: from, to."""
        if count is None:
            return entry.start, entry.end
        row = entry.nbytes // entry.shape[0]
        return entry.start + first * row, entry.start + (first + count) * row

    @staticmethod
    def shaped(data: torch.Tensor, entry: TensorEntry, count: int | None) -> torch.Tensor:
        """The bytes of a tensor, or of ``count`` of its rows, as what they are."""
        if entry.dtype not in TORCH_DTYPES:
            raise FormatError(
                f"{entry.name!r} has another dtype than it should", got=entry.dtype, expected=" or ".join(TORCH_DTYPES)
            )
        shape = entry.shape if count is None else (count, *entry.shape[1:])
        return data.view(TORCH_DTYPES[entry.dtype]).reshape(shape)

    def _read(self, start: int, count: int) -> torch.Tensor:
        data = self.empty(count)
        self.read_into(bytes_of(data), start)
        return data

    def empty(self, count: int) -> torch.Tensor:
        """Memory for so many bytes of the file, uint8.

        Raises:
            FormatError: there is not so much.
        """
        try:
            return torch.empty(count, dtype=torch.uint8)
        except RuntimeError as error:
            raise FormatError(f"{self.name}: a tensor of {count} bytes does not fit into memory", hint=MEMORY_HINT) from error


def same_bytes(one: ShardReader, entry: TensorEntry, other: ShardReader, other_entry: TensorEntry) -> bool:
    """Whether two tensors hold the same bytes; a few megabytes of each are held at a time."""
    if entry.nbytes != other_entry.nbytes:
        return False
    for done in range(0, entry.nbytes, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, entry.nbytes - done)
        parts = []
        for reader, start in ((one, entry.start), (other, other_entry.start)):
            part = bytes_of(reader.empty(count))
            reader.read_into(part, start + done)
            parts.append(part)
        if parts[0] != parts[1]:
            return False
    return True


class TensorFileWriter(FileWriter):
    """A safetensors file written tensor by tensor, some of whose sizes are known only when they come.

    The header stands before the data, so its room is set aside from the names that are announced and is
    padded with spaces, as the format allows. Tensors must be a multiple of 4 bytes, which keeps all aligned.
    """

    def __init__(self, path: Path, names: Iterable[str], partial: Path | None = None) -> None:
        super().__init__(path, partial, read_soon=True)
        # The largest description a tensor can need: dtype, up to four sizes and two offsets of 19 digits.
        room = sum(len(json.dumps(name)) + 200 for name in names) + 64
        self._header_bytes = room + -room % 8
        self._entries: list[str] = []

    def _open(self) -> None:
        super()._open()
        self.file.seek(8 + self._header_bytes)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one float32 or uint8 tensor (CPU, contiguous)."""
        data = bytes_of(tensor)
        if len(data) % 4:
            raise ValueError(f"{name}: {len(data)} bytes are no multiple of 4")
        dtype = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        self._entries.append(_described(name, dtype, tensor.shape, self.size, self.size + len(data)))
        self.append(data)

    def commit(self, name: str) -> FileRecord:
        text = f"{{{','.join(self._entries)}}}".encode()
        if len(text) > self._header_bytes:
            raise ValueError(f"{name}: the header outgrew the room set aside for it")
        with write_errors(self.path):
            self.stream.finish()
            self.file.seek(0)
            write_all(self.file, memoryview(self._header_bytes.to_bytes(8, "little") + text.ljust(self._header_bytes)))
        # The header came last but stands first: the hash has to go over the file again.
        with timed("hash"):
            digest = file_sha256(self.partial)
        super().commit(name)
        return FileRecord(name, 8 + self._header_bytes + self.size, digest)
