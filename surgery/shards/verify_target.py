"""The checks of one target: of its factors, and of its weights matrix by matrix as they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from surgery.errors import SurgeryError
from surgery.format.factors import FactorsHash, FactorsReader
from surgery.format.manifest_records import TargetRecord
from surgery.format.options import Options
from surgery.format.sample import SampleHash, sampled_dtype
from surgery.format.top_k_records import TopKRecord
from surgery.linalg.measured import Measured, could_come_from, gap_limits, overstated, says_converged
from surgery.lossless.factors import Factors
from surgery.reports import rounded_to
from surgery.shards.failures import Failure, Failures

#: Largest entry of ``U^T U - I`` that passes: vectors are rounded to float32.
_ORTHONORMAL = 1e-5
#: By how much a residual may exceed the recorded one, over s_1, beyond 1 %: float64 products differ from machine to machine.
_ROUNDED = 1e-9
#: By how much a value that was missed may be above s_k, relatively: a proof does not tell closer ones apart.
_AS_LARGE = 1e-3
#: Relative error that a recorded energy may have: half a unit in its sixth digit, and that of float32 sums of squares.
_ENERGY = 8e-6


@dataclass(frozen=True, slots=True)
class MeasuredMatrix:
    """What was measured of one matrix.

    Attributes:
        index: which matrix of its target.
        factors: those in the checkpoint.
        measured: residuals and energy of the original weight against these; None where it could not be recovered.
        inexact: share of the entries that residual and factors alone do not give back; None in the overlay layout.
        agrees: whether the residual in the checkpoint is that of the base's weight; True where they are not compared.
        damage: why the weight could not be recovered; empty if it was.
    """

    index: int
    factors: Factors
    measured: Measured | None
    inexact: float | None
    agrees: bool
    damage: str = ""


@dataclass(slots=True)
class CheckedTarget:
    """A target that is being checked: what has been measured of its matrices so far, and which checks of them have failed.

    Attributes:
        target: which.
        options: those that the checkpoint was made with.
        prove: whether it is to be proven that no larger singular value was missed.
        spoiled: whether something was found that makes further checks meaningless.
        stored: hash of the sample of what is stored, residual or weight.
        recovered: hash of the sample of the weights that are recovered from residuals.
        top_k: of each matrix that was measured, whether its kept values are the largest.
    """

    target: TargetRecord
    options: Options
    prove: bool
    spoiled: bool = False
    stored: SampleHash = field(init=False)
    recovered: SampleHash = field(init=False)
    top_k: list[TopKRecord] = field(default_factory=list)
    _matrices: int = 0
    _kept: float = 0.0
    _total: float = 0.0
    _inexact: float = 0.0
    _residuals_agree: bool = True
    _misses: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        dtype = sampled_dtype(self.target)
        self.stored, self.recovered = SampleHash(dtype), SampleHash(dtype)

    def take(self, seen: MeasuredMatrix) -> None:
        """Check what was measured of a matrix against its certificate. Failures are told by ``conclude``."""
        target, measured, certificate = self.target, seen.measured, self.target.certificates[seen.index]
        self._matrices += 1
        if measured is None:
            self._misses.append(("the correction decodes", seen.damage, ""))
            self.spoiled = True
            return
        s, known = seen.factors.s.double(), TopKRecord.of(measured.top_k)
        self.top_k.append(known)
        self._kept += s.square().sum().item()
        self._total += measured.energy
        self._inexact += seen.inexact or 0.0
        self._residuals_agree &= seen.agrees
        which = f", matrix {seen.index}" if target.view == "stack" else ""

        def miss(check: str, got: str, expected: str = "") -> None:
            self._misses.append((check, got + which, expected))

        residual, gap = (torch.tensor(part, dtype=torch.float64) for part in (certificate.residual, certificate.gap))
        worst = int((measured.residual - residual).argmax())
        if not bool((measured.residual <= 1.01 * residual + _ROUNDED).all()):
            got = f"residual {measured.residual[worst].item():.2e} of direction {worst + 1}"
            miss("certificate", f"{got}, recorded {residual[worst].item():.2e}")
            return  # the certificate belongs to other factors, so that its other figures say nothing
        if bool((over := overstated(residual, measured)).any()):
            i = int(over.nonzero()[0])
            miss("residual", f"{residual[i].item():.3g} of direction {i + 1}", f"{measured.residual[i].item():.3g}")
        first, last = s[0].item(), s[-1].item()
        allowed = max(self.options.tolerance * first, _AS_LARGE * last)
        if measured.missed * first > allowed:
            miss("no larger singular value", f"{last + measured.missed * first:.6g}", f"at most {last + allowed:.6g}")
        elif self.prove and known.verdict != "proven":
            miss("proof that no singular value is larger", str(known), "proven")
        (_, m, n), short = target.matrices, min(target.matrices[1:])
        least, most = gap_limits(s, measured, gap, short, max(m, n))
        if bool((wrong := ~((least <= gap) & (gap <= most))).any()):
            i = int(wrong.nonzero()[0])
            limits = f"from {max(0.0, least[i].item()):.3g} to {max(0.0, most[i].item()):.3g}"
            miss("gap", f"{gap[i].item():.3g} of direction {i + 1}", limits)
        converged = says_converged(s, residual, self.options.tolerance)
        if converged is not None and converged != certificate.converged:
            miss("converged", str(certificate.converged), f"{converged}, by its residuals")
        ranks = range(target.rank, (target.rank if self.options.rank is not None else short) + 1)
        if not could_come_from(certificate.method, certificate.passes, short, ranks, zeros=measured.energy == 0):
            miss("method and passes", f"{certificate.method}, {certificate.passes}", "those of a solve of this shape")

    def conclude(self, file: str, failures: Failures, *, is_recovered: bool) -> None:
        """Check the target as a whole, after all of its matrices have been measured.

        Args:
            file: the name of the weight file that was read.
            failures: failed checks are added to it, also those of single matrices.
            is_recovered: whether the file holds residuals, from which the weights were recovered.
        """
        target = self.target
        if self.spoiled:
            for miss in self._misses:
                failures.expect(False, target.key, *miss)
            return
        if not failures.expect(self._matrices > 0, f"{file}: {target.tensor}", "the tensor is there", "nothing"):
            return
        if is_recovered:
            found, sample = self.stored.hexdigest(), target.residual_sample_sha256
            failures.expect(found == sample, target.key, "sample of the residual", found, sample)
        found, sample = (self.recovered if is_recovered else self.stored).hexdigest(), target.sample_sha256
        if not failures.expect(found == sample, target.key, "sample of the original weight", found, sample):
            return  # certificates and energy belong to another matrix
        for miss in self._misses:
            failures.expect(False, target.key, *miss)
        failures.expect(target.converged, target.key, "the SVD has converged", "no")
        energy = min(self._kept / self._total, 1.0) if self._total else 1.0
        near = abs(target.energy - energy) <= _ENERGY * energy
        failures.expect(near, target.key, "energy", target.energy, f"{energy:.6g}")
        if target.inexact is not None:
            inexact = rounded_to(self._inexact / self._matrices, 3)
            failures.expect(target.inexact == inexact, target.key, "inexact", target.inexact, inexact)
        failures.expect(self._residuals_agree, target.key, "residual of the base's weight", "another")


def factors_found(target: TargetRecord, reader: FactorsReader) -> list[Failure]:
    """Check U, s and V of a target by themselves: their hash, orthonormality, and the order of s.

    Returns:
        The checks that failed.
    """
    failures, name, count = Failures(), target.key, target.matrices[0]
    eye = torch.eye(target.rank, dtype=torch.float64)
    first, last, descends, off = 0.0, float("inf"), True, {"U": 0.0, "V": 0.0}
    hashes = FactorsHash()
    try:
        for i in range(count):
            factors = reader.factors(target, i)
            hashes.update(factors)
            for part, vectors in (("U", factors.U), ("V", factors.V)):
                wide = vectors.double()
                off[part] = max(off[part], (wide.T @ wide - eye).abs().max().item())
            s = factors.s
            descends &= bool((s >= 0).all() and (s[:-1] >= s[1:]).all())
            first, last = max(first, s[0].item()), min(last, s[-1].item())
    except SurgeryError as error:
        failures.fail(name, error)
        return failures.found
    digest, recorded = hashes.hexdigest(), target.factors_sha256
    failures.expect(digest == recorded, name, "sha256 of U, s, V", digest, recorded)
    for part, most in off.items():
        failures.expect(
            most <= _ORTHONORMAL, name, f"{part} is orthonormal", f"off by {most:.1e}", f"at most {_ORTHONORMAL:.0e}"
        )
    failures.expect(descends, name, "s descends")
    ends = (first, last)
    failures.expect(ends == (target.s_first, target.s_last), name, "s_1, s_k", ends, (target.s_first, target.s_last))
    return failures.found
