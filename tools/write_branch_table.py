"""Print the table of docs/reliability.md, of branches that the tests take, from a `coverage json` report on standard input.

It has a line for each folder, and one for each module of which some branch is not taken.
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
