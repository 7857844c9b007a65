"""Our reader and writer against the safetensors library, and against files made to mislead."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from surgery.errors import FormatError
from surgery.files.file_records import file_sha256
from surgery.files.file_writer import FileWriter, write_file
from surgery.format.safetensors import ShardReader, TensorFileWriter
from surgery.memory import bytes_of
from surgery.names import DTYPE_BITS


def _file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def _skip_if_unknown(text: str) -> None:
    """Dtypes that the library has learned after our lowest bound of it; ours knows them without it."""
    old = tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 8)
    if old and re.search(r"F4|F6_E\dM\d|F8_E8M0|F8_E\dM\dFNUZ|C64", text):
        pytest.skip(f"safetensors {safetensors.__version__} does not know this dtype")


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).to(torch.bfloat16),
        "c": torch.arange(7),
        "d": torch.tensor(True),
        "e": torch.empty(0, 4),
        "f": torch.randn(2, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with ShardReader(tmp_path / "x.safetensors") as reader:
        assert reader.header.metadata == {"format": "pt"}
        entries = {entry.name: entry for entry in reader.header.tensors}
        assert entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert entries[name].shape == tuple(tensor.shape)
            assert bytes(bytes_of(reader.read_bytes(entries[name]))) == bytes(
                bytes_of(tensor.contiguous().view(-1).view(torch.uint8))
            )
        assert torch.equal(reader.read(entries["a"]), tensors["a"])
        assert torch.equal(reader.read(entries["b"]), tensors["b"])
        whole = bytearray(reader.header.data_bytes)
        reader.read_into(memoryview(whole), 0)
    assert reader.header.raw + whole == (tmp_path / "x.safetensors").read_bytes()


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        "layer.0.U": torch.randn(3, 5),
        "layer.0.correction": torch.arange(16, dtype=torch.uint8),
        'odd " ü name': torch.randn(1),
    }
    with TensorFileWriter(tmp_path / "f.safetensors", tensors) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        record = writer.commit("f.safetensors")
    loaded = load_file(tmp_path / "f.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert record.size == (tmp_path / "f.safetensors").stat().st_size
    assert record.sha256 == file_sha256(tmp_path / "f.safetensors")


MISLEADING = {
    "empty file": (b"", None),
    "length bomb": (b"{}", 1 << 62),
    "longer than the file": (b"{}", 3),
    "negative as seen by C": (b"{}", (1 << 64) - 1),
    "not JSON": (b"{nope}", None),
    "not UTF-8": (b'{"\xff": 1}', None),
    "deep": (b"[" * 100_000, None),
    "a list": ([], None),
    "twice the same name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        None,
    ),
    "half a character for a name": (b'{"\\ud800":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', None),
    "no description": ({"a": 1}, None),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, None),
    "negative size": ({"a": _tensor(0, 1, [-1])}, None),
    "size of 2^80": ({"a": _tensor(0, 1, [1 << 80])}, None),
    "product of sizes overflows": ({"a": _tensor(0, 1, [1 << 40, 1 << 40])}, None),
    "true for a size": ({"a": _tensor(0, 1, [True])}, None),
    "end before start": ({"a": _tensor(1, 0, [1])}, None),
    "wrong byte count": ({"a": _tensor(0, 1, [2])}, None),
    "wrong byte count for F32": ({"a": _tensor(0, 1, [1], "F32")}, None),
    "overlap": ({"a": _tensor(0, 2), "b": _tensor(1, 3)}, None),
    "gap": ({"a": _tensor(0, 1), "b": _tensor(2, 3)}, None),
    "past the end": ({"a": _tensor(0, 10)}, None),
    "bytes left over": ({"a": _tensor(0, 1)}, None),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, None),
    "digits without end": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', None),
}


@pytest.mark.parametrize("name", MISLEADING)
def test_misleading_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    header, length = MISLEADING[name]
    path = tmp_path / "evil.safetensors"
    if header == b"":
        path.write_bytes(b"")
    else:
        _file(path, header, b"\0\0\0", length=length)
    with pytest.raises(FormatError, match=r"evil\.safetensors"):
        ShardReader(path)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    with ShardReader(tmp_path / "x.safetensors") as reader:
        with open(tmp_path / "x.safetensors", "r+b") as file:
            file.truncate(500)
        with pytest.raises(FormatError, match="ended while it was being read"):
            reader.read(reader.header.tensors[0])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with FileWriter(path) as writer:
        writer.write(b"half")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), FileWriter(path) as writer:
        writer.write(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    write_file(path, b"whole")
    assert path.read_bytes() == b"whole"


def _library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the safetensors library says is in a file: name -> dtype, shape. None if it refuses it."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, ValueError):
        return None


def _ours(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with ShardReader(path) as reader:
            return {entry.name: (entry.dtype, list(entry.shape)) for entry in reader.header.tensors}
    except FormatError:
        return None


#: header, bytes of data; and why ours refuses what the library takes.
HEADERS: dict[str, tuple[object, int, str | None]] = {
    "plain": ({"a": _tensor(0, 4)}, 4, None),
    "no tensors": ({}, 0, None),
    "metadata alone": ({"__metadata__": {"format": "pt"}}, 0, None),
    "metadata null": ({"__metadata__": None, "a": _tensor(0, 4)}, 4, None),
    "metadata empty": ({"__metadata__": {}, "a": _tensor(0, 4)}, 4, None),
    "metadata a list": ({"__metadata__": [], "a": _tensor(0, 4)}, 4, None),
    "metadata false": ({"__metadata__": False, "a": _tensor(0, 4)}, 4, None),
    "metadata a string": ({"__metadata__": "", "a": _tensor(0, 4)}, 4, None),
    "metadata with a number": ({"__metadata__": {"x": 1}, "a": _tensor(0, 4)}, 4, None),
    "metadata with null": ({"__metadata__": {"x": None}, "a": _tensor(0, 4)}, 4, None),
    "dtype empty": ({"a": _tensor(0, 4, dtype="")}, 4, None),
    "dtype unknown": ({"a": _tensor(0, 4, dtype="F128")}, 4, None),
    "dtype in small letters": ({"a": _tensor(0, 4, dtype="u8")}, 4, None),
    "dtype null": ({"a": {**_tensor(0, 4), "dtype": None}}, 4, None),
    "dtype of nothing": ({"a": _tensor(0, 0, [0], dtype="X")}, 0, None),
    "scalar": ({"a": _tensor(0, 4, [], "F32")}, 4, None),
    "nothing": ({"a": _tensor(0, 0, [0, 7], "F32")}, 0, None),
    "nothing in between": ({"a": _tensor(0, 4), "b": _tensor(4, 4), "c": _tensor(4, 8)}, 8, None),
    "nothing at the end": ({"a": _tensor(0, 4), "b": _tensor(4, 4)}, 4, None),
    "nothing elsewhere": ({"a": _tensor(0, 4), "b": _tensor(2, 2)}, 4, None),
    "nothing beyond": ({"a": _tensor(0, 4), "b": _tensor(9, 9)}, 4, None),
    "out of order": ({"b": _tensor(4, 8), "a": _tensor(0, 4)}, 8, None),
    "gap": ({"a": _tensor(0, 4), "b": _tensor(5, 8)}, 8, None),
    "overlap": ({"a": _tensor(0, 4), "b": _tensor(3, 8)}, 8, None),
    "the same bytes twice": ({"a": _tensor(0, 4), "b": _tensor(0, 4)}, 4, None),
    "starts late": ({"a": _tensor(4, 8)}, 8, None),
    "trailing bytes": ({"a": _tensor(0, 4)}, 5, None),
    "bytes are missing": ({"a": _tensor(0, 4)}, 3, None),
    "wrong count": ({"a": _tensor(0, 4, [3])}, 4, None),
    "backwards": ({"a": _tensor(4, 0, [4])}, 4, None),
    "negative size": ({"a": _tensor(0, 4, [-4])}, 4, None),
    "size as float": ({"a": _tensor(0, 4, [4.0])}, 4, None),  # type: ignore[list-item]
    "size as bool": ({"a": _tensor(0, 1, [True])}, 1, None),
    "half a byte": ({"a": _tensor(0, 2, [3], "F4")}, 2, None),
    "two half bytes": ({"a": _tensor(0, 2, [4], "F4")}, 2, None),
    "six bits": ({"a": _tensor(0, 3, [4], "F6_E2M3")}, 3, None),
    "six bits too many": ({"a": _tensor(0, 4, [5], "F6_E3M2")}, 4, None),
    "size that overflows": ({"a": _tensor(0, 0, [1 << 62, 4, 0])}, 0, None),
    "huge and nothing": ({"a": _tensor(0, 0, [0, 1 << 62, 4])}, 0, None),
    "offsets of three": ({"a": {**_tensor(0, 4), "data_offsets": [0, 4, 4]}}, 4, None),
    "more than is known": ({"a": {**_tensor(0, 4), "note": "x"}}, 4, None),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, None),
    "a list": ([], 0, None),
    "spaces after": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}   ', 4, None),
    "spaces before": (b'   {"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, None),
    "new lines": (b'{"a":\n{"dtype":"U8",\t"shape":[4],"data_offsets":[0,4]}}\n', 4, None),
    "null bytes after": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}\0\0', 4, None),
    "byte order mark": (b'\xef\xbb\xbf{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, None),
    "name empty": ({"": _tensor(0, 4)}, 4, None),
    "name with escapes": (b'{"a\\u0000\\u00e9\\n":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, None),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, None),
    "not a number": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', 4, None),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        4,
        "which of the two is meant is anybody's guess",
    ),
    "entry twice": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4, None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_verdicts_are_those_of_the_safetensors_library(case: str, tmp_path: Path) -> None:
    header, data, stricter = HEADERS[case]
    path = _file(tmp_path / "x.safetensors", header, bytes(data))
    if stricter is None:
        _skip_if_unknown(str(header))
        assert _ours(path) == _library(path)
    else:
        assert _ours(path) is None
        assert _library(path) is not None


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_is_one_of_the_librarys(dtype: str, tmp_path: Path) -> None:
    _skip_if_unknown(dtype)
    size = DTYPE_BITS[dtype]  # bytes of 8 numbers
    for count in (size, size + 1):
        path = _file(tmp_path / "x.safetensors", {"a": _tensor(0, count, [8], dtype)}, bytes(count))
        assert (_ours(path) is not None) == (_library(path) is not None) == (count == size)


def test_verdicts_on_mutated_headers(tmp_path: Path) -> None:
    """What ours takes the library takes, and reads the same from it."""
    text = json.dumps({"__metadata__": {"a": "b"}, "x": _tensor(0, 4), "y": _tensor(4, 8, [1], "F32")}).encode()
    taken = 0
    for seed in range(500):
        rng = random.Random(seed)
        changed = bytearray(text)
        for _ in range(rng.randint(1, 2)):
            changed[rng.randrange(len(changed))] = rng.choice(b'0123456789"{}[],: null-x')
        path = _file(tmp_path / "x.safetensors", bytes(changed), bytes(8))
        ours = _ours(path)
        assert ours is None or ours == _library(path), (seed, bytes(changed))
        taken += ours is not None
    assert 0 < taken < 500
