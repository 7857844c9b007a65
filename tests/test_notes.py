"""What the user should know reaches whoever calls: as warnings at their own line, or as notes of the progress they give."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import main
from surgery.device import as_memory_allows
from surgery.engine.lane import Lane
from surgery.engine.resources import Memory
from surgery.engine.threads import ReadAhead, WriteBehind
from surgery.progress import heard, listening, note
from surgery.solvers import lanczos, triplets
from tests.models import realistic, save_llama, tensors_of

HERE = Path(__file__)


@contextmanager
def _caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m: a model; f: it at rank 4; nameless, half, odd: scales of f without metadata, in bfloat16, and as changes g - 1."""
    folder = tmp_path_factory.mktemp("notes")
    save_llama(folder / "m", torch.float32)
    surgery.factorize(folder / "m", folder / "f", rank=4, device="cpu")
    scales = surgery.read_scales(folder / "f/surgery/scales.safetensors")
    save_file(scales.values, folder / "nameless")
    half = {key: value.bfloat16() for key, value in scales.values.items()}
    with safe_open(folder / "f/surgery/scales.safetensors", "pt") as file:
        save_file(half, folder / "half", metadata=file.metadata())
    surgery.write_scales(folder / "odd", {key: 0.01 * value for key, value in scales.values.items()}, scales.fingerprint)
    return folder


#: Every operation that takes a ``progress``, where it has something to say.
_SAYING: dict[str, tuple[str, Callable[..., object]]] = {
    "plan": ("rank 32 is larger than 4 of 14", lambda at, to, **how: surgery.plan(at / "m", rank=32, **how)),
    "factorize": ("rank 32 is larger than 4 of 14", lambda at, to, **how: surgery.factorize(at / "m", to, rank=32, **how)),
    "factorize again": (
        "is already complete: nothing to do",
        lambda at, to, **how: surgery.factorize(at / "m", at / "f", rank=4, device="cpu", **how),
    ),
    "fold": ("does not say which factors", lambda at, to, **how: surgery.fold(at / "f", at / "nameless", to, **how)),
    "fold of values": (
        "nearly all scales are near 0",
        lambda at, to, **how: surgery.fold(at / "f", load_file(at / "odd"), to, **how),
    ),
    "export": ("holds BF16 numbers", lambda at, to, **how: surgery.export(at / "f", at / "half", to, **how)),
    "project": (
        "has the same weights as the original",
        lambda at, to, **how: surgery.project(at / "f", at / "m", to, device="cpu", **how),
    ),
    "spectra": (
        "has the same weights as the original",
        lambda at, to, **how: surgery.spectra(at / "m", at / "m", top=4, include=["*q_proj*"], device="cpu", **how),
    ),
    "recommend": (
        "hardly anything in common",
        lambda at, to, **how: surgery.recommend(
            at / "m", _other(at), budget=20, max_rank=4, include=["*q_proj*"], out=to, device="cpu", **how
        ),
    ),
    "blend": ("does not say which factors", lambda at, to, **how: surgery.blend([at / "nameless"], to, **how)),
    "show_scales": ("nearly all scales are near 0", lambda at, to, **how: surgery.show_scales(at / "odd", **how)),
    "read_scales": ("holds BF16 numbers", lambda at, to, **how: surgery.read_scales(at / "half", **how)),
    "verify": ("nearly all scales are near 0", lambda at, to, **how: surgery.verify(_with_odd_scales(at, to), **how)),
}


def _other(models: Path) -> Path:
    """A model of another seed."""
    folder = models / "other"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_bytes((models / "m/config.json").read_bytes())
        generator = torch.Generator().manual_seed(9)
        tensors = {key: torch.randn(value.shape, generator=generator) for key, value in tensors_of(models / "m").items()}
        save_file(tensors, folder / "model.safetensors")
    return folder


def _with_odd_scales(models: Path, to: Path) -> Path:
    if not to.exists():
        shutil.copytree(models / "f", to)
        shutil.copyfile(models / "odd", to / "surgery/scales.safetensors")
    return to


@pytest.mark.parametrize("name", _SAYING)
def test_a_note_is_a_warning_at_the_line_of_the_caller_or_a_note_of_its_progress(
    name: str, models: Path, tmp_path: Path
) -> None:
    said, call = _SAYING[name]
    line = call.__code__.co_firstlineno
    with _caught() as caught:
        call(models, tmp_path / "one")
    about = [warning for warning in caught if said in str(warning.message)]
    assert len(about) == 1
    assert {warning.category for warning in caught} == {surgery.SurgeryWarning}
    assert {warning.filename for warning in caught} == {str(HERE)}
    assert all(line <= warning.lineno <= line + 4 for warning in caught)

    heard_by = surgery.Silent()
    with _caught() as caught:
        call(models, tmp_path / "two", progress=heard_by)
    assert not caught
    assert [note for note in heard_by.notes if said in note]


def test_what_is_not_said_is_not_warned_of(models: Path, tmp_path: Path) -> None:
    scales = models / "f/surgery/scales.safetensors"
    surgery.factorize(models / "m", tmp_path / "f", rank=4)
    surgery.fold(models / "f", scales, tmp_path / "out")
    surgery.verify(models / "f")
    surgery.inspect(models / "f")
    surgery.show_scales(scales)


def test_where_warnings_are_errors_the_work_is_done_all_the_same(models: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.SurgeryWarning, match="rank 32 is larger"):
        surgery.factorize(models / "m", tmp_path / "f", rank=32)
    assert surgery.verify(tmp_path / "f").ok
    with pytest.raises(surgery.SurgeryWarning, match="does not say which factors"):
        surgery.fold(models / "f", models / "nameless", tmp_path / "out")
    assert surgery.plan(tmp_path / "out", rank=4).targets


def test_code_that_has_no_name_is_told_as_well(models: Path) -> None:
    """As ``exec`` and ``eval`` of a notebook, a template or a worker run it."""
    for known in ({}, {"__name__": "somewhere"}, {"__builtins__": {}}, {"__name__": None}):
        with pytest.warns(surgery.SurgeryWarning, match="rank 32 is larger") as caught:
            exec("plan(m, rank=32)", {**known, "plan": surgery.plan, "m": models / "m"})
        assert [(warning.filename, warning.lineno) for warning in caught] == [("<string>", 1)]


def test_an_error_is_not_replaced_by_a_warning() -> None:
    @heard
    def stopped(fault: type[BaseException]) -> None:
        try:
            raise fault("the reason")
        except fault:
            note("how to go on")
            note("and how not to")
            raise

    for fault in (KeyboardInterrupt, surgery.OutputError):
        with pytest.raises(fault, match="the reason"):
            stopped(fault)  # warnings are errors here
        with _caught() as caught, pytest.raises(fault, match="the reason"):
            stopped(fault)
        assert [str(warning.message) for warning in caught] == ["how to go on", "and how not to"]
        assert {warning.filename for warning in caught} == {str(HERE)}


def test_threads_that_work_for_an_operation_are_heard_in_the_thread_that_called() -> None:
    """Wherever the work is: in a reader, a writer, a worker of a lane, or several at once."""

    @heard
    def work(progress: surgery.Progress | None = None) -> None:
        def items() -> Iterator[int]:
            for i in range(3):
                note(f"read {i}")
                yield i

        with ReadAhead(items()) as ahead:
            assert list(ahead) == [0, 1, 2]
        with WriteBehind() as behind:
            behind.submit(note, "written")
        with Lane(torch.device("cpu"), Memory(2, 1, 1 << 20)) as lane:
            for future in [lane.submit(note, "all the same") for _ in range(8)]:
                future.result()

    told = ["read 0", "read 1", "read 2", "written", "all the same"]
    threads: list[int] = []
    with _caught() as caught:
        before = warnings.showwarning
        warnings.showwarning = lambda *args, **kwargs: (threads.append(threading.get_ident()), before(*args, **kwargs))[1]
        work()
    assert [str(warning.message) for warning in caught] == told
    assert {warning.filename for warning in caught} == {str(HERE)}
    assert set(threads) == {threading.get_ident()}
    with pytest.raises(surgery.SurgeryWarning, match="read 0"):
        work()
    silent = surgery.Silent()
    work(progress=silent)
    assert silent.notes == told


def test_operations_in_operations_and_beside_each_other() -> None:
    @heard
    def inner() -> None:
        note("inside")
        assert listening() is not None

    @heard
    def outer(item: object = None, progress: surgery.Progress | None = None) -> None:
        inner()

    silent = surgery.Silent()
    outer(progress=silent)
    assert silent.notes == ["inside"]
    with pytest.warns(surgery.SurgeryWarning, match="inside") as caught:
        outer()
    assert [warning.filename for warning in caught] == [str(HERE)]

    class Calling(surgery.Silent):
        """Calls an operation itself when it is told something, which works in threads and tells nobody else."""

        def note(self, message: str) -> None:
            super().note(message)
            with pytest.warns(surgery.SurgeryWarning, match="inside"), Lane(torch.device("cpu"), Memory(1, 1, 1 << 20)) as lane:
                lane.submit(outer, None).result(timeout=30)

    calling = Calling()
    outer(progress=calling)
    assert calling.notes == ["inside"]

    # Two at the same time in two threads do not hear each other.
    kept = [surgery.Silent() for _ in range(2)]
    ready = threading.Barrier(2)

    @heard
    def says(what: str, progress: surgery.Progress) -> None:
        ready.wait(10)
        note(what)

    threads = [threading.Thread(target=says, args=(str(i),), kwargs={"progress": kept[i]}) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.notes for one in kept] == [["0"], ["1"]]


class _FullDevice:
    """Stands for a GPU whose memory is full."""

    type = "xpu"

    def __str__(self) -> str:
        return "xpu:0"


def test_a_device_without_memory_is_told_of_once() -> None:
    def work(items: Any, device: Any) -> list[Any]:
        if device.type != "cpu":
            raise RuntimeError("out of memory")
        return list(items)

    @heard
    def all_of_them() -> None:
        device: Any = _FullDevice()
        assert as_memory_allows(work, [1, 2, 3], device) == [1, 2, 3]

    with pytest.warns(surgery.SurgeryWarning, match="xpu:0 has not enough free memory") as caught:
        all_of_them()
    assert len(caught) == 1


@pytest.fixture
def no_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few passes, and no Gram matrix to fall back on."""
    monkeypatch.setattr(lanczos, "MAX_PASSES", 4)
    monkeypatch.setattr(triplets, "_MAX_GRAM", 0)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weights whose spectra are flat, and one of rank 1, on which any iteration converges."""
    folder = tmp_path_factory.mktemp("flat")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(600, 600, generator=generator) for i in range(2)}
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.outer(realistic(600, 2)[:, 0], realistic(600, 2, seed=1)[:, 0])
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("no_convergence")
def test_targets_that_did_not_converge_are_named(flat: Path, tmp_path: Path) -> None:
    said = r"the SVD of 2 of 3 targets did not reach the tolerance 1e-05: model\.layers\.\d\.mlp\.up_proj\.weight \(residual "
    with pytest.warns(surgery.SurgeryWarning, match=f"{said}.*Try another --rank or --seed"):
        report = surgery.factorize(flat, tmp_path / "f", rank=4, device="cpu")
    failed = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    assert (report.converged, sorted(report.unconverged)) == (False, failed)
    inspected = surgery.inspect(tmp_path / "f").targets
    assert [target.tensor for target in inspected if not target.converged] == failed
    worst = max(inspected, key=lambda target: target.max_residual)
    # A result that is there already is no better for it.
    again = surgery.Silent()
    surgery.factorize(flat, tmp_path / "f", rank=4, device="cpu", progress=again)
    assert any(f"1e-05: {worst.tensor} (residual {worst.max_residual:.1e}), " in note for note in again.notes)
    done = CliRunner().invoke(main, ["factorize", str(flat), "--rank", "4", "--device", "cpu", "-o", str(tmp_path / "g")])
    assert done.exit_code == 0
    assert f"note: the SVD of 2 of 3 targets did not reach the tolerance 1e-05: {worst.tensor} (residual" in done.stderr
    # The fold is as exact as ever.
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (flat / "model.safetensors").read_bytes()

    with pytest.warns(surgery.SurgeryWarning, match="the SVD of 2 of 3 matrices did not reach the tolerance"):
        found = surgery.spectra(flat, top=4, device="cpu")
    assert found.findings.unconverged == 2
    with pytest.warns(surgery.SurgeryWarning, match="the SVD of 2 of 3 matrices did not reach the tolerance") as caught:
        surgery.recommend(flat, budget=6, max_rank=4, out=tmp_path / "r.toml", device="cpu")
    assert {warning.filename for warning in caught} == {str(HERE)}


def test_the_command_says_what_the_operation_does(models: Path, tmp_path: Path) -> None:
    """The same notes, once each, on stderr; none of them with --quiet; stdout is data alone."""
    for arguments, said in (
        (["blend", models / "nameless", "-o"], "does not say which factors"),
        (["scales", "show", models / "odd"], "nearly all scales are near 0"),
        (["fold", models / "f", models / "half", "-o"], "holds BF16 numbers"),
    ):
        for i, quiet in enumerate(([], ["-q"])):
            out = [tmp_path / f"{arguments[0]}-{i}"] if arguments[-1] == "-o" else []
            done = CliRunner().invoke(main, [str(part) for part in (*arguments, *out, *quiet)])
            assert done.exit_code == 0
            assert done.stderr.count(said) == (0 if quiet else 1)
            assert said not in done.stdout
