"""Surgery on model checkpoints: factorize weights by truncated SVD, train only scales, fold them back.

    surgery.factorize("model/", "factorized/", rank=16)
    surgery.fold("factorized/", "scales.safetensors", "folded/")

Names are imported when first used, so that ``surgery --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

#: By this the package is told from another project's of the same name, see ``surgery.installation``.
__distribution__ = "model-surgery"

if TYPE_CHECKING:
    from surgery.demo.run import DemoReport, run_demo
    from surgery.errors import (
        ClusterError,
        FormatError,
        InstallationError,
        MissingExtra,
        OptionError,
        OutputError,
        ReadError,
        ResourceError,
        ScalesError,
        SourceError,
        SurgeryError,
        SurgeryWarning,
        WeightError,
    )
    from surgery.format.manifest import Manifest
    from surgery.format.scales import ScalesFile
    from surgery.linalg.energy import energy_svd
    from surgery.linalg.svd import Certificate, TruncatedSVD, truncated_svd
    from surgery.operations.blend import BlendReport, blend
    from surgery.operations.export import ExportReport, export
    from surgery.operations.factorize import FactorizeReport, factorize, plan
    from surgery.operations.fold import FoldReport, fold
    from surgery.operations.inspect import InspectReport, inspect
    from surgery.operations.project import ProjectReport, project
    from surgery.operations.recommend import Recommendation, recommend
    from surgery.operations.scales import ScalesSummary, read_scales, show_scales, write_scales
    from surgery.operations.spectra import Findings, SpectraReport, spectra
    from surgery.operations.verify import VerifyReport, verify
    from surgery.planning.plan import Plan
    from surgery.planning.recipes import RecipesReport, recipes
    from surgery.progress import Progress, Silent
    from surgery.reports import Report
    from surgery.training.attach import Scales, attach
    from surgery.training.trainer import SaveScales

_HOMES = {
    "BlendReport": "surgery.operations.blend",
    "Certificate": "surgery.linalg.svd",
    "ClusterError": "surgery.errors",
    "DemoReport": "surgery.demo.run",
    "ExportReport": "surgery.operations.export",
    "FactorizeReport": "surgery.operations.factorize",
    "Findings": "surgery.operations.spectra",
    "FoldReport": "surgery.operations.fold",
    "FormatError": "surgery.errors",
    "InspectReport": "surgery.operations.inspect",
    "InstallationError": "surgery.errors",
    "Manifest": "surgery.format.manifest",
    "MissingExtra": "surgery.errors",
    "OptionError": "surgery.errors",
    "OutputError": "surgery.errors",
    "Plan": "surgery.planning.plan",
    "Progress": "surgery.progress",
    "ProjectReport": "surgery.operations.project",
    "ReadError": "surgery.errors",
    "ResourceError": "surgery.errors",
    "RecipesReport": "surgery.planning.recipes",
    "Recommendation": "surgery.operations.recommend",
    "Report": "surgery.reports",
    "SaveScales": "surgery.training.trainer",
    "Scales": "surgery.training.attach",
    "ScalesError": "surgery.errors",
    "ScalesFile": "surgery.format.scales",
    "ScalesSummary": "surgery.operations.scales",
    "Silent": "surgery.progress",
    "SourceError": "surgery.errors",
    "SpectraReport": "surgery.operations.spectra",
    "SurgeryError": "surgery.errors",
    "SurgeryWarning": "surgery.errors",
    "TruncatedSVD": "surgery.linalg.svd",
    "VerifyReport": "surgery.operations.verify",
    "WeightError": "surgery.errors",
    "attach": "surgery.training.attach",
    "blend": "surgery.operations.blend",
    "energy_svd": "surgery.linalg.energy",
    "export": "surgery.operations.export",
    "factorize": "surgery.operations.factorize",
    "fold": "surgery.operations.fold",
    "inspect": "surgery.operations.inspect",
    "plan": "surgery.operations.factorize",
    "project": "surgery.operations.project",
    "read_scales": "surgery.operations.scales",
    "recipes": "surgery.planning.recipes",
    "recommend": "surgery.operations.recommend",
    "run_demo": "surgery.demo.run",
    "show_scales": "surgery.operations.scales",
    "spectra": "surgery.operations.spectra",
    "truncated_svd": "surgery.linalg.svd",
    "verify": "surgery.operations.verify",
    "write_scales": "surgery.operations.scales",
}

__all__ = [
    "BlendReport",
    "Certificate",
    "ClusterError",
    "DemoReport",
    "ExportReport",
    "FactorizeReport",
    "Findings",
    "FoldReport",
    "FormatError",
    "InspectReport",
    "InstallationError",
    "Manifest",
    "MissingExtra",
    "OptionError",
    "OutputError",
    "Plan",
    "Progress",
    "ProjectReport",
    "ReadError",
    "RecipesReport",
    "Recommendation",
    "Report",
    "ResourceError",
    "SaveScales",
    "Scales",
    "ScalesError",
    "ScalesFile",
    "ScalesSummary",
    "Silent",
    "SourceError",
    "SpectraReport",
    "SurgeryError",
    "SurgeryWarning",
    "TruncatedSVD",
    "VerifyReport",
    "WeightError",
    "__version__",
    "attach",
    "blend",
    "energy_svd",
    "export",
    "factorize",
    "fold",
    "inspect",
    "plan",
    "project",
    "read_scales",
    "recipes",
    "recommend",
    "run_demo",
    "show_scales",
    "spectra",
    "truncated_svd",
    "verify",
    "write_scales",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'surgery' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
