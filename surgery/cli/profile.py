"""The output of ``--profile``: where the time of a run went, as a table and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.cli.tables import table
from surgery.cli.text import fitted

if TYPE_CHECKING:
    from surgery.timing import Timing

_VERDICTS = {
    "download": "mostly the network",
    "reader": "mostly reading and hashing",
    "worker": "mostly arithmetic",
    "host": "mostly encoding",
    "writer": "mostly writing and hashing",
}


def profile_text(timing: Timing, seconds: float) -> str:
    """A table of the time in each stage of each kind of thread and of its waiting, and which kind was busiest.

    Args:
        timing: what was measured.
        seconds: how long the run took.
    """
    rows = []
    for kind, stages in _by_kind(timing).items():
        count = timing.threads[kind]
        for i, (stage, taken) in enumerate(stages.items()):
            name = (kind if count == 1 else f"{count} {kind}s") if i == 0 else ""
            rows.append([name, stage, f"{taken:.2f}", f"{100 * taken / (count * timing.wall):.0f} %"])
    busiest = _busiest(timing)
    if busiest is None:
        return "nothing to show: no shard was worked on"
    lines = [table(["threads", "stage", "seconds", "of its time"], rows, flush_right=(2, 3))]
    lines.append(fitted(f"{timing.wall:.1f} s at the weight files, {_VERDICTS[busiest]}; {seconds:.1f} s in all"))
    return "\n".join(lines)


def profile_figures(timing: Timing | None) -> dict[str, Any]:
    """The figures for ``--json``: seconds in each stage, summed over the threads of a kind."""
    if timing is None:
        return {}
    stages = {
        kind: {stage: round(seconds, 3) for stage, seconds in stages.items()} for kind, stages in _by_kind(timing).items()
    }
    return {"profile": {"seconds": round(timing.wall, 3), "threads": timing.threads, "stages": stages}}


def _by_kind(timing: Timing) -> dict[str, dict[str, float]]:
    from surgery.timing import STAGES

    measured, found = timing.seconds, {}
    for kind, names in STAGES.items():
        stages = {name: measured[kind, name] for name in names if measured.get((kind, name), 0.0) >= 0.0005}
        if stages and timing.wall:
            wait = timing.threads[kind] * timing.wall - sum(stages.values())
            found[kind] = {**stages, "wait": max(0.0, wait)}
    return found


def _busiest(timing: Timing) -> str | None:
    shares = {kind: 1 - stages["wait"] / (timing.threads[kind] * timing.wall) for kind, stages in _by_kind(timing).items()}
    return max(shares, key=lambda kind: shares[kind], default=None)
