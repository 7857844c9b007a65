"""The demo's model in llama.cpp: converted by its own scripts, and held against transformers and PEFT.

``tools/get_llama_cpp.sh`` gets what this needs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import pytest
import torch

import surgery
from surgery.demo.run import MODEL, load

FOLDER = Path(os.environ.get("LLAMA_CPP", "/nonexistent")).absolute()
pytestmark = [
    pytest.mark.serving,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.skipif(not (FOLDER / "llama.cpp").is_dir(), reason="LLAMA_CPP is no folder of tools/get_llama_cpp.sh"),
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
]
TEXT = topics["assert"][:200]
#: Of a probability: all of it is float32 on both sides, so that another number is another model.
CLOSE = 1e-4


@pytest.fixture(scope="module", params=["scales", "core"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``factorized``, ``folded`` and ``adapter``, of scales or cores as training might leave them."""
    folder = tmp_path_factory.mktemp(request.param)
    surgery.factorize(MODEL, folder / "factorized", rank=16)
    scales = surgery.attach(load(MODEL), folder / "factorized", train=request.param)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter += (
                0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** (parameter.ndim / 2 - 0.5)
            )
    scales.save(folder / "scales.safetensors")
    surgery.fold(folder / "factorized", folder / "scales.safetensors", folder / "folded")
    surgery.export(folder / "factorized", folder / "scales.safetensors", folder / "adapter")
    return folder


def _converted(script: str, folder: Path, out: Path, *arguments: object) -> Path:
    """The file that one of llama.cpp's scripts makes of a folder, in float32."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER / "python"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, FOLDER / "llama.cpp" / script, folder, "--outtype", "f32", "--outfile", out, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


@cache
def _base() -> Path:
    """The demo's model, converted once: beside llama.cpp, as it is the same for all tests."""
    return _converted("convert_hf_to_gguf.py", MODEL, FOLDER / "demo-model.gguf")


def _in_llama_cpp(model: Path, adapter: Path | None, text: str, out: Path) -> dict[str, Any]:
    command = ["node", Path(__file__).with_name("evaluate.mjs"), FOLDER, model, adapter or "", text, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _probabilities(model: Any, text: str) -> torch.Tensor:
    """By transformers, float32 (bytes, 256)."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(text.encode())])).logits[0]
    return logits.softmax(-1)


def _adapted(adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(load(MODEL), str(adapter)).eval()


@pytest.mark.parametrize("text", [TEXT, "  two  spaces\n\ttab é♥ <0x41> </s>\0", " "])
def test_tokens_are_bytes(text: str, tmp_path: Path) -> None:
    found = _in_llama_cpp(_base(), None, text.replace("\0", "\1"), tmp_path / "out.json")  # no argument can hold a zero
    assert found["tokens"] == list(text.replace("\0", "\1").encode())
    assert found["back"] == text.replace("\0", "\1")


def test_the_original_model(tmp_path: Path) -> None:
    found = _in_llama_cpp(_base(), None, TEXT, tmp_path / "out.json")
    torch.testing.assert_close(torch.tensor(found["probabilities"]), _probabilities(load(MODEL), TEXT), atol=CLOSE, rtol=0)


def test_a_folded_model(trained: Path, tmp_path: Path) -> None:
    truth = _probabilities(load(trained / "folded"), TEXT)
    assert (truth - _probabilities(load(MODEL), TEXT)).abs().max() > 1000 * CLOSE
    model = _converted("convert_hf_to_gguf.py", trained / "folded", tmp_path / "folded.gguf")
    found = _in_llama_cpp(model, None, TEXT, tmp_path / "out.json")
    torch.testing.assert_close(torch.tensor(found["probabilities"]), truth, atol=CLOSE, rtol=0)


def test_an_exported_adapter(trained: Path, tmp_path: Path) -> None:
    truth = _probabilities(_adapted(trained / "adapter"), TEXT)
    assert (truth - _probabilities(load(MODEL), TEXT)).abs().max() > 1000 * CLOSE
    adapter = _converted("convert_lora_to_gguf.py", trained / "adapter", tmp_path / "adapter.gguf", "--base", MODEL)
    found = _in_llama_cpp(_base(), adapter, TEXT, tmp_path / "out.json")
    torch.testing.assert_close(torch.tensor(found["probabilities"]), truth, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("uniform", [True, False])
def test_an_extracted_adapter(uniform: bool, trained: Path, tmp_path: Path) -> None:
    """Also with ranks by module, though llama.cpp's script reads no alphas by module."""
    surgery.extract(MODEL, trained / "folded", tmp_path / "extracted", energy=0.9, uniform=uniform)
    truth = _probabilities(_adapted(tmp_path / "extracted"), TEXT)
    adapter = _converted("convert_lora_to_gguf.py", tmp_path / "extracted", tmp_path / "adapter.gguf", "--base", MODEL)
    found = _in_llama_cpp(_base(), adapter, TEXT, tmp_path / "out.json")
    torch.testing.assert_close(torch.tensor(found["probabilities"]), truth, atol=CLOSE, rtol=0)
