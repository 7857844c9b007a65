"""Our reader and writer against the safetensors library, and against files made to mislead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import FormatError
from surgery.format.files import FileWriter, file_sha256, write_file
from surgery.format.safetensors import ShardReader, TensorFileWriter
from surgery.memory import bytes_of


def _file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


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
