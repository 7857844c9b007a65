"""Proofs that no larger singular value was missed, on matrices that hide some, and on forged triplets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import surgery
from surgery.linalg import proof
from surgery.linalg.measured import Measured, measure
from surgery.linalg.proof import first_limit, proof_bytes, prove_top_k
from surgery.linalg.svd import truncated_svds
from surgery.linalg.top_k import TopK
from surgery.lossless.factors import Factors
from surgery.solvers.random import generator_of
from tests.linalg.test_svd import MATRICES
from tests.models import realistic
from tests.pretend_gpu import GPU, pretend_gpu


def _orthonormal(m: int, n: int, seed: int) -> torch.Tensor:
    """float64 (m, n), orthonormal columns, from other numbers than those of the solvers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))[0]


def _hiding(
    shape: tuple[int, int], rows: int, seeds: tuple[int, ...] = (0,), dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix whose three largest values lie across the start rows of these seeds, and its values in float64.

    1.05 three times, then 1, 0.98 ... down to a bulk.
    """
    short, long = sorted(shape)
    starts = [torch.randn(rows, short, generator=generator_of(seed), dtype=torch.float32) for seed in seeds]
    seen = torch.linalg.qr(torch.cat(starts).double().T)[0]
    basis = _orthonormal(short, short, 1)
    for _ in range(2):
        basis[:, :3] -= seen @ (seen.T @ basis[:, :3])
        basis = torch.linalg.qr(basis)[0]
    values = torch.cat([torch.full((3,), 1.05), 1 - 0.02 * torch.arange(30), torch.linspace(0.3, 0, short - 33)]).double()
    matrix = (basis * values) @ _orthonormal(long, short, 2).T
    return (matrix if shape[0] <= shape[1] else matrix.T).to(dtype), values


def _verdict(result: surgery.TruncatedSVD) -> str:
    assert isinstance(result.certificate.top_k, TopK)
    return result.certificate.top_k.verdict


@pytest.mark.parametrize(
    ("shape", "rows", "k", "dtype"),
    [
        ((700, 640), 8, 2, torch.float32),  # block Lanczos on a CPU, small and large
        ((640, 700), 8, 3, torch.float64),
        ((520, 4100), 16, 4, torch.float64),
        ((384, 400), 12, 4, torch.float32),  # the Gram matrix: rows are k and eight more
        ((200, 180), 11, 3, torch.float64),
    ],
)
def test_matrices_made_around_the_start_rows(shape: tuple[int, int], rows: int, k: int, dtype: torch.dtype) -> None:
    A, values = _hiding(shape, rows, dtype=dtype)
    # A few steps more, and rounding grows into what is hidden, on some processors.
    tolerance = 1e-4
    fooled = surgery.truncated_svd(A, k, tolerance=tolerance)
    assert bool(fooled.certificate.converged)
    assert fooled.s.tolist() == pytest.approx([1 - 0.02 * i for i in range(k)], abs=1e-5)
    proven = surgery.truncated_svd(A, k, tolerance=tolerance, prove=True)
    assert _verdict(proven) == "proven"
    assert (proven.s.double() - values[:k]).abs().max().item() < 1e-6
    assert proven.certificate.passes > fooled.certificate.passes
    forged = Factors(fooled.U.float(), fooled.s.float(), fooled.V.float())
    for prove in (False, True):
        measured = measure(A, forged, prove=prove)
        assert measured.top_k == TopK("unknown", math.inf, 1.0)
        assert 1.02 - forged.s[-1].item() < measured.missed < 1.05 - forged.s[-1].item()


def test_a_matrix_that_hides_from_all_start_rows_is_not_proven() -> None:
    others = tuple(other << 30 for other in range(3))
    A, _ = _hiding((384, 400), 12, others)
    result = surgery.truncated_svd(A, 4, prove=True)
    assert result.s[0].item() == pytest.approx(1.0, abs=1e-5)  # of all three that were tried
    assert result.certificate.top_k == TopK("unknown", math.inf, 1.0)
    assert surgery.truncated_svd(A, 4, seed=5, prove=True).s[0].item() == pytest.approx(1.05, abs=1e-5)


def test_hidden_values_within_an_energy() -> None:
    A, _ = _hiding((384, 400), 12)
    energy = 0.1
    fooled = surgery.energy_svd(A, energy, max_rank=4)
    proven = surgery.energy_svd(A, energy, max_rank=4, prove=True)
    assert _verdict(proven) == "proven"
    assert proven.s[0].item() == pytest.approx(1.05, abs=1e-5)
    assert len(proven.s) < len(fooled.s) == 4
    norm = torch.linalg.matrix_norm(A.double())
    assert (proven.s.double().norm() / norm).square() >= energy > (proven.s[:-1].double().norm() / norm).square()
    top = proven.certificate.top_k
    assert isinstance(top, TopK)
    truth = torch.linalg.svdvals(A.double())
    assert truth[len(proven.s)] <= proven.s[-1] + top.margin * proven.s[0]


@pytest.mark.parametrize("name", MATRICES)
def test_honest_matrices_are_proven_and_never_refuted(name: str) -> None:
    A = MATRICES[name]
    k = min(16, *A.shape)
    result = surgery.truncated_svd(A, k, prove=True)
    top = result.certificate.top_k
    assert isinstance(top, TopK)
    assert (top.verdict, top.chance) == ("proven", 0.0)
    s, largest = result.s.double(), result.s[0].item()
    assert top.margin <= max(1.01e-3 * (s[-1] / s[0]).item(), 1.2e-6)
    measured = measure(A, Factors(result.U, result.s, result.V))
    assert measured.missed == 0.0
    assert measured.top_k.verdict in ("likely", "unknown")
    if s[-1] > 1e-3 * largest:
        assert measured.top_k.verdict == "likely"
        truth = torch.linalg.svdvals(A.double())
        assert truth[k] <= s[-1] + measured.top_k.margin * s[0]


@pytest.mark.parametrize("name", ["power law, flat", "dominant", "geometric", "small", "medium"])
@pytest.mark.parametrize("skipped", [0, 3])
def test_forged_triplets_are_refuted(name: str, skipped: int) -> None:
    """True singular triplets, without one of the leading ones, which is far enough above the last for any probe to tell."""
    A = MATRICES[name]
    left, s, right = torch.linalg.svd(A.double(), full_matrices=False)
    last = max(12, int((s > s[skipped] / 1.1).sum()))
    kept = [i for i in range(last + 1) if i != skipped]
    forged = Factors(left[:, kept].float(), s[kept].float(), right[kept].T.float().contiguous())
    for prove in (False, True):
        measured = measure(A, forged, prove=prove)
        assert measured.residual.max().item() < 1e-5
        assert measured.top_k == TopK("unknown", math.inf, 1.0)
        most = ((s[skipped] - s[last]) / s[kept[0]]).item()
        assert most - 0.03 * (s[skipped] / s[kept[0]]).item() <= measured.missed <= most
        assert measured.missed > 0


@pytest.mark.parametrize("shape", [(640, 900), (900, 640)])
def test_forged_triplets_of_stored_weights(shape: tuple[int, int]) -> None:
    A = realistic(*shape).bfloat16()
    found = surgery.truncated_svd(A, 9, prove=True)
    assert measure(A, Factors(found.U, found.s, found.V), prove=True).top_k.verdict == "proven"
    measured = measure(A, Factors(found.U[:, 1:].contiguous(), found.s[1:], found.V[:, 1:].contiguous()))
    missed = ((found.s[0] - found.s[8]) / found.s[1]).item()
    assert 0.99 * missed < measured.missed < missed


def test_probes_differ_each_time_and_leave_the_random_state_alone() -> None:
    A = MATRICES["power law"]
    found = surgery.truncated_svd(A, 8)
    state = torch.get_rng_state()
    measured: list[Measured] = [measure(A, Factors(found.U, found.s, found.V)) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({one.beyond for one in measured}) > 1
    truth = torch.linalg.svdvals(A.double())[8] / found.s[0]
    assert all(0.97 * truth <= one.beyond <= truth * (1 + 1e-6) for one in measured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(90, 70), (70, 1300), (1300, 70), (300, 300)])
@pytest.mark.parametrize("exponent", [0, 90, -90])
def test_limits_of_the_norm_of_what_is_left(shape: tuple[int, int], dtype: torch.dtype, exponent: int) -> None:
    A = realistic(*shape).to(dtype) * 2.0**exponent
    if dtype == torch.float64:
        A = A * 2.0 ** (4 * exponent)
    scale = 2.0 ** -(5 * exponent if dtype == torch.float64 else exponent)
    found = surgery.truncated_svd((A * scale), 5)
    U, s, V = found.U, found.s.double() / scale, found.V
    norm = torch.linalg.svdvals(A.double() * scale - (U.double() * (s * scale)) @ V.double().T)[0].item() / scale
    for above in (1e-3, 1e-7):
        assert first_limit(A, U, s, V, [norm * (1 + above)]) == norm * (1 + above)
        assert first_limit(A, U, s, V, [norm * (1 - above)]) is None
    assert first_limit(A, U, s, V, [norm / 2, norm * 2, norm * 3]) == norm * 2


def _with_integers(n: int, seed: int) -> torch.Tensor:
    """A symmetric float64 matrix with the eigenvalues 3, once, and 1, exactly."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    return torch.eye(n, dtype=torch.float64) + 2 / n * signs @ signs.T


@pytest.mark.parametrize("n", [16, 64])
def test_rounding_never_proves_what_is_not_so(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At and just below the norm itself no proof may succeed; without the bounds of rounding some do."""
    nothing = torch.zeros(n, 1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)

    def proofs() -> Iterator[float | None]:
        for seed in range(40):
            A = _with_integers(n, seed)
            yield first_limit(A, nothing, one, nothing, [3 * (1 - below) for below in (1e-14, 1e-15, 3e-16, 0)])

    assert set(proofs()) == {None}
    assert first_limit(_with_integers(n, 0), nothing, one, nothing, [3 * (1 + 1e-9)]) is not None
    monkeypatch.setattr(proof, "_UNIT", 0.0)
    monkeypatch.setattr(proof, "_SAFE", 1.0)
    assert set(proofs()) != {None}


def test_numbers_that_are_none_prove_nothing() -> None:
    A = realistic(70, 80)
    found = surgery.truncated_svd(A, 4)
    A[3, 4] = math.nan
    assert first_limit(A, found.U, found.s.double(), found.V, [1e9]) is None


def test_every_singular_value_found_leaves_none() -> None:
    for A in (realistic(30, 40), realistic(200, 90)):
        k = min(A.shape)
        result = surgery.truncated_svd(A, k, prove=True)
        assert result.certificate.top_k == TopK("proven", 0.0, 0.0)
        assert measure(A, Factors(result.U, result.s, result.V)).top_k == TopK("proven", 0.0, 0.0)


def test_zeros() -> None:
    zeros = torch.zeros(70, 80)
    result = surgery.truncated_svd(zeros, 3, prove=True)
    assert result.certificate.top_k == TopK("proven", 0.0, 0.0)
    assert surgery.energy_svd(zeros, 0.5, max_rank=3, prove=True).certificate.top_k == TopK("proven", 0.0, 0.0)
    measured = measure(zeros, Factors(result.U, result.s, result.V), prove=True)
    assert (measured.top_k, measured.missed) == (TopK("proven", 0.0, 0.0), 0.0)


@pytest.mark.parametrize("shape", [(60, 90), (300, 200), (640, 600)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_batches_and_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    batch = torch.stack([realistic(*shape, seed=seed) for seed in range(2)] + [torch.zeros(shape)]).to(dtype)
    proven = surgery.truncated_svd(batch, 6, prove=True)
    assert isinstance(proven.certificate.top_k, tuple)
    assert [top.verdict for top in proven.certificate.top_k] == ["proven"] * 3
    plain = surgery.truncated_svd(batch, 6)
    assert torch.equal(proven.U, plain.U)  # a proof changes nothing but what is said
    assert torch.equal(proven.s, plain.s)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_on_a_device() -> None:
    A, values = _hiding((640, 660), 16, dtype=torch.float32)
    batch = torch.stack([A, realistic(640, 660)])
    with pretend_gpu():
        there = batch.to(GPU)
        results = truncated_svds(there, 4, prove=True)
        assert [_verdict(result) for result in results] == ["proven", "proven"]
        assert {result.U.device for result in results} == {GPU}
        assert (results[0].s.cpu().double() - values[:4]).abs().max().item() < 1e-6
        factors = Factors(results[1].U, results[1].s, results[1].V)
        assert measure(there[1], factors, prove=True).top_k.verdict == "proven"
        forged = replace(factors, U=results[1].U[:, 1:], s=results[1].s[1:], V=results[1].V[:, 1:])
        measured = measure(there[1], forged)
        assert measured.missed > 0.3
        assert measure(there[1], forged, prove=True).top_k.verdict == "unknown"


@pytest.mark.parametrize("shape", [(70, 4000), (1500, 1400)])
def test_a_proof_takes_no_more_memory_than_is_planned(shape: tuple[int, int]) -> None:
    A = realistic(*shape)
    found = surgery.truncated_svd(A, 4)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert first_limit(A, found.U, found.s.double(), found.V, [2 * found.s[-1].item()]) is not None
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0.3 * proof_bytes(*shape) <= most <= proof_bytes(*shape) + 8 * 3 * 4 * sum(shape)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e200])
@pytest.mark.parametrize("k", [21, 40, 89])
def test_values_that_vanish_in_float64_are_proven(k: int, scale: float) -> None:
    """Of a matrix of rank 20: what is asked for beyond is rounding, and so is all that is not found."""
    numbers = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 20, dtype=torch.float64, generator=numbers) for n in (90, 130))
    A = left @ right.T * scale
    result = surgery.truncated_svd(A, k, prove=True)
    assert _verdict(result) == "proven"
    top = result.certificate.top_k
    assert isinstance(top, TopK)
    truth = torch.linalg.svdvals(A)
    assert truth[k] <= result.s[-1] + top.margin * result.s[0]
    assert top.margin < 1e-8
    # One that is missing is still told.
    s, keep = result.s.clone(), [i for i in range(k) if i != 19]
    assert prove_top_k(A, result.U[:, keep], s[keep], result.V[:, keep], result.certificate.residual[keep]).verdict == "unknown"
