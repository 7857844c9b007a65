"""Shared fixtures: tiny real models, a loopback hub, and float64 truth."""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Iterator

from tests.loopback_hub import LoopbackHub

# Threads that spin while they wait would take the cores from the other processes of the suite. Read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# The hub client reads these when it is imported, so they must be set before anything imports it.
HUB = LoopbackHub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="surgery-test-hf-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ.pop("COLUMNS", None)  # which tables would keep to

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402

import surgery  # noqa: E402
from surgery.hub import patience  # noqa: E402
from tests.gpus import GPUS, Gpu  # noqa: E402
from tests.models import save_llama, save_mixed  # noqa: E402
from tests.releases import OLDER  # noqa: E402

if "mix_stderr" in inspect.signature(CliRunner).parameters:  # before click 8.2, where they are apart
    CliRunner.__init__ = functools.partialmethod(CliRunner.__init__, mix_stderr=False)


def pytest_configure(config: pytest.Config) -> None:
    if OLDER:  # modules of older releases are compiled by torch.compile as they are imported, and torch warns of its own code
        config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hub on this machine nobody has to wait for long."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(patience, "GIVE_UP_AFTER", 0.3)
    monkeypatch.setattr(patience, "GIVE_UP_FIRST_AFTER", 0.1)


@pytest.fixture(scope="session")
def hub() -> LoopbackHub:
    return HUB


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, in several shards with an index. Read-only."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", torch.bfloat16)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``save_mixed``. Read-only."""
    return save_mixed(tmp_path_factory.mktemp("mixed") / "m")


@pytest.fixture(scope="session")
def factorized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama at rank 4. Read-only."""
    out = tmp_path_factory.mktemp("factorized") / "f"
    surgery.factorize(llama, out, rank=4)
    return out


@pytest.fixture(params=GPUS.values(), ids=GPUS)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """A GPU, ``cuda:0``: there while a context of it is entered."""
    chosen: Gpu = request.param
    return chosen


@pytest.fixture
def on_gpu(gpu: Gpu) -> Iterator[dict[str, int]]:
    """A GPU, ``cuda:0``, with its counts."""
    with gpu() as log:
        yield log


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as these are faster on one thread, and do not wait for others that share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _default_threads():
    """No test may leave torch's thread count changed."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
