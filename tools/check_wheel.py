"""Check that a wheel holds exactly the files of the package, that its command runs, and that its types are seen by mypy.

python tools/check_wheel.py dist/model_surgery-*.whl
"""

import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).with_name("wheel_program.py")


def main(wheel: Path) -> None:
    files = check_contents(wheel)
    # A wheel is a zip file, and this package imports from one: the command runs without being installed.
    code = "from surgery.cli.main import main; main(['--version'])"
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}"], check=True)
    check_types(wheel)
    print(f"{wheel.name}: {files} files, all of them the package's; {PROGRAM.name} has the types that it says")


def check_contents(wheel: Path) -> int:
    """Check that the wheel has the files that git tracks in the checkout; returns how many."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    tracked = subprocess.run(
        ["git", "ls-files", "surgery", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    # Recipes lie beside the package in a checkout, and in it once installed.
    expected = {name if name.startswith("surgery/") else f"surgery/{name}" for name in tracked.splitlines()}
    if inside != expected:
        sys.exit(f"{wheel.name}: unexpected {sorted(inside - expected)[:5]}, missing {sorted(expected - inside)[:5]}")
    return len(inside)


def check_types(wheel: Path) -> None:
    """Run mypy on ``PROGRAM`` in a fresh environment with the wheel and this environment's packages, without the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "env", with_pip=False)
        (packages,) = (place / "env").glob("lib/*/site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
        (packages / "others.pth").write_text("\n".join(site.getsitepackages()))  # paths in it come after the wheel's
        shutil.copy(PROGRAM, place)
        python = str(place / "env/bin/python")
        where = subprocess.run(
            [python, "-c", "import surgery; print(surgery.__file__)"], cwd=place, capture_output=True, text=True, check=True
        ).stdout
        if str(packages) not in where:
            sys.exit(f"{wheel.name}: not the wheel is imported, but {where}")
        command = [
            "mypy",
            "--strict",
            "--python-executable",
            python,
            "--cache-dir",
            str(ROOT / ".mypy_cache/wheel"),
            PROGRAM.name,
        ]
        if subprocess.run([sys.executable, "-m", *command], cwd=place).returncode:
            sys.exit(f"{wheel.name}: {PROGRAM.name} is not typed as it says")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
