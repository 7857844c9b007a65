"""Errors of a GPU at chosen moments of each command: it ends right, with a note, or with an error that says what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.device import as_memory_allows, choose_device, choose_devices
from surgery.errors import OptionError, ResourceError, SurgeryWarning
from surgery.progress import Silent
from tests.gpus import only_pretended
from tests.late_gpu import late_gpu
from tests.models import files_of, save_llama
from tests.pretend_gpu import GPU

pytestmark = only_pretended

# As torch has them.
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.2 GiB is free."
HANDLE = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
WORKSPACE = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(...)`"
SOLVER = "cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`"
FAILED = "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd(...)`"
UNSOLVED = "linalg.eigh: (Batch element 0): The algorithm failed to converge"

NOTES = {
    "cuda:0 has not enough free memory for every matrix: the largest are done on the CPU",
    "the solvers of cuda:0 fail for some matrices: these are done on the CPU",
}
#: Where torch allocates, cuBLAS is called, a decomposition is made.
ALLOCATING = (
    "aten::_to_copy",
    "aten::mul.Tensor",
    "aten::sub.Tensor",
    "aten::cat",
    "aten::new_empty",
    "aten::empty.memory_format",
)
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_addmm_activation")
SOLVERS = (
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::linalg_cholesky_ex",
    "aten::linalg_qr",
    "aten::linalg_solve_triangular",
)


class Fails:
    """Raises an error in place of operations of these kinds (none: of all): of the n-th, or from it on."""

    def __init__(self, kinds: tuple[str, ...], make: Callable[[], Exception], at: int, *, on: bool = False) -> None:
        self.count = 0
        self._kinds, self._make, self._at, self._on = kinds, make, at, on
        self._lock = threading.Lock()

    def __call__(self, kind: str) -> Exception | None:
        if self._kinds and kind not in self._kinds:
            return None
        with self._lock:
            self.count += 1
            fails = self.count == self._at or (self._on and self.count > self._at)
        return self._make() if fails else None


#: By kind of operation: what is thrown there.
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[], Exception]]] = {
    "full": (ALLOCATING, lambda: torch.OutOfMemoryError(FULL)),
    "no handle": (PRODUCTS, lambda: RuntimeError(HANDLE)),
    "no workspace": (PRODUCTS, lambda: RuntimeError(WORKSPACE)),
    "no solver": (SOLVERS, lambda: RuntimeError(SOLVER)),
    "solver failed": (SOLVERS, lambda: RuntimeError(FAILED)),
    "unsolved": (SOLVERS, lambda: torch.linalg.LinAlgError(UNSOLVED)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``m``, a model; ``f``, factorized; ``scales.safetensors``, other than 1; ``tuned``, folded with them. All on the CPU."""
    folder = tmp_path_factory.mktemp("faults")
    save_llama(folder / "m", torch.bfloat16, num_hidden_layers=1)
    manifest = surgery.factorize(folder / "m", folder / "f", rank=4, device="cpu").manifest
    scales = {target.key: torch.full(target.scales_shape, 1.5) for target in manifest.targets}
    surgery.fold(folder / "f", scales, folder / "tuned", device="cpu")
    surgery.extract(folder / "m", folder / "tuned", folder / "adapter", rank=4, device="cpu")
    surgery.merge(folder / "m", folder / "adapter", folder / "merged", device="cpu")
    return folder


def factorize(made: Path, out: Path, device: str, told: Silent) -> None:
    manifest = surgery.factorize(made / "m", out / "f", rank=4, device=device, progress=told).manifest
    assert all(target.converged for target in manifest.targets)
    surgery.fold(out / "f", out / "f/surgery/scales.safetensors", out / "back", device="cpu")
    assert files_of(out / "back") == files_of(made / "m")


def fold(made: Path, out: Path, device: str, told: Silent) -> None:
    manifest = surgery.Manifest.read(made / "f")
    scales = {target.key: torch.full(target.scales_shape, 1.5) for target in manifest.targets}
    surgery.fold(made / "f", scales, out, device=device, progress=told)
    assert files_of(out) == files_of(made / "tuned")


def verify(made: Path, out: Path, device: str, told: Silent) -> None:
    assert surgery.verify(made / "f", device=device, progress=told).ok


def extract(made: Path, out: Path, device: str, told: Silent) -> None:
    report = surgery.extract(made / "m", made / "tuned", out, rank=4, device=device, progress=told)
    assert all(target.error < 0.05 for target in report.targets)


def merge(made: Path, out: Path, device: str, told: Silent) -> None:
    surgery.merge(made / "m", made / "adapter", out, device=device, progress=told)
    assert files_of(out) == files_of(made / "merged")


def spectra(made: Path, out: Path, device: str, told: Silent) -> None:
    report = surgery.spectra(made / "m", made / "tuned", device=device, progress=told).as_json()
    assert all(target["singular_values"] for target in report["targets"])


def project(made: Path, out: Path, device: str, told: Silent) -> None:
    surgery.project(made / "f", made / "tuned", out / "s.safetensors", device=device, progress=told)
    assert all((g - 1.5).abs().median() < 0.02 for g in load_file(out / "s.safetensors").values())


Command = Callable[[Path, Path, str, Silent], None]
COMMANDS: tuple[Command, ...] = (factorize, fold, verify, extract, merge, spectra, project)


def outcome(command: Command, made: Path, out: Path, fault: Fails) -> list[str]:
    """The notes of a command with a fault; what it made has been looked at."""
    told = Silent()
    with late_gpu(fault=fault):
        command(made, out, "cuda:0", told)
    return told.notes


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_at_any_moment(command: Command, kind: str, made: Path, tmp_path: Path) -> None:
    kinds, make = FAULTS[kind]
    whole = Fails(kinds, make, 0)
    outcome(command, made, tmp_path / "whole", whole)
    for at in sorted({1 + i * whole.count // 12 for i in range(12)} if whole.count else ()):
        fault = Fails(kinds, make, at)
        assert set(outcome(command, made, tmp_path / f"{at}", fault)) <= NOTES
        assert fault.count >= at


@pytest.mark.parametrize(
    ("command", "kind", "at"),
    [
        (factorize, "full", 4),
        (factorize, "unsolved", 1),
        (fold, "full", 9),
        (verify, "full", 30),
        (verify, "no handle", 1),
        (extract, "no workspace", 2),
        (merge, "no handle", 1),
        (spectra, "solver failed", 3),
        (project, "full", 12),
    ],
)
def test_errors_from_a_moment_on(command: Command, kind: str, at: int, made: Path, tmp_path: Path) -> None:
    kinds, make = FAULTS[kind]
    fault = Fails(kinds, make, at, on=True)
    notes = set(outcome(command, made, tmp_path / "o", fault))
    assert fault.count >= at
    assert notes <= NOTES
    # The solvers do by themselves on the CPU what decompositions of a GPU cannot.
    assert notes or kind in ("unsolved", "solver failed")


def test_a_device_that_has_failed(made: Path, tmp_path: Path) -> None:
    """After such an error nothing more can be done in this process: it is named as one of ours."""
    lost = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
    for command in (fold, verify):
        with pytest.raises(ResourceError, match="the GPU has failed") as raised:
            outcome(command, made, tmp_path / command.__name__, Fails((), lambda: RuntimeError(lost), 20, on=True))
        assert raised.value.got == lost.partition("\n")[0]
        assert "--device cpu" in str(raised.value)


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCompile with `TORCH_USE_CUDA_DSA`"


def _no_kernel() -> Exception:
    return RuntimeError(NO_KERNEL)


def test_a_device_that_does_not_compute_is_passed_over_or_refused() -> None:
    with late_gpu(cards=("Old", "New"), fault=Fails((), _no_kernel, 1)), pytest.warns(SurgeryWarning, match="passed over"):
        assert choose_device("auto") == torch.device("cuda:1")
    with late_gpu(fault=Fails((), _no_kernel, 1, on=True)):
        with pytest.warns(SurgeryWarning, match="cuda:0 does not work and is passed over: CUDA error: no kernel image"):
            assert choose_device("auto") == torch.device("cpu")
        for name in ("cuda", "cuda:0"):
            with pytest.raises(OptionError, match=f"device {name} does not work") as raised:
                choose_device(name)
            assert raised.value.got == NO_KERNEL.partition("\n")[0]
        with pytest.raises(OptionError, match="does not work"):
            choose_devices("all")
    with late_gpu(cards=("One", "Two")):
        assert choose_device("auto") == torch.device("cuda")
        assert choose_devices("all") == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_other_errors_are_not_taken_for_a_full_device() -> None:
    def work(items: object, device: torch.device) -> list[int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        as_memory_allows(work, [1, 2], GPU)
