"""Reading safetensors files by header and byte range, and writing them as a stream.

The safetensors library is not used: its ``save_file`` needs all tensors in memory at once, and ``safe_open`` maps the file into
memory, so that a file which is truncated meanwhile is a bus error. Here the reader accounts for every byte of the file, and the
writer holds only the tensor that it is given.

Format: https://huggingface.co/docs/safetensors (u64 little-endian header length, JSON, data).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Self

import torch

from surgery.errors import MEMORY_HINT, FormatError
from surgery.files.access import check_regular, read_errors, write_errors
from surgery.files.disk import write_all
from surgery.files.file_records import FileRecord, file_sha256
from surgery.files.file_writer import FileWriter
from surgery.files.kinds import HEAD_BYTES, other_kind
from surgery.files.watch import Stamp, Watch
from surgery.format.header import Header, Stored, TensorEntry, described_entry, header_length, parse_header
from surgery.memory import bytes_of
from surgery.names import PACKED_SPACINGS
from surgery.timing import timed

#: Bytes of each tensor that ``same_bytes`` holds at a time.
_COMPARED_BYTES = 4 << 20
#: The dtypes that are read as tensors, by the format's names.
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
#: The dtypes of tensors that hold the numbers and scales of quantized weights, besides.
_PACKED_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}


def spacing_of(dtype: str) -> float:
    """The spacing of the numbers next to 1 in a dtype that weights are stored in, packed or not."""
    return PACKED_SPACINGS[dtype] if dtype in PACKED_SPACINGS else torch.finfo(TORCH_DTYPES[dtype]).eps


class ShardReader:
    """Reads from one safetensors file by position. A context manager; safe for any number of threads.

    It uses plain reads and no memory map: a file that shrinks while it is read gives a ``FormatError`` and not a bus error.
    After the last read, call ``check_unchanged``.

    Args:
        path: of the file.
        name: for messages; the file's own name if None.
        watch: has seen the file before, such as when the run was planned; refuses it if it has changed since.
        packed: name of a tensor that holds the numbers of a packed weight -> that weight, which the header then has instead.

    Raises:
        ReadError: it cannot be read.
        FormatError: it breaks the format, or has changed.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        watch: Watch | None = None,
        packed: Mapping[str, Stored] = MappingProxyType({}),
    ) -> None:
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
            self.header = self._read_header().unpacked(packed)
        except BaseException:
            self._file.close()
            raise

    @property
    def modified(self) -> int:
        """When the contents of the file were changed last, in nanoseconds."""
        return self._stamp.mtime_ns

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
        """Close the file; may be called more than once."""
        self._file.close()

    def check_unchanged(self) -> None:
        """Make sure that all reads were from the same, unchanged file, and that it is still there.

        Raises:
            FormatError: it has been written to or replaced since it was opened.
            ReadError: it is gone.
        """
        now = Stamp.of(self._file)
        if self._is_pinned:  # it may be removed meanwhile, which changes its ctime but not its contents
            self._stamp.check(replace(now, ctime_ns=self._stamp.ctime_ns), self.name)
            return
        self._stamp.check(now, self.name)
        self._stamp.check(Stamp.at(self._path, self.name), self.name)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """What the header says of each tensor, by name."""
        return {entry.name: entry for entry in self.header.tensors}

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on, counted from the start of the data.

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
        """The bytes of one tensor, uint8 (nbytes,), on the CPU."""
        return self._read(entry.start, entry.nbytes)

    def read(self, entry: TensorEntry, first: int = 0, count: int | None = None) -> torch.Tensor:
        """A tensor as it is stored, on the CPU: whole, or ``count`` rows of its first dimension from ``first`` on."""
        start, stop = self.span(entry, first, count)
        return self.shaped(self._read(start, stop - start), entry, count)

    @staticmethod
    def span(entry: TensorEntry, first: int, count: int | None) -> tuple[int, int]:
        """(start, end) in the data of a tensor, or of ``count`` rows of its first dimension from ``first`` on."""
        if count is None:
            return entry.start, entry.end
        row = entry.nbytes // entry.stored.shape[0]
        return entry.start + first * row, entry.start + (first + count) * row

    @staticmethod
    def shaped(data: torch.Tensor, entry: TensorEntry, count: int | None) -> torch.Tensor:
        """View bytes, uint8 (bytes,), as the tensor that they are, or as ``count`` rows of it.

        Raises:
            FormatError: its dtype is none that weights, or the parts of quantized ones, are stored in.
        """
        stored = entry.stored
        dtype = TORCH_DTYPES.get(stored.dtype) or _PACKED_DTYPES.get(stored.dtype)
        if dtype is None:
            raise FormatError(
                f"{entry.name!r} has another dtype than it should", got=stored.dtype, expected=" or ".join(TORCH_DTYPES)
            )
        return data.view(dtype).reshape(stored.shape if count is None else (count, *stored.shape[1:]))

    def _read(self, start: int, count: int) -> torch.Tensor:
        data = self.empty(count)
        self.read_into(bytes_of(data), start)
        return data

    def empty(self, count: int) -> torch.Tensor:
        """Uninitialised memory for ``count`` bytes of the file, uint8 (count,), on the CPU.

        Raises:
            FormatError: there is not enough memory.
        """
        try:
            return torch.empty(count, dtype=torch.uint8)
        except RuntimeError as error:
            raise FormatError(f"{self.name}: a tensor of {count} bytes does not fit into memory", hint=MEMORY_HINT) from error


def same_bytes(one: ShardReader, entry: TensorEntry, other: ShardReader, other_entry: TensorEntry) -> bool:
    """Whether two tensors have the same bytes. Only a few megabytes of each are in memory at a time."""
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
    """Writes a safetensors file tensor by tensor, without knowing their sizes beforehand.

    The header stands before the data, so room for it is reserved by the names, and is padded with spaces, as the format
    allows. The size of each tensor must be a multiple of 4 bytes, so that all of them are aligned.

    Args:
        path: of the file.
        names: of all tensors that will be added.
        partial: as for ``FileWriter``.
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
        """Append one tensor: float32 or uint8, on the CPU, contiguous.

        Raises:
            OutputError: the disk is full or fails.
            ValueError: its size is no multiple of 4 bytes.
        """
        data = bytes_of(tensor)
        if len(data) % 4:
            raise ValueError(f"{name}: {len(data)} bytes are no multiple of 4")
        dtype = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        self._entries.append(described_entry(name, dtype, tensor.shape, self.size, self.size + len(data)))
        self.append(data)

    def commit(self, name: str) -> FileRecord:
        text = f"{{{','.join(self._entries)}}}".encode()
        if len(text) > self._header_bytes:
            raise ValueError(f"{name}: the header outgrew the room set aside for it")
        with write_errors(self.path):
            self.stream.finish()
            self.file.seek(0)
            write_all(self.file, memoryview(self._header_bytes.to_bytes(8, "little") + text.ljust(self._header_bytes)))
        # The header is written last but stands first, so the file has to be read again to hash it.
        with timed("hash"):
            digest = file_sha256(self.partial)
        super().commit(name)
        return FileRecord(name, 8 + self._header_bytes + self.size, digest)
