"""What older releases of other packages lack: tests that need it are skipped there, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]

_T = TypeVar("_T")
#: Names that older transformers give to what they save, whatever the file had, and those that are saved otherwise.
_FORMER_NAMES = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^text_model\.", ""),
)


def pins(file: str) -> dict[str, str]:
    """Package -> version, of a file of constraints."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def installed(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def _is_older(package: str, pin: str) -> bool:
    found = installed(package)
    return found is None or found < Version(pin)


_TESTED = (
    "accelerate",
    "bitsandbytes",
    "compressed-tensors",
    "diffusers",
    "huggingface-hub",
    "matplotlib",
    "peft",
    "ray",
    "transformers",
    "trl",
)
#: Whether anything that tests may miss is not here, or older than in the environment of ``make test``.
OLDER = any(_is_older(package, pin) for package, pin in pins("constraints.txt").items() if package in _TESTED)


def needs(package: str, versions: str, what: str) -> pytest.MarkDecorator:
    """Skip a test where a package is in none of these versions, such as ``>=5.10``, or missing; ``what`` it has there."""
    found = installed(package)
    unmet = found is None or found not in SpecifierSet(versions)
    return pytest.mark.skipif(OLDER and unmet, reason=f"{package} is {found or 'not here'}: {what} needs {versions}")


#: Skips a test with tensors in F8_E8M0, the scales of some FP8 checkpoints.
writes_e8m0 = needs("safetensors", ">=0.6", "writing scales of F8_E8M0")


def has(module: str, name: str) -> pytest.MarkDecorator:
    """Skip a test where a module, or its package, lacks a name."""
    package = module.partition(".")[0]
    found = installed(package)
    unmet = found is None or not hasattr(import_module(module), name)
    return pytest.mark.skipif(OLDER and unmet, reason=f"{package} {found or 'is not here'}: no {name}")


@contextmanager
def known_classes() -> Iterator[None]:
    """Skip the test where it asks transformers for a class that this release has not."""
    try:
        yield
    except AttributeError as error:
        if OLDER and str(error).startswith("module transformers has no attribute"):
            pytest.skip(f"transformers {installed('transformers')}: {error}")
        raise


def checkpoint_activations(model: Any, *, use_reentrant: bool) -> None:
    """Under the name that this release of transformers has for it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": use_reentrant})


def under_names_of(before: Container[str], saved: Mapping[str, _T]) -> dict[str, _T]:
    """What this release of transformers has saved of a checkpoint, under the checkpoint's own names.

    The newest keeps the names of the file that it has loaded; 5.0 gives some tensors those of long ago.
    """
    named: dict[str, _T] = {}
    for name, one in saved.items():
        own = name
        if OLDER and name not in before:
            own = next((new for old, to in _FORMER_NAMES if (new := re.sub(old, to, name)) != name and new in before), name)
        assert own not in named, f"{own} is saved twice"
        named[own] = one
    return named
