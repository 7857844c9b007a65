"""Commands with too little of something: ``python -m tests.failing.limits FOLDER [--steps N] [--disk] [COMMAND ...]``.

Open files, address space, the size of a file, threads: each is limited to a value swept from almost nothing to enough, in so
many steps. With ``--disk``, which needs to be run by ``unshare -rm``, results are written to a disk of its own that has room
for so many bytes or files, and later for all.

Prints how the trials of each limit ended, and what was found; the exit code is 1 if anything was.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.failing.system import System, hub_alone
from tests.loopback_hub import LoopbackHub

_NOBODY = 54321
_MB = 1 << 20
_Limit = Callable[[], object]


def _soft(kind: int, value: int) -> _Limit:
    return lambda: resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _files(count: int) -> _Limit:
    """So many more than are open."""
    return lambda: _soft(resource.RLIMIT_NOFILE, 1 + max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + count)()


def _address_space(more: int) -> _Limit:
    """So many bytes more than there are."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _soft(resource.RLIMIT_AS, pages * resource.getpagesize() + more)()

    return limit


def _threads(count: int) -> _Limit:
    """So many beside the first. Of a user for whom the limit holds: the superuser may have any number."""

    def limit() -> None:
        if os.geteuid() == 0:
            os.setresuid(_NOBODY, 0, 0)
            library = ctypes.CDLL(None, use_errno=True)
            header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            library.capget(header, sets)
            for i in (0, 1):  # effective and permitted: all but CAP_SYS_ADMIN and CAP_SYS_RESOURCE
                sets[i] &= ~(1 << 21 | 1 << 24)
            if library.capset(header, sets):
                raise OSError(ctypes.get_errno(), "capset")
            there = 1
        else:
            ours = [path for path in Path("/proc").glob("[0-9]*") if path.stat().st_uid == os.getuid()]
            there = sum(len(list((path / "task").iterdir())) for path in ours)
        _soft(resource.RLIMIT_NPROC, there + count)()

    return limit


def _spread(most: float, steps: int, least: float = 0.0) -> list[float]:
    return [least + (most - least) * (i / max(1, steps - 1)) ** 2 for i in range(steps)]


def limits(steps: int, largest: int) -> Iterator[tuple[str, _Limit]]:
    """What is limited, in so many steps; the largest file has so many bytes."""
    for value in sorted({round(value) for value in _spread(24, steps)} | {32, 64}):
        yield "open files", _files(value)
    for value in _spread(96 * _MB, steps):
        yield "address space", _address_space(int(value))
    for value in _spread(largest + 1, steps):
        yield "size of a file", _soft(resource.RLIMIT_FSIZE, int(value))
    for value in sorted({round(value) for value in _spread(14, steps)}):
        yield "threads", _threads(value)


def _mount(place: Path, options: str) -> None:
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--only", default="", help="one limit")
    parser.add_argument("commands", nargs="*")
    chosen = parser.parse_intermixed_args()
    with hub_alone() as hub:
        return _sweep(chosen, hub)


def _sweep(chosen: argparse.Namespace, hub: LoopbackHub) -> int:
    from tests.failing.trials import Bench, Command, Finding, kind_of

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    gc.disable()
    bench = Bench(chosen.folder, System(), hub)
    if chosen.disk:
        bench.place = bench.folder / "disk"
        bench.place.mkdir()
    table: dict[str, Counter[str]] = {}
    found: dict[str, list[str]] = {}

    def attempt(what: str, command: Command, before: _Limit = bool, after: _Limit = bool) -> None:
        cell = table.setdefault(what, Counter())
        try:
            cell[bench.trial(command, None, before, after)] += 1
        except Finding as finding:
            cell["WRONG"] += 1
            cases = found.setdefault(kind_of(finding), [])
            cases.append(f"{command.name}, {what}")
            if len(cases) == 1:
                print(f"\n=== {cases[0]}\n{str(finding)[-3500:]}", flush=True)

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=100000", str(bench.place)], check=True)

    for name, command in bench.commands.items():
        if (chosen.commands and name not in chosen.commands) or (not command.markers and not command.pushes and chosen.disk):
            continue
        if chosen.disk:
            _mount(bench.place, "size=64m")
        files, *_ = bench.truth(command)
        before = {} if command.earlier is None else {path: path.stat().st_size for path in command.earlier.rglob("*")}
        sizes = [len(data) for data in files.values()] + list(before.values())
        if not chosen.disk:
            for what, limit in limits(chosen.steps, max(sizes, default=0)):
                if chosen.only in what:
                    attempt(what, command, limit)
            continue
        pages = sum(-(-size // 4096) for size in sizes) + 24
        for what, option, most, unit in (("bytes of a disk", "size", pages, 4096), ("files of a disk", "nr_inodes", 80, 1)):
            there = 0 if command.earlier is None else 1 + len(before)
            if unit > 1:
                there += sum(-(-size // 4096) for size in before.values())
            for value in _spread(most, chosen.steps, least=1 + there):  # with none there is no limit
                _mount(bench.place, f"{option}={round(value) * unit}")
                attempt(what, command, after=enlarge)
    for what, cell in table.items():
        print(f"{what:16} {cell.total():5} trials: {dict(cell)}")
    for kind, cases in found.items():
        print(f"\n{len(cases)} x {kind}\n  {'; '.join(cases[:8])}")
    total = sum(table.values(), Counter())
    print(json.dumps({"trials": total.total(), **total}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
