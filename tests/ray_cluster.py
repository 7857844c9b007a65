"""Factorizes and folds on a Ray cluster of two machines, one of which is lost half-way; FOLDER/report.json says what happened.

    python -m tests.ray_cluster MODEL FOLDER

FOLDER/broken is a model that cannot be factorized. Both machines are this one, with one core each. The first run also loses
a worker process. A process of its own, as Ray leaves threads and settings behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

import surgery
from surgery.engine.lane import Lane
from surgery.engine.ray import connected, run_remotely
from surgery.engine.resources import Resources
from surgery.engine.sharing import share_out
from surgery.names import JOURNAL_DIR, PARTIALS_DIR
from surgery.planning.memory import need_to_factorize
from surgery.progress import Silent, heard, note


class Watch:
    """Looks at a run from outside: how many attempts it makes; loses a worker and then a machine on the way."""

    def __init__(self, out: Path, cluster: Cluster, victim: object, *, kill_worker: bool) -> None:
        self.attempts: set[str] = set()
        self.killed: list[str] = []
        self._out, self._cluster, self._victim, self._kill_worker = out, cluster, victim, kill_worker
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            try:
                under_way = list((self._out / PARTIALS_DIR).glob("*/*"))
            except OSError:  # what is listed is gone by now
                continue
            self.attempts |= {path.parent.name for path in under_way}
            finished = len(list((self._out / JOURNAL_DIR).glob("[0-9]*.json")))
            if self._kill_worker and not self.killed and finished >= 1 and under_way:
                for worker in _workers():
                    os.kill(worker, signal.SIGKILL)
                self.killed.append("workers")
            elif finished >= 3 and under_way and "machine" not in self.killed:
                self._cluster.remove_node(self._victim, allow_graceful=False)
                self.killed.append("machine")


def _workers() -> list[int]:
    """Processes that are at a task of ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_run"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


class Told(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def advance(self, n_bytes: int) -> None:
        self.bytes += n_bytes


class Saying:
    """A job that has something to say, in a thread of its lane."""

    def __call__(self, lane: Lane, attempt: str) -> int:
        for _ in range(2):
            lane.submit(note, "said elsewhere").result()
        return 7


@heard
def said_elsewhere(*, progress: Silent) -> int:
    memory = share_out([need_to_factorize(target) for target in surgery.plan(Path(sys.argv[1])).targets], Resources())
    with connected("cpu") as found, closing(run_remotely({0: Saying()}, found, memory, None, None)) as done:
        return dict(done)[0]


def stopped(model: Path, out: Path, address: str) -> list[str]:
    """What the run says that goes on with one whose driver was killed, while its tasks were at work on the cluster."""
    command = [sys.executable, "-m", "surgery", "factorize", str(model), "-o", str(out), "--rank", "8"]
    command += ["--engine", "ray", "--device", "cpu", "--quiet"]
    driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address})
    while driver.poll() is None and len(list((out / JOURNAL_DIR).glob("[0-9]*.json"))) < 2:
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "it has come to its end before"
    again = Told()
    surgery.factorize(model, out, rank=8, engine="ray", device="cpu", progress=again)
    return again.notes


def main(model: Path, folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    victim = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    report: dict[str, object] = {}
    for name, kill_worker in (("factorize", True), ("fold", False)):
        out, told = folder / name, Told()
        begun = time.perf_counter()
        with Watch(out, cluster, victim, kill_worker=kill_worker) as watch:
            if name == "factorize":
                surgery.factorize(model, out, rank=8, engine="ray", device="cpu", progress=told)
            else:
                manifest = surgery.Manifest.read(folder / "factorize")
                scales = {target.key: torch.full(target.scales_shape, 1.25) for target in manifest.targets}
                surgery.fold(folder / "factorize", scales, out, engine="ray", device="cpu", progress=told)
        report[name] = {
            "attempts": len(watch.attempts),
            "killed": watch.killed,
            "bytes": told.bytes,
            "seconds": time.perf_counter() - begun,
        }
        if name == "factorize":
            victim = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
    try:
        surgery.factorize(folder / "broken", folder / "x", rank=4, engine="ray", device="cpu")
    except surgery.SurgeryError as error:
        report["error"] = f"{type(error).__name__}: {error}"
    report["stopped"] = stopped(model, folder / "stopped", cluster.address)
    said = Told()
    report["said"] = [said_elsewhere(progress=said), *said.notes]
    (folder / "report.json").write_text(json.dumps(report))  # not printed: Ray prints as well
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
