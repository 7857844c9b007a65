"""Surgery on model checkpoints: factorize weights by truncated SVD, train only scales, fold them back.

    surgery.factorize("model/", "factorized/", rank=16)
    surgery.fold("factorized/", "scales.safetensors", "folded/")

Names are imported when first used, so that ``surgery --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

#: Tells this package from another project's of the same name, see ``surgery.installation``.
__distribution__ = "model-surgery"

if TYPE_CHECKING:
    from surgery.commands.adapters.export import ExportReport, export
    from surgery.commands.adapters.extract import ExtractPlan, extract, plan_extract
    from surgery.commands.adapters.merge import MergePlan, MergeReport, merge, plan_merge
    from surgery.commands.adapters.resize import ResizeReport, resize
    from surgery.commands.blend import BlendReport, blend
    from surgery.commands.factorize import FactorizeReport, factorize, plan
    from surgery.commands.fold import FoldReport, fold
    from surgery.commands.inspect import InspectReport, inspect
    from surgery.commands.new_scales import NewScales, new_scales
    from surgery.commands.project import ProjectReport, project
    from surgery.commands.scales import ScalesSummary, read_scales, show_scales, write_scales
    from surgery.commands.verify import VerifyReport, verify
    from surgery.commands.verify_folded import FoldCheck, verify_folded
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
    from surgery.extraction.told import ExtractReport
    from surgery.format.manifest import Manifest
    from surgery.format.options import Options
    from surgery.format.scales.reading import ScalesFile
    from surgery.linalg.energy import energy_svd
    from surgery.linalg.svd import Certificate, TruncatedSVD, truncated_svd
    from surgery.linalg.top_k import TopK
    from surgery.lossless.factors import Factors
    from surgery.planning.plan import Plan
    from surgery.planning.recipes import RecipesReport, recipes
    from surgery.progress import Progress, Silent
    from surgery.reports import Report
    from surgery.study.overview import Findings
    from surgery.study.recommend import Recommendation, recommend
    from surgery.study.spectra import SpectraReport, spectra
    from surgery.training.attach import attach
    from surgery.training.attached_scales import Scales
    from surgery.training.choose_directions import ChooseDirections
    from surgery.training.trainer import SaveScales
    from surgery.weights.factorized import Factorized

_HOMES = {
    "BlendReport": "surgery.commands.blend",
    "Certificate": "surgery.linalg.svd",
    "ChooseDirections": "surgery.training.choose_directions",
    "ClusterError": "surgery.errors",
    "DemoReport": "surgery.demo.run",
    "ExportReport": "surgery.commands.adapters.export",
    "ExtractPlan": "surgery.commands.adapters.extract",
    "ExtractReport": "surgery.extraction.told",
    "FactorizeReport": "surgery.commands.factorize",
    "Factorized": "surgery.weights.factorized",
    "Factors": "surgery.lossless.factors",
    "Findings": "surgery.study.overview",
    "FoldCheck": "surgery.commands.verify_folded",
    "FoldReport": "surgery.commands.fold",
    "FormatError": "surgery.errors",
    "InspectReport": "surgery.commands.inspect",
    "InstallationError": "surgery.errors",
    "Manifest": "surgery.format.manifest",
    "MergePlan": "surgery.commands.adapters.merge",
    "MergeReport": "surgery.commands.adapters.merge",
    "MissingExtra": "surgery.errors",
    "NewScales": "surgery.commands.new_scales",
    "OptionError": "surgery.errors",
    "Options": "surgery.format.options",
    "OutputError": "surgery.errors",
    "Plan": "surgery.planning.plan",
    "Progress": "surgery.progress",
    "ProjectReport": "surgery.commands.project",
    "ReadError": "surgery.errors",
    "ResourceError": "surgery.errors",
    "RecipesReport": "surgery.planning.recipes",
    "Recommendation": "surgery.study.recommend",
    "Report": "surgery.reports",
    "ResizeReport": "surgery.commands.adapters.resize",
    "SaveScales": "surgery.training.trainer",
    "Scales": "surgery.training.attached_scales",
    "ScalesError": "surgery.errors",
    "ScalesFile": "surgery.format.scales.reading",
    "ScalesSummary": "surgery.commands.scales",
    "Silent": "surgery.progress",
    "SourceError": "surgery.errors",
    "SpectraReport": "surgery.study.spectra",
    "SurgeryError": "surgery.errors",
    "SurgeryWarning": "surgery.errors",
    "TopK": "surgery.linalg.top_k",
    "TruncatedSVD": "surgery.linalg.svd",
    "VerifyReport": "surgery.commands.verify",
    "WeightError": "surgery.errors",
    "attach": "surgery.training.attach",
    "blend": "surgery.commands.blend",
    "energy_svd": "surgery.linalg.energy",
    "export": "surgery.commands.adapters.export",
    "extract": "surgery.commands.adapters.extract",
    "factorize": "surgery.commands.factorize",
    "fold": "surgery.commands.fold",
    "inspect": "surgery.commands.inspect",
    "merge": "surgery.commands.adapters.merge",
    "new_scales": "surgery.commands.new_scales",
    "plan": "surgery.commands.factorize",
    "plan_extract": "surgery.commands.adapters.extract",
    "plan_merge": "surgery.commands.adapters.merge",
    "project": "surgery.commands.project",
    "read_scales": "surgery.commands.scales",
    "recipes": "surgery.planning.recipes",
    "recommend": "surgery.study.recommend",
    "resize": "surgery.commands.adapters.resize",
    "run_demo": "surgery.demo.run",
    "show_scales": "surgery.commands.scales",
    "spectra": "surgery.study.spectra",
    "truncated_svd": "surgery.linalg.svd",
    "verify": "surgery.commands.verify",
    "verify_folded": "surgery.commands.verify_folded",
    "write_scales": "surgery.commands.scales",
}

__all__ = [
    "BlendReport",
    "Certificate",
    "ChooseDirections",
    "ClusterError",
    "DemoReport",
    "ExportReport",
    "ExtractPlan",
    "ExtractReport",
    "FactorizeReport",
    "Factorized",
    "Factors",
    "Findings",
    "FoldCheck",
    "FoldReport",
    "FormatError",
    "InspectReport",
    "InstallationError",
    "Manifest",
    "MergePlan",
    "MergeReport",
    "MissingExtra",
    "NewScales",
    "OptionError",
    "Options",
    "OutputError",
    "Plan",
    "Progress",
    "ProjectReport",
    "ReadError",
    "RecipesReport",
    "Recommendation",
    "Report",
    "ResizeReport",
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
    "TopK",
    "TruncatedSVD",
    "VerifyReport",
    "WeightError",
    "__version__",
    "attach",
    "blend",
    "energy_svd",
    "export",
    "extract",
    "factorize",
    "fold",
    "inspect",
    "merge",
    "new_scales",
    "plan",
    "plan_extract",
    "plan_merge",
    "project",
    "read_scales",
    "recipes",
    "recommend",
    "resize",
    "run_demo",
    "show_scales",
    "spectra",
    "truncated_svd",
    "verify",
    "verify_folded",
    "write_scales",
]


if not TYPE_CHECKING:  # with a __getattr__, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'surgery' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
