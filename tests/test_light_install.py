"""What is imported for what: local folders need no hub client, training nothing but torch, safetensors and numpy."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.errors import MissingExtra
from surgery.hub import hub_client as client

#: Makes packages ones that are not installed.
_BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""

_NET = """
import json, pathlib, sys
import numpy, torch, safetensors.torch

def step(net, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    net(torch.ones(4, 32)).square().mean().backward()
    optimizer.step()

net = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False), torch.nn.ReLU(), torch.nn.Linear(48, 32, bias=False))
"""

_TRAIN = """
step(net, net.parameters())  # torch imports some of its own only now
net.load_state_dict(safetensors.torch.load_file(sys.argv[1] + "/m/model.safetensors"))
before = set(sys.modules)
import surgery
scales = surgery.attach(net, sys.argv[1] + "/f")
step(net, scales.parameters())
scales.save(sys.argv[1] + "/s.safetensors")
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(imported - {*sys.stdlib_module_names, "torch", "safetensors", "numpy"})))
"""

_EVERYTHING = """
import surgery
out = pathlib.Path(sys.argv[1])
safetensors.torch.save_file({f"h.{name}": value for name, value in net.state_dict().items()}, out / "m/model.safetensors")
(out / "m/config.json").write_text("{}")
f, scales = out / "f", out / "f/surgery/scales.safetensors"
assert surgery.plan(out / "m", rank=4, include=["*"]).targets
surgery.factorize(out / "m", f, rank=4, include=["*"])
surgery.fold(f, scales, out / "first")
assert surgery.verify(f).ok
assert "click" not in sys.modules  # options are the command line's
attached = surgery.attach(torch.nn.ModuleDict({"h": net}), f)
net(torch.ones(4, 32)).square().mean().backward()  # without an optimizer, which costs seconds
with torch.no_grad():
    for parameter in attached.parameters():
        parameter -= 0.01 * parameter.grad.sign()
attached.save(out / "s.safetensors")
from surgery.cli.main import main
for command in (
    ["verify", f], ["inspect", f], ["fold", f, scales, "-o", out / "same"],
    ["fold", f, out / "s.safetensors", "-o", out / "other"],
    ["export", f, out / "s.safetensors", "--to", "peft", "-o", out / "adapter"],
    ["project", f, out / "other", "-o", out / "p.safetensors"],
    ["blend", out / "s.safetensors", out / "p.safetensors", "-o", out / "b.safetensors"],
    ["scales", "show", out / "s.safetensors"], ["plan", out / "m", "--rank", "2", "--include", "*"],
    ["factorize", out / "m", "--layout", "overlay", "--rank", "2", "--include", "*", "-o", out / "o"],
    ["fold", out / "o", out / "o/surgery/scales.safetensors", "--base", out / "m", "-o", out / "back"],
    ["extract", out / "m", out / "other", "--include", "*", "--rank", "4", "-o", out / "lora"],
    ["resize", out / "lora", "--rank", "3", "-o", out / "small"], ["merge", out / "m", out / "small", "-o", out / "merged"],
):
    main([str(part) for part in command], standalone_mode=False)
assert main(["plan", "acme/missing-client"], standalone_mode=False) == 1
for name in ("m", "other"):
    (out / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
command = ["extract", out / "m", out / "other", "--include", "*", "-o", out / "none"]
assert main([str(part) for part in command], standalone_mode=False) == 1
assert not (out / "none").exists()
assert (out / "same/model.safetensors").read_bytes() == (out / "m/model.safetensors").read_bytes()
assert (out / "back/model.safetensors").read_bytes() == (out / "m/model.safetensors").read_bytes()
"""


def _child(code: str, folder: Path, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = _BLOCK.format(packages=blocked) + code
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, check=False)


def test_training_imports_nothing_but_torch_safetensors_and_numpy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"0.weight": torch.randn(48, 32), "2.weight": torch.randn(32, 48)}
    (tmp_path / "m").mkdir()
    save_file(weights, tmp_path / "m/model.safetensors")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, include=["*"])
    done = _child(_NET + _TRAIN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '["surgery"]\n'


def test_local_folders_need_no_hub_client(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    blocked = ("huggingface_hub", "httpx", "httpx2", "yaml", "transformers", "peft", "accelerate", "requests")
    done = _child(_NET + _EVERYTHING, tmp_path, blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert "Error: the hub's client, huggingface_hub, cannot be imported" in done.stderr
    assert "Error: names of modules are found with transformers, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_module_knows_the_client() -> None:
    package = Path(surgery.__file__).parent
    imports = re.compile(r"^\s*(?:from|import) (?:huggingface_hub|httpx2?)\b", re.MULTILINE)
    found = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if imports.search(path.read_text())]
    assert found == ["hub/hub_client.py"]


def _import_client() -> ModuleType:
    """The module that knows the client, imported once more."""
    spec = importlib.util.spec_from_file_location("hub_client_again", client.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.mark.parametrize(
    ("owner", "name", "value", "told"),
    [
        (huggingface_hub, "__version__", "1.4.1", "the installed huggingface_hub is too old"),
        (huggingface_hub, "__version__", "0.36.2", "the installed huggingface_hub is too old"),
        (huggingface_hub.errors, "XetDownloadError", None, "lacks a name that surgery uses"),
        (huggingface_hub.HfApi, "list_repo_tree", None, "lacks a name that surgery uses"),
        (sys.modules, "huggingface_hub", None, "cannot be imported"),
        (sys.modules, "huggingface_hub.errors", None, "lacks a name that surgery uses"),
    ],
)  # fmt: skip
def test_a_client_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: str | None, told: str
) -> None:
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, name, value)  # None in sys.modules is a package that is not there
    elif value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(MissingExtra, match=told) as caught:
        _import_client()
    message = str(caught.value)
    assert (value or name.rpartition(".")[2]) in message
    assert "expected: huggingface_hub 1.5 or newer" in message
    assert "pip install 'huggingface-hub>=1.5,<3'" in message


@pytest.mark.parametrize("version", ["1.5.0rc0", "1.10.0", "2.99.0", "3.1.0.dev0", "unknown"])
def test_another_client_with_all_names_is_used(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(huggingface_hub, "__version__", version)
    assert issubclass(_import_client().TransportError, Exception)
