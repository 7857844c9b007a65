"""Random low-rank updates of a checkpoint's tensors, and what they make of its weights in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from surgery.format.views import Kind
from surgery.progress import Silent
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor
from surgery.updates.writing.making import adapter_of
from tests.models import tensors_of


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
        return adapter_of(self.folder, self.tensors, self.shapes, form, tuple(copied))

    def write(self, out: Path, form: AdapterForm) -> AdapterToWrite:
        adapter = self.adapter(form)
        out.mkdir()
        records = adapter.write(out, self.halves, {}, Silent())
        assert {record.file: record.size for record in records} == {path.name: path.stat().st_size for path in out.iterdir()}
        return adapter

    def after(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """float64 weights with the updates, whose halves are rounded to a dtype."""
        weights = {name: tensor.double() for name, tensor in self.before.items()}
        for one in self.tensors:
            left, right = (half.to(dtype).double() for half in self._halves[one.tensor])
            added = (left @ right.mT).view(one.shape)
            for name in (one.tensor, *one.aliases):
                weights[name] = weights[name] + added
        return weights


def _is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 3 or "conv" in name
