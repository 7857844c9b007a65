"""docs/training.md: its blocks run as they are written. The plugins do what PEFT does, where their trainers are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery
from tests.releases import needs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/training.md").read_text()
DEMO = Path(surgery.__file__).parent / "demo" / "model"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trainers") / "factorized"
    surgery.factorize(DEMO, out, rank=4, include=["*q_proj*"])
    return out


def block(section: str, kind: str = "python") -> str:
    """The first block of code of a section of the page."""
    found = re.search(rf"^## {section}\n.*?^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def run(code: str, folder: Path) -> str:
    """What a program of its own prints, as the packages' warnings are none of ours."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits(model: Path) -> torch.Tensor:
    """Of a model in float32."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.arange(32)[None]).logits


@needs("peft", ">=0.20", "TINYLORA")
def test_blocks(factorized: Path, tmp_path: Path) -> None:
    """What the blocks train is what PEFT makes of it in the model, and what fold makes of it."""
    surgery.export(factorized, None, tmp_path / "adapter", to="peft-trainable", base_model=str(DEMO))
    data = "from datasets import Dataset\nDATA = Dataset.from_dict({'text': ['one two three four'] * 8})\n"
    given = f"MODEL, ADAPTER, STEPS = {str(DEMO)!r}, 'adapter', 8\n{data}"
    trainer = block("TRL").replace("max_steps=STEPS", "max_steps=STEPS, use_cpu=True, report_to='none'")
    tokenizer = (
        f"from transformers import AutoTokenizer\ntokenizer = AutoTokenizer.from_pretrained({str(DEMO)!r})\n"
        "tokenizer.eos_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)\n"
    )
    trainer = trainer.replace("train_dataset=DATA", "train_dataset=DATA, processing_class=tokenizer")
    after = (
        "import torch\nmodel = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(model, 'trained').eval()\n"
        "with torch.no_grad():\n    torch.save(model(torch.arange(32)[None]).logits, 'logits.pt')\n"
    )
    run(given + block("Plain loop, Trainer") + tokenizer + trainer + after, tmp_path)
    surgery.fold(factorized, tmp_path / "trained", tmp_path / "folded")
    trained = torch.load(tmp_path / "logits.pt")
    change = (trained - logits(DEMO)).abs().max()
    assert change > 0.05
    assert (trained - logits(tmp_path / "folded")).abs().max() < change / 4  # fold rounds to the model's bfloat16


PLUGIN = f"""
import os, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
sys.path.insert(0, {str(ROOT / "examples")!r})
original = lambda: AutoModelForCausalLM.from_pretrained({str(DEMO)!r}, dtype=torch.float32)
def check(model):
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original()(ids).logits)
    parameters = [each for each in model.parameters() if each.requires_grad]
    assert parameters and all(each.ndim == 1 for each in parameters), [each.shape for each in parameters]
    for each in parameters:
        each.data += 0.5
    return model
def same(model, other):
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)
    assert any(each.requires_grad for each in other.parameters())
"""


def test_axolotl_plugin(factorized: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("axolotl is not here")
    code = f"""
from axolotl.integrations.base import PluginManager
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.dict import DictDefault
PluginManager.get_instance().register("axolotl_spectral.SpectralPlugin")
assert PluginManager.get_instance().supports_adapter("spectral")
cfg = DictDefault({{"adapter": "spectral", "spectral": {{"factorized": {str(factorized)!r}, "train": "scales"}}}})
nothing, config = load_adapter(original(), cfg, "spectral", config_only=True)
assert nothing is None and config.peft_type.value == "SPECTRAL"
model = check(load_adapter(original(), cfg, "spectral")[0])
model.save_pretrained("trained")
same(model, load_adapter(original(), DictDefault({{**cfg, "lora_model_dir": "trained"}}), "spectral")[0])
"""
    run(PLUGIN + code, tmp_path)


def test_swift_plugin(factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("swift") is None or importlib.util.find_spec("modelscope") is None:
        pytest.skip("ms-swift is not here")
    code = f"""
from swift.tuner_plugin import tuners_map
from swift.utils import import_external_file
os.environ["FACTORIZED"] = {str(factorized)!r}
import_external_file({str(ROOT / "examples/swift_spectral.py")!r})
tuner = tuners_map["spectral"]
model = check(tuner.prepare_model(None, original()))
tuner.save_pretrained(model, "trained")
same(model, tuner.from_pretrained(original(), "trained", is_trainable=True))
"""
    run(PLUGIN + code, tmp_path)


def test_command_line_of_trl(factorized: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(json.dumps({"text": "one two three four"}) + "\n")
    options = ["--model_name_or_path", str(DEMO), "--dataset_name", "data", "--output_dir", "trained", "--max_steps", "1"]
    options += ["--report_to", "none", "--use_cpu", "True", "--bf16", "False", "--eos_token", "<0x00>"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples/trl_cli.py", *options],
        cwd=tmp_path,
        env={**ENVIRONMENT, "FACTORIZED": str(factorized), "TRAIN": "core"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "trained/adapter_config.json").read_text())["train"] == "core"
    surgery.fold(factorized, tmp_path / "trained", tmp_path / "folded")
