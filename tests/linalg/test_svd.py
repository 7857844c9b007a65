"""truncated_svd against float64 LAPACK, over the matrices that break such routines."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.errors import OptionError, WeightError
from surgery.linalg import preparation, svd
from surgery.precision import full_precision
from surgery.solvers import lanczos, triplets
from surgery.solvers.product import leading_dimension
from tests.models import realistic

N = 640  # above the sizes that go to the Gram matrix


def _with_values(values: torch.Tensor, seed: int = 0, *, double: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (left * values.double()) @ right.T
    return matrix if double else matrix.float()


def _gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def _one_entry() -> torch.Tensor:
    matrix = torch.zeros(N, N)
    matrix[3, 5] = -2.0
    return matrix


MATRICES = {
    "power law": realistic(N, N + 96),
    "power law, flat": realistic(N + 160, N, exponent=0.3),
    "power law, steep": realistic(N, N, exponent=0.7),
    "Gaussian": _gaussian(N, N),
    "tall": realistic(1800, N),
    "wide": realistic(N, 1800),
    "rank 5": _with_values(torch.cat([torch.arange(5.0, 0, -1), torch.zeros(N - 5)])),
    "orthogonal": torch.linalg.qr(_gaussian(N, N))[0],
    "identity": torch.eye(N),
    "staircase of 33": _with_values(
        torch.cat([torch.tensor([3.0, 2.9, 2.8]).repeat_interleave(33), torch.full((N - 99,), 0.1)])
    ),
    "pairs": _with_values(torch.arange(N // 2, 0, -1.0).repeat_interleave(2)),
    "geometric": _with_values(2.0 ** -torch.arange(float(N))),
    "dominant": _with_values(torch.cat([torch.tensor([1e3]), torch.linspace(1, 0, N - 1)])),
    "one entry": _one_entry(),
    "constant": torch.full((N, N), 0.3),
    "scaled rows": _gaussian(N, N) * torch.logspace(0, -12, N)[:, None],
    "tiny": realistic(N, N) * 1e-30,
    "huge": realistic(N, N) * 1e30,
    "subnormal": realistic(N, N) * 1e-38,
    "small": realistic(24, 40),
    "medium": realistic(200, 300),
}


def check(A: torch.Tensor, result: surgery.TruncatedSVD, k: int, *, value_error: float = 1e-6) -> None:
    """Everything that must hold of a result, recomputed in float64."""
    U, s, V = result.U.double(), result.s.double(), result.V.double()
    truth = torch.linalg.svdvals(A.double())
    top = truth[0].item()
    assert (s - truth[:k]).abs().max().item() <= value_error * top
    assert bool((s[:-1] >= s[1:]).all())
    for vectors in (U, V):
        assert (vectors.T @ vectors - torch.eye(k, dtype=torch.float64)).abs().max().item() < 1e-5
    true_residual = torch.maximum((A.double() @ V - U * s).norm(dim=0), (A.double().T @ U - V * s).norm(dim=0)) / max(
        top, 1e-300
    )
    # s is rounded to float32 after it was measured.
    assert bool((true_residual <= result.certificate.residual + 1e-7).all())
    assert bool(result.certificate.converged)
    assert result.certificate.residual.max().item() <= 1e-5
    # Eckart and Young: nothing of rank k comes closer in the Frobenius norm.
    best = truth[k:].square().sum().sqrt().item()
    assert (A.double() - (U * s) @ V.T).norm().item() <= best + 1e-4 * top


@pytest.mark.parametrize("k", [1, 16, 48])
@pytest.mark.parametrize("name", MATRICES)
def test_hard_matrices(name: str, k: int) -> None:
    A = MATRICES[name]
    k = min(k, *A.shape)
    # Subnormal numbers have fewer bits: so have the singular values that are stored as such.
    check(A, surgery.truncated_svd(A, k), k, value_error=1e-5 if name == "subnormal" else 1e-6)


def test_zero_matrix() -> None:
    result = surgery.truncated_svd(torch.zeros(70, 90), 3)
    assert torch.equal(result.s, torch.zeros(3))
    assert torch.equal(result.U, torch.eye(70, 3))
    assert torch.equal(result.V, torch.eye(90, 3))
    assert result.certificate.method == "zero"


@given(m=st.integers(1, 90), n=st.integers(1, 90), data=st.data(), seed=st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_any_shape_and_rank(m: int, n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    A = _gaussian(m, n, seed)
    check(A, surgery.truncated_svd(A, k), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    A = realistic(N, 700).to(dtype)
    result = surgery.truncated_svd(A, 16)
    wide = dtype == torch.float64
    assert {result.U.dtype, result.s.dtype, result.V.dtype} == {torch.float64 if wide else torch.float32}
    check(A, result, 16, value_error=1e-9 if wide else 1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**60])
@pytest.mark.parametrize(
    ("shape", "method"),
    [((2048, 1024), "block-lanczos"), ((1030, 2048), "block-lanczos"), ((512, 4096), "gram"), ((60, 40960), "svd")],
)
def test_rows_that_are_kept_further_apart(
    shape: tuple[int, int], method: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows a multiple of a page apart get zeros behind them, in memory that may hold anything."""

    def used(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(tuple(shape), torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(preparation, "scratch", used)
    assert leading_dimension(*shape, torch.device("cpu")) > shape[1]
    A = (realistic(*shape) * scale).bfloat16()
    found = svd.truncated_svds(torch.stack([A, torch.zeros_like(A), -A]), 8)
    assert [result.certificate.method for result in found] == [method, "zero", method]
    check(A, found[0], 8)
    check(-A, found[2], 8)


@pytest.mark.parametrize("shape", [(N, 800), (800, N), (N, N), (40, 60)])
def test_transpose_swaps_the_vectors(shape: tuple[int, int]) -> None:
    A = realistic(*shape)
    straight, turned = surgery.truncated_svd(A, 8), surgery.truncated_svd(A.T, 8)
    assert torch.allclose(straight.s, turned.s, rtol=1e-6)
    assert torch.allclose(straight.U, turned.V, atol=1e-3)
    assert torch.allclose(straight.V, turned.U, atol=1e-3)


def test_sign_makes_the_largest_entry_positive() -> None:
    result = surgery.truncated_svd(-realistic(N, N), 16)
    both = torch.cat([result.U, result.V])
    assert bool((both.max(dim=0).values == both.abs().max(dim=0).values).all())


def test_scaling_by_a_power_of_two_changes_nothing_but_the_values() -> None:
    A = realistic(N, N)
    once, scaled = surgery.truncated_svd(A, 8), surgery.truncated_svd(A * 2.0**60, 8)
    assert torch.allclose(scaled.s, once.s * 2.0**60, rtol=1e-6)


@pytest.mark.parametrize(("shape", "method"), [((N, 650), "block-lanczos"), ((100, 300), "gram"), ((40, 30), "svd")])
def test_batch_equals_single(shape: tuple[int, int], method: str) -> None:
    batch = torch.stack([realistic(*shape, seed=seed) for seed in range(3)] + [torch.zeros(shape)])
    together = surgery.truncated_svd(batch, 5)
    assert together.U.shape == (4, shape[0], 5)
    assert together.certificate.residual.shape == (4, 5)
    assert together.certificate.method == (method,) * 3 + ("zero",)
    for i, matrix in enumerate(batch):
        alone = surgery.truncated_svd(matrix, 5)
        for name in ("U", "s", "V"):
            assert torch.allclose(getattr(together, name)[i], getattr(alone, name), atol=1e-4)
        assert torch.allclose(together.certificate.residual[i], alone.certificate.residual, atol=1e-6)


@pytest.mark.parametrize("name", ["power law", "Gaussian", "rank 5", "staircase of 33", "geometric", "dominant", "scaled rows"])
def test_matrices_solved_in_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one iteration for all of a batch, whatever each of them needs."""
    monkeypatch.setattr(svd, "_in_step", lambda A, k: len(A))
    A = MATRICES[name]
    batch = torch.stack([A, realistic(*A.shape, seed=7) * 1e20, torch.zeros_like(A), _gaussian(*A.shape)])
    results = svd.truncated_svds(batch, 16)
    for i in (0, 1, 3):
        check(batch[i], results[i], 16)
    assert not results[2].s.any()


def test_same_seed_same_bits_and_nothing_global_is_touched() -> None:
    A = realistic(N, 700)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = surgery.truncated_svd(A, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = surgery.truncated_svd(A, 12, seed=3)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.s, second.s)
    assert torch.equal(first.V, second.V)


def test_reduced_precision_of_the_caller_does_no_harm_and_is_put_back() -> None:
    A = realistic(N, 700)
    expected = surgery.truncated_svd(A, 8)
    torch.set_float32_matmul_precision("medium")
    try:
        result = surgery.truncated_svd(A, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(result.s, expected.s)


def test_new_precision_settings_of_torch_are_put_back_too() -> None:
    A = realistic(N, 700)
    expected = surgery.truncated_svd(A, 8)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = surgery.truncated_svd(A, 8)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert torch.equal(result.s, expected.s)


def test_result_can_be_trained_on() -> None:
    result = surgery.truncated_svd(realistic(40, 30).requires_grad_(), 4)
    s = torch.nn.Parameter(result.s)
    ((result.U * s) @ result.V.T).sum().backward()
    assert s.grad is not None
    assert not result.U.requires_grad


def test_rounds_never_make_a_result_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too few passes to converge, and no Gram matrix to fall back on, the best of the rounds is returned."""
    A = _gaussian(1100, 1100)
    monkeypatch.setattr(lanczos, "MAX_PASSES", 8)
    monkeypatch.setattr(triplets, "_MAX_GRAM", 0)
    result = surgery.truncated_svd(A, 48)
    assert not bool(result.certificate.converged)
    assert result.certificate.residual.max().item() < 0.05
    truth = torch.linalg.svdvals(A.double())[:48]
    assert ((result.s.double() - truth).abs().max() / truth[0]).item() < 5e-3


def test_a_rank_so_large_that_a_restart_keeps_most_of_the_basis() -> None:
    A = _gaussian(1500, 1500)
    result = surgery.truncated_svd(A, 240)
    assert result.certificate.method == "block-lanczos"
    check(A, result, 240)


@pytest.mark.parametrize("setting", ["high", "medium", "highest"])
def test_older_precision_settings_of_torch_do_not_clash(setting: str) -> None:
    """Torch refuses to say what is allowed where its two interfaces contradict each other; so does its CUDA code."""
    torch.set_float32_matmul_precision(setting)
    try:
        with full_precision(torch.device("cpu")):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")


def test_values_beyond_the_range_of_float32_are_refused() -> None:
    with pytest.raises(WeightError, match="beyond the range"):
        surgery.truncated_svd(_gaussian(560, 600) * 1e37, 4)


def test_certificate_tells_a_missing_gap() -> None:
    equal = surgery.truncated_svd(torch.eye(N), 4).certificate
    assert equal.angle_bound.min().item() > 0.01  # no direction of the identity is special
    apart = surgery.truncated_svd(_with_values(torch.cat([torch.tensor([9.0, 7.0, 5.0, 3.0]), torch.full((N - 4,), 0.1)])), 4)
    assert apart.certificate.angle_bound.max().item() < 1e-3
    assert apart.certificate.gap.tolist() == pytest.approx([2 / 9, 2 / 9, 2 / 9, 2 / 9], rel=1e-4)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_that_make_no_sense(seed: int) -> None:
    with pytest.raises(OptionError, match="seed"):
        surgery.truncated_svd(torch.ones(4, 5), 1, seed=seed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    A = torch.ones(20, 30)
    A[7, 3] = bad
    with pytest.raises(WeightError, match="NaN or infinity"):
        surgery.truncated_svd(A, 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "k", "tolerance", "message"),
    [
        ((4, 5), torch.float32, 0, 1e-5, "rank"),
        ((4, 5), torch.float32, 5, 1e-5, "rank"),
        ((4, 5), torch.float32, -1, 1e-5, "rank"),
        ((4,), torch.float32, 1, 1e-5, "matrix"),
        ((4, 5), torch.int64, 1, 1e-5, "floating-point"),
        ((4, 5), torch.float32, 1, 0.0, "tolerance"),
        ((4, 5), torch.float32, 1, 2.0, "tolerance"),
        ((4, 5), torch.float32, 1, 1e-7, "tolerance"),
        ((0, 4, 5), torch.float32, 1, 1e-5, "batch"),
    ],
)
def test_arguments_that_make_no_sense(
    shape: tuple[int, ...], dtype: torch.dtype, k: int, tolerance: float, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        surgery.truncated_svd(torch.ones(shape, dtype=dtype), k, tolerance=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MATRICES)
def test_hard_matrices_on_cuda(name: str) -> None:
    A = MATRICES[name]
    k = min(16, *A.shape)
    result = surgery.truncated_svd(A.cuda(), k)
    on_cpu = surgery.TruncatedSVD(result.U.cpu(), result.s.cpu(), result.V.cpu(), result.norm, result.certificate)
    check(A, on_cpu, k, value_error=1e-5 if name == "subnormal" else 1e-6)


def test_a_matrix_made_of_the_numbers_that_its_caller_drew_with_the_same_seed() -> None:
    """A start block of those would span singular vectors of it, and never see the others."""
    n = 384
    torch.manual_seed(0)
    V = torch.linalg.qr(torch.randn(n, n).T)[0]
    A = (torch.linalg.qr(torch.randn(n, n))[0] * torch.linspace(0.8, 1, n)) @ V.T
    found = surgery.truncated_svd(A, 4, seed=0)
    assert (found.s.double() - torch.linalg.svdvals(A.double())[:4]).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-40, 1e-42, 1e-44])
def test_the_certificate_counts_the_rounding_of_values_that_are_subnormal(scale: float) -> None:
    A = scale * torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    found, wide = surgery.truncated_svd(A, 3), A.double()
    residual = (wide @ found.V.double() - found.U.double() * found.s.double()).norm(dim=0) / torch.linalg.svdvals(wide)[0]
    assert (residual <= 1.01 * found.certificate.residual + 1e-7).all()


def test_the_norm_of_long_rows() -> None:
    A = torch.full((65, 70000), 0.3)
    norm = A.double().norm().item()
    assert abs(surgery.truncated_svd(A, 1).norm.item() - norm) < 1e-6 * norm


def test_several_threads_put_the_settings_back() -> None:
    small, done = torch.randn(40, 50), threading.Event()

    def others() -> None:
        while not done.is_set():
            surgery.truncated_svd(small, 3)

    before = torch.get_float32_matmul_precision()
    A = torch.randn(600, 700)
    alone = surgery.truncated_svd(A, 8)
    try:
        torch.set_float32_matmul_precision("medium")
        thread = threading.Thread(target=others)
        thread.start()
        try:
            together = [surgery.truncated_svd(A, 8) for _ in range(10)]
        finally:
            done.set()
            thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(found.U, alone.U) for found in together)


def _hadamard(n: int, seed: int) -> torch.Tensor:
    """Orthogonal columns of length sqrt(n), of ones and minus ones, in an order and with signs of its own; int64."""
    H = torch.ones(1, 1, dtype=torch.int64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
    return (H * signs)[torch.randperm(n, generator=generator)][:, torch.randperm(n, generator=generator)]


def _exactly(m: int, n: int, values: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A float64 matrix (m, n), both powers of 4, that has these whole numbers as singular values exactly, and its vectors."""
    U, V = _hadamard(m, seed)[:, : len(values)], _hadamard(n, seed + 1)[:, : len(values)]
    product = (U * values) @ V.T
    assert product.abs().max().item() < 1 << 53
    return product.double() / (m * n) ** 0.5, U.double() / m**0.5, V.double() / n**0.5


def _sines(result: surgery.TruncatedSVD, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """(k,), of the larger of the angles of each pair of vectors to the true ones."""

    def of(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        found = found.double() / found.double().norm(dim=0)
        true = true[:, : found.shape[1]]
        sines: torch.Tensor = (found - true * (found * true).sum(dim=0)).norm(dim=0)
        return sines

    return torch.maximum(of(result.U, U), of(result.V, V))


def _close_values(count: int, bits: int, close: int, pattern: str, seed: int) -> torch.Tensor:
    """Descending int64 values below 2^bits of which some lie ``2^(bits - close)`` apart."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(2 ** (bits - 4), 2**bits, (count,), generator=generator)
    values = values.sort(descending=True).values
    apart = 2 ** (bits - close)
    if pattern == "last":
        values[count // 3 + 1 :] //= 4
        values[count // 3] = values[count // 3 - 1] - apart
    elif pattern == "pairs":
        values[1::2] = values[::2] - apart
    else:
        values = 2**bits - apart * torch.arange(count)
    return values.sort(descending=True).values


@pytest.mark.parametrize("tolerance", [1e-5, 1e-13])
@pytest.mark.parametrize("pattern", ["last", "pairs", "all"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (256, 256)])
def test_angles_of_float64_vectors_are_within_their_bound(shape: tuple[int, int], pattern: str, tolerance: float) -> None:
    determined = 0
    for close in (12, 20, 28, 36, 42):
        count = min(shape)
        values = _close_values(count, 43, close, pattern, seed=close)
        A, U, V = _exactly(*shape, values, seed=close)
        result = surgery.truncated_svd(A, count // 3, tolerance=tolerance)
        bound = result.certificate.angle_bound
        assert bool((_sines(result, U, V) <= bound + 1e-14).all())
        assert bool(result.certificate.converged)
        assert ((result.s - values[: count // 3]).abs() <= result.certificate.residual * values[0]).all()
        determined += int((bound < 0.1).sum())
    assert determined > 40 or (pattern, tolerance) != ("all", 1e-13)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize(
    ("n", "ratio"), [(n, ratio) for n in (96, 384) for ratio in (1e-4, 1e-5, 1e-6, 1e-7, 1e-9)] + [(N, 1e-4), (N, 1e-6)]
)
def test_one_value_that_dominates_all_others(n: int, ratio: float, k: int) -> None:
    rest = torch.rand(n - 2, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    rest = torch.cat([torch.ones(1), 0.3 * rest])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        A = _with_values(torch.cat([torch.ones(1, dtype=torch.float64), ratio * rest.double()]), double=True).to(dtype)
        left, s, right = torch.linalg.svd(A.double(), full_matrices=False)
        result = surgery.truncated_svd(A, k)
        certificate, told = result.certificate, s[:k] - s[1 : k + 1] > 1e-13
        assert bool((_sines(result, left, right.T) <= certificate.angle_bound + 1e-13)[told].all())
        error = (result.s.double() - s[:k]).abs()
        assert bool((error <= certificate.residual * s[0] + torch.finfo(result.s.dtype).eps * s[0]).all())
        assert bool(certificate.converged)
        if dtype == torch.float64 or ratio >= 1e-6:  # what float32 vectors can tell
            assert bool((error <= 0.01 * s[:k]).all())
            assert bool((certificate.residual <= 0.2 * s[:k]).all())
        elif dtype == torch.float32 and ratio < 1e-7:
            assert certificate.angle_bound[1:].min().item() == 1.0


def _in_blocks(values: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A float64 matrix with these values exactly, however small, if four neighbours each have common bits; and its vectors."""
    n = len(values)
    parts = [_exactly(4, 4, torch.tensor([8, 4, 2, 1]), seed + i)[1:] for i in range(n // 4)]
    U, V = (torch.block_diag(*side) for side in zip(*parts, strict=True))
    generator = torch.Generator().manual_seed(seed)
    U, V = U[torch.randperm(n, generator=generator)], V[torch.randperm(n, generator=generator)]
    return (U * values) @ V.T, U, V


@pytest.mark.parametrize("k", [12, 24])
@pytest.mark.parametrize("rate", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("n", "scale"), [(96, 1.0), (200, 2.0**40), (520, 2.0**-40)])
def test_values_that_fall_by_halves_and_faster_in_float64(n: int, scale: float, rate: float, k: int) -> None:
    steps = torch.arange(n, dtype=torch.float64)
    values = 2.0 ** -(rate * 2 * (steps // 2)).clamp(max=400) * (1 + (steps % 2 == 0) * 0.5) * scale
    A, U, V = _in_blocks(values, seed=n)
    result = surgery.truncated_svd(A, k)
    certificate = result.certificate
    assert bool(certificate.converged)
    assert bool((_sines(result, U, V) <= certificate.angle_bound + 1e-14).all())
    assert bool(((result.s - values[:k]).abs() <= certificate.residual * values[0]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40), (1, 7), (7, 1)])
def test_the_last_direction_of_all(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Beside a smallest value near 0 the long side has the vectors that the matrix takes to 0."""
    k = min(shape)
    values = torch.logspace(0, -6, k, dtype=torch.float64)
    left = torch.linalg.qr(_gaussian(shape[0], k).double())[0]
    A = ((left * values) @ torch.linalg.qr(_gaussian(shape[1], k, seed=1).double())[0].T).to(dtype)
    U, s, Vt = torch.linalg.svd(A.double(), full_matrices=False)
    result = surgery.truncated_svd(A, k)
    assert bool((_sines(result, U, Vt.T) <= result.certificate.angle_bound + 1e-13 / (s / s[0])).all())
    assert result.certificate.gap[-1].item() <= 1.01 * (s[-1] / s[0]).item() or shape[0] == shape[1]


@pytest.mark.parametrize("k", [16, 40])
@pytest.mark.parametrize("n", [384, N, 1024])
def test_a_next_value_that_has_not_converged(n: int, k: int) -> None:
    """Twelve large values over a bulk of noise: the gaps in it are small against what is known of the next value."""
    A = _gaussian(n, 12) @ _gaussian(12, n, seed=1) + 0.05 * _gaussian(n, n, seed=2)
    left, s, right = torch.linalg.svd(A.double(), full_matrices=False)
    result = surgery.truncated_svd(A, k)
    assert bool((_sines(result, left, right.T) <= result.certificate.angle_bound).all())
    assert result.certificate.gap[-1].item() <= ((s[k - 1] - s[k]) / s[0]).item()
    assert result.certificate.angle_bound[:12].max().item() < 0.1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_values_in_blocks_of_their_own(dtype: torch.dtype, seed: int) -> None:
    """Their products with the large ones are exactly 0: a Gram matrix may lose them without a residual that tells."""
    generator = torch.Generator().manual_seed(seed)
    values = 2.0 ** -torch.randint(0, 44, (160,), generator=generator, dtype=torch.float64).sort().values
    values *= 1 + torch.randint(0, 8, (160,), generator=generator) / 8
    A, _, _ = _in_blocks(values.sort(descending=True).values, seed)
    A = A.to(dtype)
    left, s, right = torch.linalg.svd(A.double())
    result = surgery.truncated_svd(A, 40)
    told = torch.minimum(s[:40] - s[1:41], torch.cat([s[:1], s[:39] - s[1:40]])) > 1e-13 * s[0]
    assert bool((_sines(result, left, right.T) <= result.certificate.angle_bound + 1e-2)[told].all())
    rounding = torch.finfo(dtype).eps * s[0]
    assert bool(((result.s.double() - s[:40]).abs() <= result.certificate.residual * s[0] + rounding).all())


@pytest.mark.parametrize(("n", "rate", "seed"), [(256, 14, 10), (384, 7, 14), (384, 10, 9), (384, 14, 3), (384, 14, 17)])
def test_matrices_on_which_lapack_gives_up(n: int, rate: int, seed: int) -> None:
    """Its eigensolver does on the Gram matrices of some of these, with an error."""
    steps = torch.arange(n, dtype=torch.float64)
    values = 2.0 ** -(steps // 2 * rate).clamp(max=200) * (1 + (steps % 2 == 0) * 0.5)
    A = _in_blocks(values, seed)[0].float()
    result = surgery.truncated_svd(A, n // 3)
    assert (result.s.double() - torch.linalg.svdvals(A.double())[: n // 3]).abs().max().item() < 1e-6
    assert bool(result.certificate.converged)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(66, 65), (70, 100)])
def test_close_values_below_one_that_dominates_in_rows_of_one_entry(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What the start of an iteration has lost to rounding comes in no other way, and the vectors that it has are exact."""
    generator = torch.Generator().manual_seed(0)
    r = min(shape)
    for _ in range(60):
        k = int(torch.randint(4, 9, (1,), generator=generator))
        top = 10.0 ** -(4.4 + 1.5 * torch.rand(1, generator=generator, dtype=torch.float64))
        close = top * (1 - 0.02 * torch.arange(k))
        tail = top / 2 * torch.arange(1, r - k, dtype=torch.float64) ** -2
        values = torch.cat([torch.ones(1, dtype=torch.float64), close, tail])
        A = torch.zeros(shape, dtype=dtype)
        rows, columns = (torch.randperm(side, generator=generator)[:r] for side in shape)
        A[rows, columns] = values.to(dtype)
        s = values.to(dtype).double()
        result = surgery.truncated_svd(A, k + 1)
        assert result.certificate.converged
        torch.testing.assert_close(result.s.double(), s[: k + 1], rtol=1e-5, atol=1e-14)
        gaps = torch.minimum(s[: k + 1] - s[1 : k + 2], torch.cat([s[:1], s[:k] - s[1 : k + 1]]))
        assert bool((result.certificate.gap <= gaps + result.certificate.residual + 1e-14).all())
