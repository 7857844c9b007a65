"""A program that uses every public name, for ``mypy --strict``: ``tools/check_wheel.py`` checks it against a built wheel.

It is never run. mypy reports an ``assert_type`` whose result is Any or of another type, and a ``type: ignore`` on a call that
it does not find wrong. Add a new public name to the section that it belongs to.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import torch

import surgery

# Factorize and fold.
assert_type(surgery.factorize("model", "factorized", rank=16, include=["*.q_proj.weight"]), surgery.FactorizeReport)
assert_type(
    surgery.factorize(Path("model"), Path("factorized"), energy=0.5, max_rank=64, layout="overlay"), surgery.FactorizeReport
)
assert_type(surgery.Manifest.read("factorized"), surgery.Manifest)
options = surgery.Options(rank=16, include=("*.q_proj.weight",))
assert_type(surgery.factorize("model", "factorized", options=options, seed=1), surgery.FactorizeReport)
assert_type(surgery.plan("model", rank=16).trainable, int)
assert_type(surgery.plan("model", options=options).options, surgery.Options)
assert_type(surgery.fold("factorized", "scales.safetensors", "folded"), surgery.FoldReport)
assert_type(surgery.fold("factorized", {"w": torch.ones(16)}).changed, int)
assert_type(surgery.export("factorized", Path("scales.safetensors"), "adapter"), surgery.ExportReport)
assert_type(surgery.verify_folded("factorized", "folded", "scales.safetensors"), surgery.FoldCheck)

# Adapters.
assert_type(surgery.merge("model", ["adapter", Path("another")], "merged", weights=[0.5, 0.5]), surgery.MergeReport)
assert_type(surgery.plan_merge("model", "adapter"), surgery.MergePlan)
assert_type(surgery.extract("model", Path("tuned"), "adapter", rank="auto", full=["*norm*"]), surgery.ExtractReport)
assert_type(surgery.extract("model", "tuned", budget=1000, layout="kohya", options=options).kept, float | None)
assert_type(surgery.plan_extract("model", "tuned", energy=0.9, include=["*.q_proj.weight"]), surgery.ExtractPlan)
assert_type(surgery.resize("adapter", Path("resized"), rank=8), surgery.ResizeReport)

# Look at results.
assert_type(surgery.inspect("factorized").manifest, surgery.Manifest)
assert_type(surgery.inspect("factorized").as_json(), dict[str, Any])
assert_type(surgery.verify("factorized"), surgery.VerifyReport)
assert_type(surgery.verify("factorized", fast=True).ok, bool)

with surgery.Factorized.open("factorized", base="model", stream=False) as checkpoint:
    assert_type(checkpoint, surgery.Factorized)
    assert_type(checkpoint.manifest, surgery.Manifest)
    assert_type(checkpoint.original("model.layers.0.mlp.up_proj.weight"), torch.Tensor)
    assert_type(checkpoint.factors("model.layers.0.mlp.up_proj.weight"), surgery.Factors)

# Train.
scales = surgery.attach(torch.nn.Linear(4, 4), "factorized")
assert_type(scales, surgery.Scales)
assert_type(scales.parameters(), Iterator[torch.nn.Parameter])
assert_type(scales.values(), dict[str, torch.Tensor])
scales.save("scales.safetensors")
scales.load(Path("scales.safetensors"))
with scales.untouched():
    pass

# Scales without training.
assert_type(surgery.project("factorized", "tuned", "scales.safetensors"), surgery.ProjectReport)
assert_type(surgery.blend(["a.safetensors", Path("b.safetensors")], "c.safetensors", weights=[0.5, 0.5]), surgery.BlendReport)
assert_type(surgery.recommend("model", budget=1000, out="recipe.toml"), surgery.Recommendation)

assert_type(surgery.new_scales("factorized", "untouched.safetensors", train="core"), surgery.NewScales)
assert_type(surgery.read_scales("a.safetensors").values["w"], torch.Tensor)
surgery.write_scales("b.safetensors", {"w": torch.ones(16)}, surgery.inspect("factorized").fingerprint)
assert_type(surgery.show_scales("a.safetensors").changed, int)

# Studies.
assert_type(surgery.spectra("model", include=["*.q_proj.weight"], split=True).findings, surgery.Findings)
assert_type(surgery.recipes(), surgery.RecipesReport)

# Linear algebra.
svd = surgery.truncated_svd(torch.randn(8, 6), 2)
assert_type(svd, surgery.TruncatedSVD)
assert_type(svd.certificate, surgery.Certificate)
assert_type(svd.certificate.top_k, surgery.TopK | tuple[surgery.TopK, ...])
assert_type(svd.certificate.converged, torch.Tensor)
assert_type(surgery.energy_svd(torch.randn(8, 6), 0.5, max_rank=4).s, torch.Tensor)

# Errors.
try:
    surgery.verify("factorized")
except surgery.SurgeryError as error:
    assert_type(error.what, str)
assert_type(surgery.__version__, str)

# What a type checker has to report.
surgery.factorize("model", "factorized", rank="16")  # type: ignore[arg-type]
surgery.factorize("model", "factorized", layout="both")  # type: ignore[arg-type]
surgery.factorize("model", "factorized", train="cores")  # type: ignore[arg-type]
surgery.factorize("model", "factorized", ranks=16)  # type: ignore[call-arg]
surgery.Options(rank="16")  # type: ignore[arg-type]
surgery.spectra("model", rank=16)  # type: ignore[call-arg]
surgery.plan("model", include="*.q_proj.weight")  # type: ignore[arg-type]
surgery.fold("factorized")  # type: ignore[call-arg]
surgery.extract("model", "tuned", rank="most")  # type: ignore[arg-type]
surgery.resize("adapter", "resized", rank="auto")  # type: ignore[arg-type]
surgery.fold("factorized", {"w": 1.0}, "folded")  # type: ignore[dict-item]
surgery.truncated_svd([[1.0]], 1)  # type: ignore[arg-type]
surgery.attach(torch.ones(3), "factorized")  # type: ignore[arg-type]
print(surgery.no_such_name)  # type: ignore[attr-defined]
