"""The table of docs/reliability.md: branches that the tests take, by module, of a `coverage json` report on standard input.

Beside the whole of each folder only modules are named of which some branch is not taken.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import PurePosixPath


def main() -> None:
    taken: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for file, found in json.load(sys.stdin)["files"].items():
        path = PurePosixPath(file).relative_to("surgery")
        for name in (f"{path.parent}/", str(path)):
            taken[name] += found["summary"]["covered_branches"]
            there[name] += found["summary"]["num_branches"]
    print("| what | branches | taken | % |\n| --- | --- | --- | --- |")
    for name in sorted(there):
        if taken[name] < there[name] or name.endswith("/"):
            print(f"| `{name}` | {there[name]} | {taken[name]} | {100 * taken[name] / max(1, there[name]):.1f} |")


if __name__ == "__main__":
    main()
