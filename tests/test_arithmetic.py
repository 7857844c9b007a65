"""What a host program has set, in the processor or in torch, changes no bit and no verdict, and is put back."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.errors import OptionError
from surgery.format.scales.writing import write_scales
from surgery.lossless.factors import Factors
from surgery.lossless.join import join
from surgery.lossless.split import split
from surgery.lossless.update import approximate, rescale
from tests.models import files_of, realistic
from tests.quantized.fp8 import block_scales, dequantize, quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def in_a_thread(work: Callable[[], None]) -> None:
    """In a thread of its own, whose settings, and those of the threads that torch begins for it, nobody else has."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def flushes() -> tuple[bool, bool]:
    """Whether this thread flushes subnormal numbers, and whether any of those that torch has begun for it does."""
    tiny = torch.full((1 << 18,), 2.0**-126, dtype=torch.float32)
    kept = (tiny * 0.5).view(torch.int32) != 0
    return not bool(kept[0]), not bool(kept.all())


@contextmanager
def flushing(*, threads_only: bool) -> Iterator[None]:
    """As a library that was built with -ffast-math leaves it; ``threads_only``: it has put it back, too late for some."""
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    try:
        assert flushes() == (True, True)
        if threads_only:
            torch.set_flush_denormal(False)
            assert flushes() == (False, True)
        before = flushes()
        yield
        assert flushes() == before
    finally:
        torch.set_flush_denormal(False)


def with_subnormals(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A third of the entries below the normal range."""
    weight = realistic(m, n, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    tiny = (torch.randn(m, n, generator=generator, dtype=torch.float64) * torch.finfo(dtype).tiny / 4).to(dtype)
    return torch.where(torch.rand(m, n, generator=generator) < 1 / 3, tiny, weight)


def save_subnormal(folder: Path, dtype: torch.dtype) -> Path:
    """Matrices that hold subnormal numbers, and one that holds nothing else."""
    folder.mkdir()
    tensors = {f"layers.{i}.w.weight": with_subnormals(72, 80, dtype, seed=i) for i in range(2)}
    tensors["layers.2.w.weight"] = (realistic(66, 70) * torch.finfo(dtype).tiny / 4).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def trained(folder: Path, file: Path) -> Path:
    """Scales of 1.5 for a factorized checkpoint."""
    ones = load_file(folder / "surgery/scales.safetensors")
    write_scales(file, {key: torch.full_like(g, 1.5) for key, g in ones.items()}, surgery.Manifest.read(folder).fingerprint)
    return file


@pytest.mark.parametrize("threads_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_to_zero_changes_nothing(dtype: torch.dtype, threads_only: bool, tmp_path: Path) -> None:
    model = save_subnormal(tmp_path / "m", dtype)
    surgery.factorize(model, tmp_path / "truth", rank=4)
    changed = trained(tmp_path / "truth", tmp_path / "changed.safetensors")
    surgery.fold(tmp_path / "truth", changed, tmp_path / "folded")
    projected = surgery.project(tmp_path / "truth", tmp_path / "folded", tmp_path / "projected.safetensors")
    tiny = load_file(model / "model.safetensors")["layers.2.w.weight"]
    svd = surgery.truncated_svd(tiny, 4)
    assert svd.s[0] > 0

    def work() -> None:
        with flushing(threads_only=threads_only):
            surgery.factorize(model, tmp_path / "f", rank=4)
            assert surgery.verify(tmp_path / "f").ok
            surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
            surgery.fold(tmp_path / "f", changed, tmp_path / "again")
            again = surgery.project(tmp_path / "f", tmp_path / "folded", tmp_path / "p.safetensors")
            assert dataclasses.replace(again, out=projected.out) == projected
            found = surgery.truncated_svd(tiny, 4)
            assert torch.equal(found.s.view(torch.int32), svd.s.view(torch.int32))
            assert found.norm == svd.norm > 0

    in_a_thread(work)
    assert files_of(tmp_path / "f") == files_of(tmp_path / "truth")
    assert files_of(tmp_path / "back") == files_of(model)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "folded")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "projected.safetensors").read_bytes()


@pytest.mark.parametrize("threads_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(300, 260), (1500, 900)])  # one block of rows, and several
def test_the_lossless_arithmetic_by_itself(m: int, n: int, dtype: torch.dtype, threads_only: bool) -> None:
    weight, k = with_subnormals(m, n, dtype), 160  # long enough for torch to share the factors among threads
    left, s, _ = torch.linalg.svd(weight.float(), full_matrices=False)
    U, s = left[:, :k].contiguous(), s[:k]
    factors = Factors(U, s, torch.linalg.qr(realistic(n, k))[0])
    tiny, scales = Factors(U, s * 1e-36, factors.V), torch.full((k,), 1.5)
    expected = split(weight, factors)
    updated, approximated = rescale(weight, tiny, scales)[0], approximate(weight, tiny)[0]
    assert not torch.equal(updated.view(torch.uint8), weight.view(torch.uint8)) or dtype == torch.float16

    def work() -> None:
        with flushing(threads_only=threads_only):
            parts = split(weight, factors)
            assert torch.equal(parts.residual.view(torch.uint8), expected.residual.view(torch.uint8))
            assert torch.equal(parts.correction, expected.correction)
            joined, _ = join(parts.residual, factors, parts.correction)
            assert torch.equal(joined.view(torch.uint8), weight.view(torch.uint8))
            assert torch.equal(rescale(weight, tiny, scales)[0].view(torch.uint8), updated.view(torch.uint8))
            assert torch.equal(approximate(weight, tiny)[0].view(torch.uint8), approximated.view(torch.uint8))

    in_a_thread(work)


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="how to round is told by number")
@pytest.mark.parametrize("direction", [0x400, 0x800, 0xC00])
def test_another_rounding_is_refused_before_any_work(direction: int, tmp_path: Path) -> None:
    model = save_subnormal(tmp_path / "m", torch.bfloat16)
    surgery.factorize(model, tmp_path / "f", rank=4)
    weight = realistic(20, 30)

    def work() -> None:
        library = ctypes.CDLL("libm.so.6")
        assert library.fesetround(direction) == 0
        try:
            for call in (
                lambda: surgery.factorize(model, tmp_path / "g", rank=4),
                lambda: surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "o"),
                lambda: surgery.truncated_svd(weight, 4),
                lambda: split(weight, Factors(weight[:, :2], weight[0, :2], weight.T[:, :2])),
            ):
                with pytest.raises(OptionError, match="to round otherwise than to nearest"):
                    call()
        finally:
            library.fesetround(0)

    in_a_thread(work)
    assert not (tmp_path / "g").exists()
    assert not (tmp_path / "o").exists()


def results(model: Path, loaded: Any, matrices: list[torch.Tensor], folder: Path) -> tuple[dict[str, bytes], list[Any]]:
    """Of all that users call: the files that they write and what they return."""
    folder.mkdir()
    surgery.factorize(model, folder / "f", rank=4)
    surgery.factorize(model, folder / "overlay", energy=0.5, max_rank=8, layout="overlay")
    assert surgery.verify(folder / "f").ok
    assert surgery.verify(folder / "overlay", base=model).ok
    scales, changed = folder / "f/surgery/scales.safetensors", trained(folder / "f", folder / "changed.safetensors")
    surgery.fold(folder / "f", scales, folder / "back")
    surgery.fold(folder / "f", changed, folder / "folded")
    projected = surgery.project(folder / "f", folder / "folded", folder / "projected.safetensors")
    surgery.blend([scales, changed], folder / "blended.safetensors")
    surgery.export(folder / "f", changed, folder / "adapter")
    spectra = surgery.spectra(model, folder / "folded").as_json()
    attached = surgery.attach(loaded, folder / "f")
    attached.load(changed)
    loaded(torch.arange(10)[None]).logits.sum().backward()
    attached.save(folder / "saved.safetensors")
    gradients = [delta.grad.tolist() for delta in attached.parameters() if delta.grad is not None]
    svds = []
    for A in matrices:
        svd = surgery.truncated_svd(A, 4)
        svds += [svd.U.dtype, svd.U.tolist(), svd.s.tolist(), svd.norm.item(), svd.certificate.residual.tolist()]
        svds += [svd.certificate.gap.dtype, svd.certificate.gap.tolist()]
    q = matrices[0].float().to(torch.float8_e4m3fn)
    for like in (torch.ones(5, 7, dtype=torch.float32), torch.ones(5, 7, dtype=torch.float32).to(torch.float8_e8m0fnu)):
        fresh = block_scales(dequantize(q, like, (16, 16)), (16, 16), like)
        svds += [fresh.dtype, fresh.float().tolist(), quantize(q.float(), fresh, (16, 16)).float().tolist()]
    return files_of(folder), [projected, spectra, gradients, svds]


def test_whatever_the_default_dtype_is(llama: Path, tmp_path: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(llama) for _ in range(4)]
    A = realistic(80, 100)
    matrices = [A, A.double(), A.half(), realistic(600, 520), realistic(96, 96) * 1e-39, torch.zeros(9, 8)]
    files, values = results(llama, models[0], matrices, tmp_path / "truth")
    for dtype, loaded in zip((torch.bfloat16, torch.float16, torch.float64), models[1:], strict=True):
        torch.set_default_dtype(dtype)
        try:
            there = results(llama, loaded, matrices, tmp_path / str(dtype))
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        assert {name for name in files if there[0].get(name) != files[name]} == set()
        assert there[0].keys() == files.keys()
        assert repr(there[1]).replace(str(tmp_path / str(dtype)), "") == repr(values).replace(str(tmp_path / "truth"), "")
