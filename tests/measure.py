"""What is run in a process of its own, and the peak memory of a call there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: VmHWM, since ru_maxrss is inherited from the process that starts this one.
MEASURE = """
import re, torch, surgery
torch.set_num_threads({threads})
{call}
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def measured_peak(call: str, *, threads: int) -> int:
    """Bytes, resident, with as many cores as threads.

    Large blocks are mappings of their own, so that what is in use is measured, not what the C library keeps.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(call=call, threads=threads)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    return int(done.stdout)


def run_module(module: str, *arguments: object) -> str:
    """What a module of the tests prints, in a process in which torch has not computed anything."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
