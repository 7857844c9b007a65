"""What a terminal shows, at its width and in its encoding; what a log gets; what a shell completes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli import bar as bars
from surgery.cli.bar import Bar
from surgery.cli.main import main
from surgery.cli.outcomes import median_share
from surgery.cli.tables import table
from surgery.cli.text import cells, shorten, shown, whole, wrapped
from surgery.progress import Silent, phase
from tests.loopback_hub import LoopbackHub
from tests.models import save_llama

ROOT = Path(__file__).parents[2]
WIDTHS = (46, 60, 80, 100, 120)
EXPERT = "model.layers.31.mlp.experts.127.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("model.layers.31.mlp.gate_proj.weight", 36, "model.layers.31.mlp.gate_proj.weight"),
        ("model.layers.31.mlp.gate_proj.weight", 35, "model.layers.31.mlp.gate_proj…"),
        ("model.layers.31.mlp.gate_proj.weight", 25, "model.layers.31…gate_proj"),
        ("model.layers.31.mlp.gate_proj.weight", 13, "…31…gate_proj"),
        ("model.layers.31.mlp.gate_proj.weight", 12, "…gate_proj"),
        (EXPERT, 30, "model.layers.31…127.gate_proj"),
        (EXPERT, 17, "…31…127.gate_proj"),
        ("model.layers.3.self_attn.qkv_proj.weight[q]", 22, "…layers.3…qkv_proj[q]"),
        ("model.layers.3.self_attn.q_proj.bias", 20, "…3…q_proj.bias"),
        ("a_name_without_parts", 11, "a_nam…parts"),
        ("fetching 24% of model-00001.safetensors", 20, "fetching 2…fetensors"),
        ("模型.层.3.权重", 12, "…层.3.权重"),
        (unicodedata.normalize("NFD", "한글.3.가중치"), 13, unicodedata.normalize("NFD", "한글.3.가중치")),
    ],
)
def test_names_are_shortened_in_the_middle(name: str, width: int, short: str) -> None:
    assert shorten(name, width) == short


def _width(text: str) -> int:
    """By the tables of Unicode, character by character."""
    return sum(0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in ("W", "F") else 1 for one in text)


@pytest.mark.parametrize(
    "name", [EXPERT, "模型.层.31.注意力.查询投影.weight", "e\u0301te\u0301." * 9 + "x", "no parts but many words"]
)
def test_no_shortened_name_is_too_wide(name: str) -> None:
    for width in range(1, 60):
        assert _width(shorten(name, width)) <= width
        assert cells(shorten(name, width)) == _width(shorten(name, width))


def test_what_would_move_the_cursor_or_cannot_be_said_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown("层\x1b[2J\r\u202e\n\udcff") == "层\\x1b[2J\\r\\u202e\\n\\udcff"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = _python(
        "from surgery.cli.tables import table; print(table(['name'], [['层.0.' + 'a' * 40 + '.b']], names=[0]))", COLUMNS="20"
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "\\u5c42.0...b")


def test_lines_break_at_words_and_never_in_what_is_copied() -> None:
    path = "/data/my models/factorized"
    text = f"{whole(path)}: 12 matrices at rank 16, then: {whole('surgery fold x y')}"
    for width in range(8, 90):
        lines = wrapped(text, width)
        assert " ".join(line.strip() for line in lines) == text.replace("\0", " ")
        assert any(path in line for line in lines)
        assert any("surgery fold x y" in line for line in lines)
        assert all(cells(line) <= max(width, 2 + cells(path)) for line in lines)
    assert wrapped(text, None) == [text.replace("\0", " ")]


def _rows() -> list[list[str]]:
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{kind}_proj.weight" for i in (0, 31) for j in (3, 127) for kind in ("gate", "up")
    ]
    names += ["model.layers.0.mlp.shared_experts.up_proj.weight", "模型.层.7.权重", "x\x1b[2J"]
    return [
        [name, "4096x14336", "BF16", "16", f"{i}.5%", "a vector (norm, bias), or something else", "f" * 64]
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("width", [*WIDTHS, 30])
def test_tables_fit_and_lose_nothing_but_the_middle_of_names(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    headings = ["target", "shape", "dtype", "rank", "energy", "reason", "sha256"]
    rows = _rows()
    whole_table = table(headings, rows, flush_right=(3, 4), names=(0,), prose=(5, 6))
    assert all(shown(row[0]) in whole_table for row in rows)
    monkeypatch.setenv("COLUMNS", str(width))
    text = table(headings, rows, flush_right=(3, 4), names=(0,), prose=(5, 6))
    assert max(map(_width, text.replace("f" * 64, "").splitlines())) <= width
    words = text.split()
    for part in ("4096x14336", "BF16", "else", "f" * 64):
        assert words.count(part) == len(rows), part
    assert {f"{i}.5%" for i in range(len(rows))} <= set(words)
    assert "\x1b" not in text
    if width > 50:  # each name can be told from the others
        firsts = [line.split()[0] for line in text.splitlines() if line and not line.startswith((" ", "-"))]
        assert len(set(firsts)) == 1 + len(rows)


def test_a_name_that_would_be_another_ones_is_not_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[f"layers.{i}.very_long_name_of_block_{kind}.q_proj.weight", "x" * 30] for i in range(2) for kind in ("a", "b")]
    monkeypatch.setenv("COLUMNS", "52")
    text = table(["target", "what"], rows, names=(0,))
    assert all(row[0] in text for row in rows)


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    import torch

    surgery.factorize(save_llama(folder / "m", torch.bfloat16), folder / "f", rank=4)
    return folder


@pytest.mark.parametrize("width", WIDTHS)
def test_commands_fit_the_terminal(width: int, factorized: Path, tmp_path: Path) -> None:
    """As many numbers as where there is no limit, in lines that fit."""
    scales = {key: value.clone() for key, value in load_file(factorized / "f/surgery/scales.safetensors").items()}
    for value in scales.values():
        value[1] = 1.25
    save_file(scales, tmp_path / "s.safetensors")
    for command in (
        ["plan", factorized / "m"],
        ["plan", factorized / "m", "--all"],
        ["inspect", factorized / "f"],
        ["scales", "show", tmp_path / "s.safetensors"],
        ["project", factorized / "f", factorized / "m", "-o", tmp_path / "p.safetensors", "--overwrite", "-q"],
        ["recipes"],
    ):
        runner, arguments = CliRunner(), [str(part) for part in command]
        full = runner.invoke(main, arguments).stdout
        narrow = runner.invoke(main, arguments, env={"COLUMNS": str(width)}).stdout
        long = [line for line in narrow.splitlines() if len(line) > width]
        assert all(" " not in line.strip() for line in long), long  # a word of its own at the most
        numbers = re.compile(r"(?<!\S)[\d.,%x+-]*\d[\d.,%x+-]*(?!\S)")
        unsteady = re.compile("takes about.*")
        assert sorted(numbers.findall(unsteady.sub("", narrow))) == sorted(numbers.findall(unsteady.sub("", full)))
        assert "…" not in full


def test_failures_of_verify_keep_their_hashes(factorized: Path, tmp_path: Path) -> None:
    surgery.factorize(factorized / "m", tmp_path / "f", rank=4)
    with open(tmp_path / "f/config.json", "a") as file:
        file.write("\n")
    done = {
        width: CliRunner().invoke(main, ["verify", str(tmp_path / "f"), "--fast"], env={"COLUMNS": width})
        for width in ("60", "")
    }
    assert done["60"].exit_code == done[""].exit_code == 3
    cells_of = [set(re.findall(r"[\w.:/]{3,}", result.stdout)) for result in done.values()]
    assert cells_of[0] == cells_of[1]


@pytest.mark.parametrize("width", ["46", "60", "200"])
def test_factorize_ends_with_what_can_be_copied(width: str, factorized: Path, tmp_path: Path) -> None:
    out = tmp_path / "a folder with spaces and a name that is longer than some terminals"
    arguments = ["factorize", str(factorized / "m"), "--rank", "4", "-o", str(out), "--layout", "overlay"]
    done = CliRunner().invoke(main, arguments, env={"COLUMNS": width})
    assert f'surgery.attach(model, "{out}")' in done.stderr
    command = next(line for line in done.stderr.splitlines() if "surgery fold" in line)
    assert f"surgery fold '{out}' scales.safetensors --base {factorized / 'm'}" in command
    assert "train" in done.stderr


# Progress


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(bars, "time", found)
    return found


@pytest.mark.parametrize(
    ("steps", "seconds", "times"),
    [
        (100, 1.0, [10.0 * i for i in range(1, 11)]),  # each tenth
        (10, 150.0, [60.0 * i for i in range(1, 26)]),  # each minute, and the tenth that comes with one or between two
        (100, 0.04, []),  # over within seconds
        (100, 0.08, [5.0, 7.0]),
    ],
)
def test_a_log_gets_a_line_at_each_tenth_or_minute(
    steps: int, seconds: float, times: list[float], clock: _Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar, begun, seen = Bar(quiet=False), clock.now, []
    bar.start("factorizing", steps * 1_000_000)
    for i in range(steps):
        for _ in range(20):
            clock.now += seconds / 20
            bar.item(f"model.layers.{i}.mlp.gate_proj.weight")
            if capsys.readouterr().err:
                seen.append(clock.now - begun)
        bar.advance(1_000_000)
        if err := capsys.readouterr().err:
            seen.append(clock.now - begun)
            assert re.fullmatch(
                r"factorizing: \d+%, [\d.]+ k?M?B of [\d.]+ MB, [\d.]+ [kM]?B/s, \d+ \w+ left, "
                rf"model\.layers\.{i}\.mlp\.gate_proj\.weight\n",
                err,
            )
    bar.finish()
    if times == [60.0 * i for i in range(1, 26)]:
        assert all(after - before <= 60 + seconds / 20 for before, after in zip([0.0, *seen], seen, strict=False))
        assert len(seen) >= 25
    else:
        assert seen == pytest.approx(times, abs=0.2)


def test_a_log_is_told_that_a_large_matrix_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "_LOOK", 0.01)
    monkeypatch.setattr(bars, "_MOST_GAP", 0.05)
    monkeypatch.setattr(bars, "_FIRST_LINE", 0.05)
    bar = Bar(quiet=False)
    with phase(bar, "factorizing", 100):
        bar.item("big")
        end, err = time.monotonic() + 10, ""
        while err.count("\n") < 3 and time.monotonic() < end:
            time.sleep(0.01)
            err += capsys.readouterr().err
    assert err.startswith("factorizing: 0%, 0 B of 100 B, big\nfactorizing: 0%")


def test_quiet_is_silent(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(quiet=True)
    with phase(bar, "factorizing", 10):
        for _ in range(10):
            clock.now += 100
            bar.advance(1)
        bar.note("something")
    assert capsys.readouterr().err == ""


def test_time_left_follows_the_rate_of_late(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run finds most of it done at once; what is left goes at its own pace."""
    bar = Bar(quiet=False)
    bar.start("folding", 10_000)
    bar.advance(5_000)
    for _ in range(60):
        clock.now += 1
        bar.advance(50)
    bar.finish()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("folding: 80%, 8.0 kB of 10.0 kB, 50 B/s, 40 s left")


_PROGRAM = """
import sys, time
from surgery.cli.bar import Bar
bar = Bar(quiet=False)
bar.start("factorizing", 12_300_000_000)
for i in range(12):
    bar.item("model.layers.%d.mlp.experts.127.gate_proj.weight" % i)
    bar.advance(1_000_000_000)
    time.sleep(0.06)
    if i == 6:
        bar.note("rank 32 is larger than 4 of 14 targets and is cut to their smaller side there (first: a.b.c [1, 2])")
bar.finish()
bar.start("loading transformers", 0)
time.sleep(0.7)
bar.finish()
sys.stderr.write("end\\n")
"""


def _python(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )


def in_a_terminal(program: str, width: int, **env: str) -> str:
    """What a program writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | env,
    )
    os.close(theirs)
    found = b""
    try:
        while data := os.read(ours, 65536):
            found += data
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0, found
    return found.decode()


@pytest.mark.parametrize("width", [30, 46, 60, 80, 100, 160])
def test_the_bar_fits_and_shows_what_counts(width: int) -> None:
    text = in_a_terminal(_PROGRAM, width)
    frames = [frame for frame in re.split(r"[\r\n]+", text) if frame.startswith("factorizing")]
    assert len(frames) >= 4
    assert all(cells(frame) < width for frame in frames)
    last = frames[-1].rstrip()
    assert re.search(r" \d+%", last)
    if width >= 46:
        assert re.search(r"\d GB/s +\d:\d\d|\d GB/s +\d+:\d\d", last)
        assert "█" in last
    if width >= 60:
        assert re.search(r"1?\d(\.mlp)?(…|\.experts\.)127\.gate_proj", last)
    if width >= 80:
        assert re.search(r"[\d.]+/12\.3 GB", last)
    if width == 160:
        assert "model.layers.11.mlp.experts.127.gate_proj" in last
        assert last.count("█") >= 20
    # The note is whole and has its line for itself; nothing of a bar is left.
    note = "note: rank 32 is larger than 4 of 14 targets and is cut to their smaller side there (first: a.b.c [1, 2])"
    assert f"\r{note}\r\n" in text
    assert re.search(r"loading transformers 0:0[01]", text)
    assert re.search(r"\r *\rend\r\n$", text)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_bar_keeps_to_the_encoding(encoding: str) -> None:
    text = in_a_terminal(_PROGRAM, 100, PYTHONIOENCODING=encoding)
    assert text.isascii() == (encoding == "ascii")
    assert "#" in text or encoding == "utf-8"
    assert "\x1b" not in text
    assert "\\u" not in text


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)", ">&- 2>&-", ">&- 2>&- <&-"])
def test_work_is_done_where_nobody_can_hear_of_it(stderr: str, factorized: Path, tmp_path: Path) -> None:
    command = f"sleep 0.1; exec {shlex.quote(sys.executable)} -m surgery fold f f/surgery/scales.safetensors -o {tmp_path}/o"
    done = subprocess.run(
        ["bash", "-c", f"({command}) {stderr}"], cwd=factorized, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 0
    for file in (factorized / "m").glob("*.safetensors"):
        assert (tmp_path / "o" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_a_full_disk_does_not_take_is_told_with_what_to_do() -> None:
    command = f"exec {shlex.quote(sys.executable)} -m surgery recipes >/dev/full"
    done = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "free some space" in done.stderr


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    program = f"""
from surgery.cli.main import main
main(["recipes"], standalone_mode=False)
assert open({str(tmp_path / "shard")!r}, "wb").fileno() > 2
"""
    streams = "<&- >&- 2>&-"
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0


def test_a_dumb_terminal_is_a_log() -> None:
    assert "\r " not in in_a_terminal(_PROGRAM, 100, TERM="dumb").replace("\r\n", "\n")


class _Heard(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.phases: list[str] = []
        self.items: list[str] = []
        self.open = 0

    def start(self, label: str, total_bytes: int) -> None:
        assert self.open == 0, "a phase within another"
        self.open += 1
        self.phases.append(label)

    def item(self, name: str) -> None:
        self.items.append(name)

    def finish(self) -> None:
        self.open -= 1
        assert self.open == 0


def test_every_long_phase_is_reported(hub: LoopbackHub, factorized: Path, tmp_path: Path) -> None:
    hub.publish("acme/terminal", factorized / "m")
    ones = factorized / "f/surgery/scales.safetensors"
    out = tmp_path / "f"
    calls: list[tuple[Callable[[_Heard], object], list[str]]] = [
        (lambda heard: surgery.plan("acme/terminal", rank=4, progress=heard), ["planning"]),
        (lambda heard: surgery.factorize("acme/terminal", out, rank=4, progress=heard), ["planning", "factorizing", "copying"]),
        (lambda heard: surgery.factorize("acme/terminal", out, rank=4, progress=heard), ["planning", "hashing"]),
        (lambda heard: surgery.fold(out, ones, tmp_path / "o", progress=heard), ["folding", "copying"]),
        (lambda heard: surgery.fold(out, ones, tmp_path / "o", progress=heard), ["comparing", "hashing"]),
        (lambda heard: surgery.export(out, ones, tmp_path / "a", progress=heard), ["loading transformers", "exporting"]),
        (lambda heard: surgery.verify(out, progress=heard), ["verifying"]),
        (
            lambda heard: surgery.project(out, factorized / "m", tmp_path / "s", progress=heard),
            ["reading headers", "projecting"],
        ),
    ]
    everything: list[str] = []
    for call, phases in calls:
        heard = _Heard()
        call(heard)
        assert heard.phases == phases
        assert heard.open == 0
        everything += heard.items
    shards = [path.name for path in (factorized / "m").glob("*.safetensors")]
    assert {f"header of {shard}" for shard in shards} <= set(everything)
    assert {f"fetching 100% of {shard}" for shard in shards} <= set(everything)


# Shell completion


def _completed(words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from surgery.cli.main import main; main(prog_name='surgery')"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "_SURGERY_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        },
    )
    assert not re.search(r"\| +(torch|transformers|huggingface_hub|numpy|tqdm)$", done.stderr, re.MULTILINE)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("surgery fac", ["plain,factorize"]),
        ("surgery scales s", ["plain,show"]),
        ("surgery factorize --push", ["plain,--push-to-hub"]),
        ("surgery factorize m --layout r", ["plain,residual"]),
        ("surgery factorize ./mod", ["file,./mod"]),
        ("surgery plan m --recipe ./r", ["file,./r"]),
        ("surgery fold fact", ["file,fact"]),
        ("surgery fold f s --base ../m", ["file,../m"]),
        ("surgery project f ../tuned", ["file,../tuned"]),
        ("surgery spectra ../m ../tuned", ["file,../tuned"]),
    ],
)
def test_a_shell_completes_commands_options_and_paths(words: str, found: list[str]) -> None:
    assert _completed(words) == found


@pytest.mark.parametrize(
    ("size", "text"),
    [(0.0, "0 %"), (0.0123, "1.2 %"), (0.994, "99 %"), (0.996, "100 %"), (1.04, "104 %"), (12.3456, "1,235 %")],
)
def test_a_size_above_the_whole_has_no_power_of_ten(size: float, text: str) -> None:
    assert median_share([size, None]) == text
