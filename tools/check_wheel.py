"""Check that a wheel holds the package, all of it, and nothing else.

python tools/check_wheel.py dist/model_surgery-*.whl
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(wheel: Path) -> None:
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
    # A wheel is a zip file, and this package imports from one: the command runs without being installed.
    code = "from surgery.cli.main import main; main(['--version'])"
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}"], check=True)
    print(f"{wheel.name}: {len(inside)} files, all of them the package's")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
