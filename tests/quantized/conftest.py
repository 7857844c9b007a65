from __future__ import annotations

import pytest

import surgery
from tests.quantized.hub_models import LAYOUTS
from tests.quantized.served import RANK, Made

_made: dict[str, Made] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Each is made once. Read-only, but for what is folded beside it."""
    name = request.param
    if name not in _made:
        folder = tmp_path_factory.mktemp(name)
        LAYOUTS[name].save(folder / "m", shards=2 if name in ("deepseek_v3", "kimi_k2") else 1)
        surgery.factorize(folder / "m", folder / "f", rank=RANK)
        _made[name] = Made(name, folder)
    return _made[name]
