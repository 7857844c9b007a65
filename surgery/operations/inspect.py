"""What a factorized checkpoint holds, from its manifest alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery.format.manifest import Manifest, TargetRecord


def inspect(factorized: str | Path) -> Manifest:
    """The manifest of a factorized checkpoint, checked.

    Raises:
        SurgeryError: see ``Manifest.read``.
    """
    return Manifest.read(Path(factorized))


def undetermined(target: TargetRecord) -> int:
    """How many kept directions the matrix does not determine: their residual is no smaller than their gap."""
    certificate = target.certificate
    return sum(residual >= gap for residual, gap in zip(certificate.residual, certificate.gap, strict=True))


def summary(manifest: Manifest) -> dict[str, Any]:
    """The JSON that ``surgery inspect --json`` prints; ``schema_version`` 1."""
    return {
        "schema_version": 1,
        "layout": manifest.layout,
        "lossless": manifest.lossless,
        "source": asdict(manifest.source),
        "fingerprint": manifest.fingerprint,
        "trainable": sum(target.rank for target in manifest.targets),
        "targets": [
            {
                "tensor": target.tensor,
                "shard": target.shard,
                "shape": target.shape,
                "dtype": target.dtype,
                "rank": target.rank,
                "view": target.view,
                "energy": target.energy,
                "s_first": target.s_first,
                "s_last": target.s_last,
                "inexact": target.inexact,
                "converged": target.certificate.converged,
                "method": target.certificate.method,
                "passes": target.certificate.passes,
                "max_residual": max(target.certificate.residual),
                "undetermined": undetermined(target),
            }
            for target in manifest.targets
        ],
        "skipped": [asdict(item) for item in manifest.skipped],
    }
