"""What was written once is written again, byte for byte: ``tests/kept`` has small checkpoints of each layout.

A restructuring changes none of these bytes. A change of the format does, and writes them anew (``tests/kept_layouts.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests import kept_layouts
from tests.kept_layouts import CASES, KEPT
from tests.models import files_of

KNOWN: dict[str, Any] = json.loads((KEPT / "made.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_folds_and_exports_are_what_they_were(name: str, tmp_path: Path) -> None:
    """From the kept factors: on any machine."""
    assert kept_layouts.made_from_kept(name, tmp_path) == KNOWN["made"][name]


@pytest.mark.parametrize("name", CASES)
def test_untouched_scales_give_the_model_back(name: str, tmp_path: Path) -> None:
    model = CASES[name].save(tmp_path / "model")
    there, was = kept_layouts.hashes(model), KNOWN["made"][name]["untouched"]
    exact = name not in ("uncorrected", "dequantized")
    assert ({file for file in there if there[file] != was.get(file)} == set()) is exact


def _only_on_the_same_kernel() -> None:
    if KNOWN["kernel"] != kept_layouts.kernel():  # an SVD has other last bits there
        pytest.skip(f"made with {KNOWN['kernel']}, here is {kept_layouts.kernel()}")


@pytest.mark.parametrize("name", CASES)
def test_factorize_writes_what_it_wrote(name: str, tmp_path: Path) -> None:
    _only_on_the_same_kernel()
    model = CASES[name].save(tmp_path / "model")
    surgery.factorize(model, tmp_path / "f", device="cpu", **CASES[name].options, progress=surgery.Silent())
    there, was = files_of(tmp_path / "f"), files_of(KEPT / name)
    manifest = "surgery/manifest.json"
    assert there.keys() == was.keys()
    assert {file for file in there if there[file] != was[file]} <= {manifest}
    now, then = (kept_layouts.manifest_without_versions(folder) for folder in (tmp_path / "f", KEPT / name))
    for target in now["targets"]:  # the kept ones are of a version before this entry
        for certificate in target["certificates"]:
            assert certificate.pop("top_k")["verdict"] in ("proven", "likely", "unknown")
    assert now == then


@pytest.mark.parametrize("name", CASES)
def test_what_an_earlier_version_wrote_is_written_again_as_it_was(name: str, tmp_path: Path) -> None:
    """As when its card changes on the way to the hub; and it says no more than it did."""
    manifest = surgery.Manifest.read(KEPT / name)
    manifest.write(tmp_path)
    assert (tmp_path / "surgery/manifest.json").read_bytes() == (KEPT / name / "surgery/manifest.json").read_bytes()
    assert {known.verdict for target in manifest.targets for known in target.top_k} == {"unknown"}
    assert not manifest.options.prove


@pytest.mark.parametrize("name", CASES)
def test_project_and_spectra_measure_what_they_measured(name: str, tmp_path: Path) -> None:
    _only_on_the_same_kernel()
    assert kept_layouts.measured(name, tmp_path) == KNOWN["measured"][name]
