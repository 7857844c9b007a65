"""The sweep over the n-th operation: ``python -m tests.failing FOLDER [--most N] [--every N] [--offset N] [COMMAND ...]``.

Each command is run once undisturbed, to count its operations, and then once for each of them, which fails with one of the
errors that such an operation can fail with (``--all``: with each of them); then with errors that go on from there, and killed
before each of its changes and requests. Of one kind of failure at most so many calls are tried, spread over all there are; and
of all trials every N-th is made, beginning with the one at the offset.

Prints each finding as it comes, a table of trials by operation and error, and a last line of JSON. The exit code is 1 if
anything was found.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.failing.system import CHANGES, System, hub_alone
from tests.loopback_hub import LoopbackHub

E = errno
#: What each operation can fail with.
ERRORS = {
    "open": (E.EIO, E.EMFILE, E.ENOMEM, E.EACCES, E.ESTALE),
    "create": (E.ENOSPC, E.EIO, E.EMFILE, E.EDQUOT, E.EACCES, E.ENOMEM),
    "read": (E.EIO, E.ESTALE, E.EINTR, E.ENOMEM),
    "write": (E.ENOSPC, E.EIO, E.EDQUOT, E.EINTR, E.EFBIG),
    "fsync": (E.EIO, E.ENOSPC, E.EDQUOT),
    "rename": (E.EIO, E.ENOSPC, E.EACCES),
    "mkdir": (E.ENOSPC, E.EDQUOT, E.EACCES, E.EIO),
    "unlink": (E.EIO, E.EACCES),
    "stat": (E.EIO, E.ENOMEM, E.EACCES, E.ESTALE),
    "list": (E.EIO, E.EMFILE, E.ENOMEM, E.EACCES),
    "lock": (E.EIO, E.ENOLCK, E.EINTR),
    "control": (E.EINVAL, E.EIO),
    "truncate": (E.EIO, E.ENOSPC),
    "seek": (E.EIO,),
    "space": (E.EIO, E.ENOMEM),
    "map": (E.ENOMEM,),
    "memory": (E.ENOMEM,),
    "thread": (E.EAGAIN,),
    "connect": (E.ECONNREFUSED, E.ETIMEDOUT),
    "send": (E.ECONNRESET, E.EPIPE),
    "receive": (E.ECONNRESET, E.ETIMEDOUT),
}
#: What goes on once it has begun, and which operations it hits: a disk that is full, one that is dying, too many files ...
LASTING = {
    E.ENOSPC: ("create", "write", "mkdir"),
    E.EDQUOT: ("create", "write", "mkdir", "fsync"),
    E.EIO: ("open", "create", "read", "write", "fsync", "rename", "mkdir", "unlink", "stat", "list"),
    E.ESTALE: ("open", "create", "read", "write", "fsync", "rename", "mkdir", "unlink", "stat", "list"),
    E.EMFILE: ("open", "create", "list"),
    E.EACCES: ("create", "rename", "mkdir", "unlink"),
    E.EROFS: ("create", "rename", "mkdir", "unlink"),
    E.ENOMEM: ("memory", "map"),
    E.EAGAIN: ("thread",),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=10**9)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="a part of a fault")
    parser.add_argument("--but", default="", help="commands to leave out, with commas between")
    parser.add_argument("commands", nargs="*")
    chosen = parser.parse_intermixed_args()
    with hub_alone() as hub:
        return _sweep(chosen, hub)


def _sweep(chosen: argparse.Namespace, hub: LoopbackHub) -> int:
    from tests.failing.trials import Bench, Fault, Finding, kind_of

    def calls(counts: dict[str, int], operations: tuple[str, ...]) -> list[int]:
        count = sum(counts[operation] for operation in operations)
        return [1 + i * count // min(count, chosen.most) for i in range(min(count, chosen.most))]

    def faults(counts: dict[str, int]) -> Iterator[Fault]:
        for operation, errors in ERRORS.items():
            for i, at in enumerate(calls(counts, (operation,))):
                for error in errors if chosen.all else (errors[i % len(errors)],):
                    yield Fault((operation,), at, error)
        for error, operations in LASTING.items():
            for at in calls(counts, operations):
                yield Fault(operations, at, error, goes_on=True)
        for operations in (CHANGES, ("connect", "send")):
            for at in calls(counts, operations):
                yield Fault(operations, at, 0)

    gc.disable()
    bench = Bench(chosen.folder, System(), hub)
    table: dict[tuple[str, str], Counter[str]] = {}
    found: dict[str, list[str]] = {}
    number, begun = 0, time.perf_counter()
    operations: dict[str, dict[str, int]] = {}
    for name, command in bench.commands.items():
        if (chosen.commands and name not in chosen.commands) or name in chosen.but.split(","):
            continue
        *_, undisturbed = bench.truth(command)
        operations[name] = undisturbed.counts
        trials = 0
        for fault in faults(undisturbed.counts):
            number += 1
            if (number + chosen.offset) % chosen.every or chosen.only not in str(fault):
                continue
            trials += 1
            if fault.error == 0:
                row = ("killed before", (fault.operations[0] == "connect" and "requests") or "changes")
            else:
                row = ("lasting" if fault.goes_on else fault.operations[0], errno.errorcode[fault.error])
            cell = table.setdefault(row, Counter())
            try:
                cell[bench.trial(command, fault)] += 1
            except Finding as finding:
                cell["WRONG"] += 1
                cases = found.setdefault(kind_of(finding), [])
                cases.append(f"{name}: {fault}")
                if len(cases) == 1:
                    print(f"\n=== {cases[0]}\n{str(finding)[-3500:]}", flush=True)
        print(f"{name}: {sum(undisturbed.counts.values())} operations, {trials} trials", flush=True)
    print(f"\n{'operation':14} {'error':12} {'trials':>7} {'right':>7} {'refused':>8} {'killed':>7} {'WRONG':>6}")
    for (operation, error), cell in table.items():
        figures = [cell[kind] for kind in ("right", "refused", "killed", "WRONG")]
        print(f"{operation:14} {error:12} {cell.total():7} {figures[0]:7} {figures[1]:8} {figures[2]:7} {figures[3]:6}")
    for kind, cases in found.items():
        print(f"\n{len(cases)} x {kind}\n  {'; '.join(cases[:8])}")
    total = sum(table.values(), Counter())
    seconds = round(time.perf_counter() - begun, 1)
    print(json.dumps({"trials": total.total(), **total, "seconds": seconds}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
