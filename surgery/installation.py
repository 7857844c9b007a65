"""Checking that no other project has installed files into the package ``surgery``: one on PyPI has a package of that name.

Installers do not notice this. Whichever of the two is installed last overwrites ``surgery/__init__.py`` of the other.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from surgery.errors import InstallationError

DISTRIBUTION = "model-surgery"
_OTHER = re.compile(r"surgery-[^-]+(\.dist-info|(-py[^-]+)?\.egg-info)", re.IGNORECASE)
_BOTH = (
    "python -m pip uninstall surgery, then install model-surgery once more with --force-reinstall --no-deps; "
    "to use both, give each an environment of its own"
)


@cache
def check_installation() -> None:
    """Refuse to work if another project has installed files into this package. Checked once in a process.

    Raises:
        InstallationError: one of the two projects has overwritten files of the other.
    """
    package = sys.modules["surgery"]
    here = Path(__file__).parent
    others = other_projects(here.parent)
    if getattr(package, "__distribution__", None) != DISTRIBUTION:
        raise InstallationError(
            "the package surgery is not whole: its __init__.py is missing, or another project's",
            got=f"{getattr(package, '__file__', None) or 'none'}" + (f", of {others[0]}" if others else ""),
            expected=f"that of {DISTRIBUTION}, in {here}",
            hint=_BOTH,
        )
    if others:
        raise InstallationError(
            f"another project has a package surgery in the same folder, and {DISTRIBUTION} has overwritten its files",
            got=f"{others[0]} in {here.parent}",
            expected=f"{DISTRIBUTION} alone",
            hint=_BOTH,
        )


def other_projects(folder: Path) -> list[str]:
    """Names of the records (such as ``surgery-1.0.dist-info``) of other projects with a package ``surgery`` in a folder."""
    try:
        found = sorted(path for path in folder.iterdir() if _OTHER.fullmatch(path.name))
        return [path.name for path in found if _has_package(path)]
    except OSError:  # in a zip file, which is no folder
        return []


def _has_package(record: Path) -> bool:
    files = record / "RECORD"
    if not files.is_file():
        return True  # an old kind of installation without a list of its files
    return any(line.startswith("surgery/__init__.py,") for line in files.read_text("utf-8", "replace").splitlines())
