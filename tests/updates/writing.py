"""Random low-rank updates of a checkpoint's tensors, and what they make of its weights in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from surgery.files.file_records import FileRecord, file_sha256
from surgery.format.safetensors import ShardReader
from surgery.format.views import Kind
from surgery.progress import Silent
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor
from surgery.updates.writing.making import AdaptableModel
from tests.families import Family
from tests.models import tensors_of
from tests.releases import under_names_of

#: PEFT holds the patterns of ranks against modules alone, and says that it ignores those of parameters, which it follows.
FALSE_WARNING = "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"


class LowRank:
    """Updates of some tensors of a checkpoint, each with a rank of its own unless one is given.

    Args:
        folder: of the checkpoint.
        takes: whether a tensor is updated, by its name and shape.
        rank: of all; None for ranks from 1 to 4.
        aliases: tensor -> others that are the same parameter.
    """

    def __init__(
        self,
        folder: Path,
        takes: Callable[[str, tuple[int, ...]], bool],
        rank: int | None = None,
        aliases: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.folder, self.before = folder, tensors_of(folder)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.before.items()}
        generator = torch.Generator().manual_seed(3)
        self.tensors: list[LowRankTensor] = []
        self._halves: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        others = {name for several in (aliases or {}).values() for name in several}
        for name, shape in sorted(self.shapes.items()):
            if len(shape) < 2 or not takes(name, shape) or name in others:
                continue
            view: Kind = "matrix" if len(shape) == 2 else "convolution" if _is_convolution(name, shape) else "stack"
            one = LowRankTensor(name, shape, view, rank or 1 + len(self.tensors) % 4, (aliases or {}).get(name, ()))
            self.tensors.append(one)
            count, sizes = (shape[:1], shape[1:]) if view == "stack" else ((), (shape[0], math.prod(shape[1:])))
            self._halves[name] = (
                torch.randn(*count, sizes[0], one.rank, generator=generator) * 0.1,
                torch.randn(*count, sizes[1], one.rank, generator=generator) * 0.1,
            )

    def halves(self, one: LowRankTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._halves[one.tensor]

    def adapter(self, form: AdapterForm, copied: Iterable[str] = ()) -> AdapterToWrite:
        return AdaptableModel(self.folder, self.shapes).adapter(self.tensors, form, tuple(copied))

    def write(self, out: Path, form: AdapterForm) -> AdapterToWrite:
        adapter = self.adapter(form)
        out.mkdir()
        records = adapter.write(out, self.halves, {}, Silent())
        check_files(out, records)
        return adapter

    def after(
        self, dtype: torch.dtype = torch.float32, scalings: Mapping[str, float] = MappingProxyType({})
    ) -> dict[str, torch.Tensor]:
        """float64 weights with the updates, whose halves are rounded to a dtype, divided by the roots of their scalings."""
        weights = {name: tensor.double() for name, tensor in self.before.items()}
        for one in self.tensors:
            scaling = scalings.get(one.tensor, 1.0)
            left, right = ((half / math.sqrt(scaling)).to(dtype).double() for half in self._halves[one.tensor])
            added = scaling * (left @ right.mT).view(one.shape)
            for name in (one.tensor, *one.aliases):
                weights[name] = weights[name] + added
        return weights


def check_files(folder: Path, records: Sequence[FileRecord]) -> None:
    """The records are of all files, and the tensors are in the order that safetensors itself has them in."""
    assert [(record.size, record.sha256) for record in records] == [
        ((folder / record.file).stat().st_size, file_sha256(folder / record.file)) for record in records
    ]
    assert {record.file for record in records} == {path.name for path in folder.iterdir()}
    weights = folder / records[0].file
    save_file(load_file(weights), folder / "again.safetensors")
    ours, theirs = (_header(path) for path in (weights, folder / "again.safetensors"))
    assert ours == theirs
    (folder / "again.safetensors").unlink()


def _header(path: Path) -> list[tuple[str, int]]:
    with ShardReader(path) as reader:
        return [(entry.name, entry.start) for entry in reader.header.tensors]


def merged_beside(family: Family, folder: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges in float32, by the names of the checkpoint, once the outputs are seen to be those of the adapter beside
    the model."""
    with torch.no_grad():
        beside: Any = peft.PeftModel.from_pretrained(family.load(folder), str(adapter)).eval()
        expected = family.run(beside)
        merged: Any = beside.merge_and_unload()
        torch.testing.assert_close(family.run(merged), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        merged.save_pretrained(out)
    return under_names_of(tensors_of(folder), tensors_of(out))


def _is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 3 or "conv" in name
