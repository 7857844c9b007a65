"""Processes that take the lock of one output folder and let go of it, over and over.

    python -m tests.races FOLDER SECONDS

Prints how often it was had, and how often not; fails if two had it at a time, or if one that did not get it blamed anything but
another run. Forks, and so must be a process of its own in which torch has not computed anything.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import tests.forks  # noqa: F401
from surgery.errors import OutputError
from surgery.run.lock import locked

_PROCESSES = 4


def _take_and_let_go(out: Path, inside: Path, seconds: float) -> tuple[int, int]:
    had = refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with locked(out, []):
                had += 1
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # an error if somebody else is there
                (out / "surgery").mkdir()  # as a run does before its first file, which another's clean-up must not take away
                (out / "surgery/file").touch()
                (out / "surgery/file").unlink()
                inside.unlink()
        except OutputError as error:
            if "another run is writing to" not in str(error):
                raise
            refused += 1
    return had, refused


def main(folder: Path, seconds: float) -> None:
    reading, writing = os.pipe()
    children = []
    for _ in range(_PROCESSES):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                had, refused = _take_and_let_go(folder / "out", folder / "inside", seconds)
                os.write(writing, f"{had} {refused}\n".encode())
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        children.append(child)
    os.close(writing)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    with os.fdopen(reading) as pipe:
        counts = [tuple(map(int, line.split())) for line in pipe]
    print(f"had {sum(had for had, _ in counts)} times, refused {sum(refused for _, refused in counts)} times")
    sys.exit(max(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
