"""What a factorized checkpoint holds, from its manifest alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery.device import on_its_own_terms
from surgery.format.manifest import Manifest, TargetRecord


@on_its_own_terms
def inspect(factorized: str | Path) -> Manifest:
    """The manifest of a factorized checkpoint, checked.

    Args:
        factorized: a folder written by ``factorize``.

    Returns:
        What it says, which holds together; of files nothing is looked at.

    Raises:
        SurgeryError: see ``Manifest.read``.
    """
    return Manifest.read(factorized)


def undetermined(target: TargetRecord) -> int:
    """How many kept directions are not determined: their residual is no smaller than their gap, or no gap is known."""
    return sum(
        residual >= gap
        for certificate in target.certificates
        for residual, gap in zip(certificate.residual, certificate.gap, strict=True)
    )


def largest_residual(target: TargetRecord) -> float:
    """Of all kept directions, over the s_1 of each matrix."""
    return max(max(certificate.residual) for certificate in target.certificates)


def last_value_error(target: TargetRecord) -> float:
    """Share of s_k that is in doubt, at the most: 1 where it may be anything. Of the matrix that it is largest for.

    A residual says how far a value may be off, over the s_1 of its matrix. Of a stack the manifest has only the largest and the
    smallest value of all; that of each is no smaller than its gap.
    """
    share = target.s_last / target.s_first if target.s_first else 0.0

    def of(residual: float, least: float) -> float:
        return min(1.0, residual / least) if least else float(residual > 0)

    return max(of(certificate.residual[-1], max(share, certificate.gap[-1])) for certificate in target.certificates)


def methods(target: TargetRecord) -> str:
    """The methods that its matrices were solved by."""
    return ", ".join(sorted({certificate.method for certificate in target.certificates}))


def summary(manifest: Manifest) -> dict[str, Any]:
    """The JSON that ``surgery inspect --json`` prints; ``schema_version`` 1. ``s_last_error``: see ``last_value_error``."""
    return {
        "schema_version": 1,
        "layout": manifest.layout,
        "lossless": manifest.lossless,
        "source": asdict(manifest.source),
        "fingerprint": manifest.fingerprint,
        "trainable": sum(target.trainable for target in manifest.targets),
        "targets": [
            {
                "tensor": target.tensor,
                "slice": target.slice.name if target.slice else None,
                "shard": target.shard,
                "shape": target.shape,
                "dtype": target.dtype,
                "view": target.view,
                "matrices": list(target.matrices),
                "rank": target.rank,
                "energy": target.energy,
                "s_first": target.s_first,
                "s_last": target.s_last,
                "s_last_error": last_value_error(target),
                "inexact": target.inexact,
                "converged": target.converged,
                "method": methods(target),
                "passes": sum(certificate.passes for certificate in target.certificates),
                "max_residual": largest_residual(target),
                "undetermined": undetermined(target),
                "aliases": [alias.tensor for alias in target.aliases],
            }
            for target in manifest.targets
        ],
        "skipped": [asdict(item) for item in manifest.skipped],
    }
