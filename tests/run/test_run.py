"""A run's own parts, without weights: the loop over shards that goes on with a journal, and what is said when it is stopped."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import OutputError
from surgery.progress import Progress, Silent, heard
from surgery.run.engines import EngineOptions, engine_of
from surgery.run.journal import Journal
from surgery.run.result_folder import ResultFiles
from surgery.run.resume import Recorded, shard_results
from surgery.run.run import Run

IDENTITY = {"command": "count"}


class _Squares:
    """Of each shard the square of its index; of shard 2 nothing is left. What the journal has is trusted if it is one."""

    def __init__(self) -> None:
        self.shard_files = [f"{index}.safetensors" for index in range(4)]
        self.done: list[int] = []
        self.told: list[int] = []

    def begin(self, which: Sequence[int]) -> Generator[tuple[int, int | None]]:
        for index in reversed(which):
            self.done.append(index)
            yield index, None if index == 2 else index**2

    def as_json(self, index: int, result: int | None) -> Any:
        return {"square": result}

    def recorded(self, index: int, value: Any) -> Recorded[int | None] | None:
        square = value["square"]
        return Recorded(square) if square in (None, index**2) else None

    def tell(self, index: int) -> None:
        self.told.append(index)


@heard
def _results(jobs: _Squares, journal: Journal | None, *, progress: Progress, **options: Any) -> list[int | None]:
    return shard_results(jobs, jobs.begin, journal, **options)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    (tmp_path / ".surgery").mkdir()
    return Journal(tmp_path, IDENTITY)


def test_results_come_by_index_and_none_is_one(journal: Journal) -> None:
    said = Silent()
    assert _results(_Squares(), None, progress=said) == [0, 1, None, 9]
    assert _results(_Squares(), journal, progress=said) == [0, 1, None, 9]
    assert said.notes == []


def test_what_the_journal_has_is_not_done_again(tmp_path: Path, journal: Journal) -> None:
    _results(_Squares(), journal, progress=Silent())
    (tmp_path / ".surgery/00002.json").unlink()
    journal.record(3, "3.safetensors", {"square": 10})  # whole, and not what the job gives
    jobs, said = _Squares(), Silent()
    assert _results(jobs, journal, progress=said) == [0, 1, None, 9]
    assert (jobs.done, jobs.told) == ([3, 1], [0, 2])
    assert said.notes == ["continuing after 2 of 4 shards"]
    jobs, said = _Squares(), Silent()
    assert _results(jobs, journal, progress=said, note_resumed=False) == [0, 1, None, 9]
    assert (jobs.done, jobs.told, said.notes) == ([], [0, 1, 2, 3], [])


def test_a_journal_of_another_run_is_none(tmp_path: Path, journal: Journal) -> None:
    _results(_Squares(), journal, progress=Silent())
    jobs = _Squares()
    _results(jobs, Journal(tmp_path, {"command": "other"}), progress=Silent())
    assert jobs.done == [3, 2, 1, 0]


def test_a_shard_is_in_the_journal_before_anybody_hears_of_it(journal: Journal) -> None:
    heard_of: list[int | None] = []

    def on_finished(result: int | None) -> None:
        index = jobs.done[-1]
        assert journal.recorded(index, jobs.shard_files[index]) == {"square": result}
        heard_of.append(result)

    jobs = _Squares()
    _results(jobs, journal, progress=Silent(), on_finished=on_finished)
    assert heard_of == [9, None, 1, 0]
    again: list[int | None] = []
    _results(_Squares(), journal, progress=Silent(), on_finished=again.append)
    assert again == [0, 1, None, 9]


def test_jobs_are_stopped_when_a_result_cannot_be_taken(journal: Journal) -> None:
    closed = []

    class Endless(_Squares):
        def begin(self, which: Sequence[int]) -> Generator[tuple[int, int | None]]:
            try:
                yield from super().begin(which)
            finally:
                closed.append(True)

    def full(result: int | None) -> None:
        raise OutputError("the disk is full")

    jobs = Endless()
    with pytest.raises(OutputError, match="full"):
        _results(jobs, journal, progress=Silent(), on_finished=full)
    assert (jobs.done, closed) == ([3], [True])
    jobs = Endless()
    assert _results(jobs, journal, progress=Silent()) == [0, 1, None, 9]
    assert jobs.done == [2, 1, 0]  # what was in the journal by then stays in it


def test_a_run_that_ends_leaves_its_result_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Run(out) as run:
        assert run.start_engine(EngineOptions(device="cpu")) is run.engine
        with run.uploading(None, private=True), run.locked([]):
            run.identify(IDENTITY)
            with run.result(ResultFiles(frozenset({"a"}), 1), [], overwrite=False) as place:
                assert run.journal is not None
                assert run.journal.matches()
                assert place == run.place == out
                (place / "a").write_text("a")
    assert [path.name for path in out.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("planned", []),
        ("locked", []),
        ("begun", []),
        ("recorded", ["stopped after 1 shard; the same command continues from there"]),
        ("finished", []),
    ],
)
def test_a_run_that_is_interrupted_says_how_to_go_on_where_there_is_something(
    tmp_path: Path, step: str, expected: list[str]
) -> None:
    def reached(now: str) -> None:
        if now == step:
            raise KeyboardInterrupt

    @heard
    def interrupted(*, progress: Progress) -> None:
        with Run(tmp_path / "out") as run:
            reached("planned")
            with run.locked([]):
                reached("locked")
                run.identify(IDENTITY)
                with run.result(ResultFiles(frozenset({"a"}), 1), [], overwrite=False) as place:
                    reached("begun")
                    assert run.journal is not None
                    run.journal.record(0, "0.safetensors", None)
                    reached("recorded")
                    (place / "a").write_text("a")
            reached("finished")

    said = Silent()
    with pytest.raises(KeyboardInterrupt):
        interrupted(progress=said)
    assert said.notes == expected


def test_an_engine_stops_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []

    class Noting:
        def __init__(self, options: EngineOptions) -> None:
            self._engine = engine_of(options)

        def __enter__(self) -> Any:
            return self._engine.__enter__()

        def __exit__(self, *error: Any) -> None:
            left.append(error[0])
            self._engine.__exit__(*error)

    monkeypatch.setattr("surgery.run.run.engine_of", Noting)
    with pytest.raises(OutputError), Run(tmp_path) as run:
        run.start_engine(EngineOptions(device="cpu"))
        raise OutputError("the disk is full")
    assert left == [OutputError]
