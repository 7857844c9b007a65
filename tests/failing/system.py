"""The library that makes a system fail (``system.c``), from Python: in a process that it has been preloaded into."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.loopback_hub import LoopbackHub

#: As in system.c.
OPERATIONS = (
    *("open", "create", "read", "write", "fsync", "rename", "mkdir", "unlink", "stat", "list", "lock", "control"),
    *("truncate", "seek", "space", "map", "memory", "thread", "connect", "send", "receive"),
)
#: Those that change what is on the disk, or say that it must stay.
CHANGES = ("create", "write", "fsync", "rename", "mkdir", "unlink", "truncate")
#: Bytes of an allocation that counts: of a tensor, and of anything else, most of which is Python's own.
LEAST_TENSOR, LEAST_MEMORY = 1 << 10, 1 << 15
_SOURCE = Path(__file__).with_name("system.c")


def compiler() -> str | None:
    """A C compiler, where there is one for what the library needs."""
    return (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")) if sys.platform == "linux" else None


@contextmanager
def hub_alone() -> Iterator[LoopbackHub]:
    """A hub, and a cache of it, for this process. The hub's client, which must not be imported before, knows no other."""
    hub = LoopbackHub()
    os.environ["HF_ENDPOINT"], os.environ["HF_HUB_DISABLE_TELEMETRY"] = hub.url, "1"
    os.environ["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory(prefix="surgery-test-hf-") as cache:
        os.environ["HF_HOME"] = cache
        yield hub


def preloaded(arguments: list[str], under: tuple[str, ...] = (), **options: object) -> subprocess.CompletedProcess[str]:
    """``python -m`` with these arguments in a process whose system can be made to fail.

    Args:
        arguments: the module, and what it is told.
        under: a command that begins it, with its options.
        options: of ``subprocess.run``.
    """
    root = Path(__file__).parent.parent.parent
    with tempfile.TemporaryDirectory(prefix="surgery-test-") as folder:
        library = Path(folder) / "failing.so"
        command = [str(compiler()), "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
        subprocess.run(command, check=True, capture_output=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "SURGERY_TEST_LIBRARY": str(library),
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
        }
        command = [*under, sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=root, env=environment, text=True, **options)  # type: ignore[call-overload, no-any-return]


class System:
    """The one below this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["SURGERY_TEST_LIBRARY"])
        self._library.failing_count.restype = self._library.failing_fallen.restype = ctypes.c_long

    def arm(
        self, folder: Path, operations: tuple[str, ...] = (), at: int = 0, error: int = 0, *, goes_on: bool = False
    ) -> None:
        """Count from now on, and let the call number ``at`` of these operations fail; 0: none.

        Args:
            folder: files below it count.
            operations: those that count together.
            at: from 1.
            error: the errno; 0 kills the process before the call.
            goes_on: whether all later calls fail as well.
        """
        bits = sum(1 << OPERATIONS.index(operation) for operation in operations)
        where = os.fsencode(folder.resolve())
        least = ctypes.c_size_t(LEAST_TENSOR), ctypes.c_size_t(LEAST_MEMORY)
        self._library.failing_arm(where, ctypes.c_uint(bits), ctypes.c_long(at), error, int(goes_on), *least)

    def disarm(self) -> None:
        """All is well again."""
        self._library.failing_disarm()

    def fallen(self) -> int:
        """How many calls have failed."""
        return int(self._library.failing_fallen())

    def counts(self) -> dict[str, int]:
        """How many calls there were of each operation."""
        return {name: int(self._library.failing_count(i)) for i, name in enumerate(OPERATIONS)}
