"""The package as it is installed: beside another project's of the same name, and as ``python -m surgery``."""

from __future__ import annotations

import base64
import hashlib
import os
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import surgery
from surgery.installation import other_projects

ROOT = Path(__file__).parent.parent
#: What the project of that name on the index installs, in small.
THEIRS = {
    "surgery/__init__.py": b'__version__ = "0.1.3"\n',
    "surgery/__main__.py": b'print("their command")\n',
    "surgery/bin/surgery": b"a program\n",
}


def _ours() -> dict[str, bytes]:
    files = [path for path in (ROOT / "surgery").rglob("*") if path.is_file() and path.suffix in (".py", ".typed")]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def _wheel(folder: Path, project: str, version: str, files: Mapping[str, bytes]) -> Path:
    info = f"{project.replace('-', '_')}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    path = folder / f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, **about}.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


class _Environment:
    """A virtual environment that sees the packages of this one, after its own."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        (self.packages,) = folder.glob("lib/*/site-packages")
        (self.packages / "others.pth").write_text("\n".join(site.getsitepackages()))

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--disable-pip-version-check", "-q"]
        subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=200)

    def unpack(self, wheel: Path) -> None:
        """What every installer does, in less time than any."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.packages)

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.bin / "python"), "-c", code],
            cwd=self.packages,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def fold(self) -> subprocess.CompletedProcess[str]:
        """The command, as its script starts it."""
        return self.run("from surgery.cli.main import main; main(['fold', 'f', 's'])")


def test_beside_the_other_project_of_this_name(tmp_path: Path) -> None:
    ours = _wheel(tmp_path, "model-surgery", surgery.__version__, _ours())
    theirs = _wheel(tmp_path, "surgery", "0.1.3", THEIRS)
    env = _Environment(tmp_path / "env")
    env.unpack(ours)
    env.pip("install", "--no-deps", "--no-index", "--no-compile", str(theirs))  # which overwrites ours without a word
    done = env.fold()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: the package surgery is not whole: its __init__.py is missing, or another project's")
    assert "surgery-0.1.3.dist-info" in done.stderr
    assert "pip uninstall surgery" in done.stderr
    done = env.run("from surgery.training.attach import attach; attach(None, 'f')")
    assert "surgery.errors.InstallationError: the package surgery is not whole" in done.stderr

    env.unpack(ours)  # over theirs
    done = env.fold()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: another project has a package surgery in the same folder")
    assert "model-surgery has overwritten its files" in done.stderr

    env.pip("uninstall", "-y", "surgery")  # takes our __init__.py along
    done = env.fold()
    assert done.stderr.startswith("Error: the package surgery is not whole: its __init__.py is missing, or another project's")


def test_what_is_another_project(tmp_path: Path) -> None:
    """A record tells, and names are compared whole."""
    for name in ("model_surgery-0.1.0", "surgery_tools-1.0", "surgery-0.2"):
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info/RECORD").write_text("surgery/bin/x,,\nsurgery/__init__.py.orig,,\n")
    assert other_projects(tmp_path) == []
    (tmp_path / "surgery-0.2.dist-info/RECORD").write_text("surgery/bin/x,,\nsurgery/__init__.py,sha256=abc,22\n")
    (tmp_path / "Surgery-0.1-py3.11.egg-info").mkdir()
    assert other_projects(tmp_path) == ["Surgery-0.1-py3.11.egg-info", "surgery-0.2.dist-info"]
    assert other_projects(tmp_path / "nothing.whl") == []


def test_as_a_module(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "surgery", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)

    assert run("--version").stdout == f"surgery, version {surgery.__version__}\n"
    assert run("fold", "--help").stdout.startswith("Usage: python -m surgery fold [OPTIONS] FACTORIZED SCALES\n")
    done = run("fold")
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: python -m surgery fold [OPTIONS] FACTORIZED SCALES\nTry 'python -m surgery fold ")
