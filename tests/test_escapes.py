"""Texts of strangers on their way to a terminal: none moves its cursor, and none can look like a line of ours."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import SourceError, SurgeryError, SurgeryWarning
from surgery.escapes import escaped, quoted, quoted_glob
from surgery.progress import note
from tests.cli.test_terminal import in_a_terminal
from tests.loopback_hub import LoopbackHub
from tests.models import save_llama
from tests.sealing import seal

#: Of each kind that a terminal obeys or does not show, and lines that look like ours. A file may be called so.
EVIL = (
    "\x1b[2J\x1b]0;t\x07\x08\x9b31m\x7f\x85\u2028\u202e\u2066\u200f\u200b\u061c\ue000"
    "\t\rError: forged\nError: forged\nnote: forged"
)
#: What shows that it was there: as text, in a word for a shell, shortened in a bar, from the middle of a name.
_SIGNS = ("\\x1b", "\\033[2J", "\\u202e", "forged")
_PROGRAM = """
import json, os, sys
from surgery.cli.main import main
for number, arguments in enumerate(json.load(open({file!r}))):
    sys.stdout.flush()
    os.write(1, b"\\n@@%d\\n" % number)
    try:
        main(arguments, prog_name="surgery")
    except SystemExit:
        pass
"""


def _is_safe(text: str) -> bool:
    """By Unicode's own tables: letters, marks, numbers, signs and spaces, and the line ends of a terminal."""
    text = text.replace("\r\n", "\n")
    return all(one in " \t\n\r" or unicodedata.category(one)[0] in "LMNPS" for one in text)


def _seen(hostile: list[list[str]], folder: Path, **env: str) -> list[str]:
    """What a terminal gets of each of some commands."""
    (folder / "commands.json").write_text(json.dumps(hostile))
    text = in_a_terminal(_PROGRAM.format(file=str(folder / "commands.json")), 4000, **env)
    parts = re.split(r"\r\n@@\d+\r\n", text)[1:]
    assert len(parts) == len(hostile), text[-2000:]
    return parts


class _Place:
    """A tiny model and what is made of it, and copies with something hostile in them."""

    def __init__(self, folder: Path, hub: LoopbackHub) -> None:
        self.folder, self.hub = folder, hub
        self.model = save_llama(folder / "m", torch.bfloat16, shard_size="1GB")
        self.factorized = folder / "f"
        surgery.factorize(self.model, self.factorized, rank=2, progress=surgery.Silent())
        self.overlay = folder / "v"
        surgery.factorize(self.model, self.overlay, rank=2, layout="overlay", progress=surgery.Silent())
        self.scales = self.factorized / "surgery/scales.safetensors"
        self._count = 0

    def path(self, name: str = "") -> str:
        self._count += 1
        (self.folder / f"w{self._count}").mkdir()
        return str(self.folder / f"w{self._count}" / name)

    def copy(self, of: Path, name: str = "x") -> Path:
        return Path(shutil.copytree(of, self.path(name)))

    def edited(self, of: Path, file: str, edit: Callable[[Any], Any]) -> str:
        """A copy with another JSON file; a manifest is sealed anew."""
        folder = self.copy(of)
        value = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        is_sealed = value.pop("sha256", None) is not None
        changed = edit(value)
        text = json.dumps(value if changed is None else changed)
        (folder / file).write_bytes(seal(text) if is_sealed else text.encode())
        return str(folder)

    def tensors(self, edit: Callable[[dict[str, torch.Tensor]], None], metadata: dict[str, str] | None = None) -> str:
        """A copy with other weights."""
        folder = self.copy(self.model)
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata)
        return str(folder)

    def recipe(self, text: str) -> str:
        path = Path(self.path("r.toml"))
        path.write_text(text)
        return str(path)

    def scales_with(self, name: str | None = None, metadata: str | None = None) -> str:
        path = self.path("s.safetensors")
        tensors = load_file(self.scales)
        with safe_open(self.scales, "pt") as file:
            owner = dict(file.metadata())
        if name is not None:
            tensors[name] = torch.full((2,), 1.5)
        save_file(tensors, path, owner if metadata is None else {"surgery": metadata})
        return path

    def adapter(self, **config: Any) -> str:
        folder = Path(self.path("adapter"))
        folder.mkdir()
        names = [
            f"base_model.model.{config.pop('module', 'model.layers.0.self_attn.q_proj')}.lora_{part}.weight" for part in "AB"
        ]
        save_file({names[0]: torch.ones(1, 48), names[1]: torch.ones(48, 1)}, folder / "adapter_model.safetensors")
        whole = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(whole))
        return str(folder)

    def repository(self, name: str, commit: str | None = None, pages: list[object] | None = None) -> str:
        repo = self.hub.publish(f"acme/{name}", self.model)
        repo.commit = commit or repo.commit
        repo.pages = None if pages is None else [[*self.hub.described(repo), *pages]]
        return f"acme/{name}"


def _with_name(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = torch.randn(8, 8)

    return edit


def _with_nan(weights: dict[str, torch.Tensor]) -> None:
    weights[f"model.layers.0.{EVIL}.weight"] = torch.full((8, 8), torch.nan)


def _header(place: _Place, header: dict[str, Any]) -> str:
    folder = place.copy(place.model)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return str(folder)


def _set(*path: Any, value: Any = EVIL) -> Callable[[Any], None]:
    def edit(holder: Any) -> None:
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value

    return edit


def _ways(p: _Place) -> list[list[str]]:
    """Commands that each meet a hostile text, all in different places."""
    m, f, v, s = str(p.model), str(p.factorized), str(p.overlay), str(p.scales)
    index = {"metadata": {}, "weight_map": {"a": f"{EVIL}.safetensors"}}
    indexed_only = p.copy(p.model)
    (indexed_only / "model.safetensors").rename(indexed_only / "part.safetensors")
    hidden_index = {"weight_map": {"model.norm.weight": "part.safetensors", EVIL: "part.safetensors"}}
    indexed = p.edited(p.model, "model.safetensors.index.json", lambda _: hidden_index)
    (Path(indexed) / "model.safetensors").rename(Path(indexed) / "part.safetensors")
    tensor = p.tensors(_with_name(f"model.layers.0.{EVIL}.weight"))
    odd = p.path("f")
    surgery.factorize(tensor, odd, rank=2, include=["*forged.weight", "*0*q_proj*"], progress=surgery.Silent())
    unfinished = str(p.copy(p.factorized))
    (Path(unfinished) / "surgery/manifest.json").unlink()
    (Path(unfinished) / ".surgery").mkdir()
    (Path(unfinished) / ".surgery/run.json").write_text(json.dumps({"kind": EVIL, EVIL: EVIL}))
    named = p.copy(p.model, EVIL)
    littered = p.copy(p.model)
    for name in (f"{EVIL}.log", f"{EVIL}.safetensors"[-150:].replace("\n", " "), "other.safetensors"):
        (littered / name).write_bytes(b"x")
    in_weights = p.copy(p.model)
    (in_weights / f"{EVIL}.safetensors").write_bytes(b"x")
    pickled = Path(p.path(EVIL))
    pickled.mkdir()
    (pickled / f"{EVIL}.bin").write_bytes(b"x")
    quantized = {"quant_method": EVIL}
    fp8 = {"quant_method": "fp8", "weight_block_size": EVIL}
    aliased = p.tensors(lambda weights: weights.update({f"model.layers.0.{EVIL}": weights["model.norm.weight"].clone()}))
    recipes = [
        f"{json.dumps(EVIL)} = 1\n[[rules]]\nmatch = '*'\n",
        f'[[rules]]\nmatch = "*q_proj*"\nskip = {json.dumps(EVIL)}\n[[rules]]\nmatch = "*k_proj*"\n',
        f'[[rules]]\nmatch = "*q_proj*"\nview = {json.dumps(EVIL)}\n',
    ]
    return [
        # click's own errors, options, and paths as they are given
        [EVIL], [f"--{EVIL}"], ["plan", m, f"--{EVIL}"], ["plan", m, EVIL], ["inspect", f, EVIL], ["scales", EVIL],
        ["plan", EVIL], ["plan", f"acme/{EVIL}"], ["plan", f"hf://acme/{EVIL}"], ["plan", f"s3://{EVIL}"],
        ["plan", f"https://huggingface.co/acme/m/blob/main/{EVIL}.gguf"], ["plan", f"acme/m@{EVIL}"], ["plan", f"~{EVIL}/m"],
        ["plan", f"C:\\{EVIL}"], ["plan", m, "--rank", EVIL], ["plan", m, "--energy", EVIL], ["plan", m, "--max-rank", EVIL],
        ["plan", m, "--max-memory", EVIL], ["plan", m, "--layout", EVIL], ["plan", m, "--recipe", EVIL],
        ["plan", m, "--include", EVIL], ["plan", m, "--subfolder", EVIL],
        ["plan", p.repository("folder"), "--subfolder", f"{EVIL}/.."],
        ["plan", m, "--device", EVIL], ["plan", f"{m}/{EVIL}.safetensors"],
        ["plan", p.repository("subfolder"), "--subfolder", EVIL], ["factorize", m, "--engine", EVIL],
        ["factorize", m, "--seed", EVIL], ["factorize", m, "--tolerance", EVIL], ["factorize", EVIL, "-o", p.path("o")],
        ["factorize", m, "-o", f"{m}/{EVIL}"], ["factorize", m, "-o", p.path("o"), "--push-to-hub", EVIL],
        ["factorize", m, "--rank", "2", "-o", p.path(EVIL)], ["fold", EVIL, s], ["fold", f, EVIL],
        ["fold", f, s, "-o", p.path(EVIL)],
        ["fold", v, s, "--base", EVIL], ["fold", f, s, "--lora", EVIL], ["export", f, s, "--to", EVIL], ["export", f, EVIL],
        ["inspect", EVIL], ["verify", EVIL], ["verify", v, "--base", EVIL], ["project", f, EVIL],
        ["project", f, m, "-o", p.path(EVIL)],
        ["blend", EVIL], ["blend", s, "--weights", EVIL], ["blend", s, "--space", EVIL], ["blend", s, "-o", p.path(EVIL)],
        ["scales", "show", EVIL], ["scales", "show", s, "--top", EVIL], ["spectra", EVIL, "-o", p.path("r")],
        ["spectra", m, "--include", "*0*q_proj*", "-o", p.path(EVIL)], ["recommend", m, "--budget", EVIL],
        ["recommend", m, "--budget", "9", "--unit", EVIL], ["recommend", EVIL, "--budget", "9"], ["demo", "--steps", EVIL],
        ["recommend", m, "--budget", "9000", "--include", "*0*q_proj*", "-o", p.path(EVIL)],
        # names of folders and files
        ["plan", str(named / "not there")], ["factorize", str(named), "--layout", "overlay", "--rank", "2", "-o", p.path("o")],
        ["plan", str(littered), "--all"], ["plan", str(in_weights)], ["plan", str(pickled)],
        ["plan", str(pickled / f"{EVIL}.bin")],
        # headers, tensors and indexes
        ["plan", tensor, "--all"], ["inspect", odd], ["project", odd, tensor, "-o", p.path("s")],
        ["project", odd, m, "-o", p.path("s")], ["plan", aliased, "--all"],
        ["factorize", p.tensors(_with_nan), "--include", "*forged.weight", "--rank", "2", "-o", p.path("o")],
        ["spectra", p.tensors(_with_nan), "--include", "*forged.weight", "-o", p.path("r")],
        ["plan", _header(p, {EVIL: {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}})],
        ["plan", _header(p, {"a": {"dtype": EVIL, "shape": [1], "data_offsets": [0, 4]}})],
        ["plan", _header(p, {EVIL: {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}})],
        ["plan", p.edited(indexed_only, "model.safetensors.index.json", lambda _: index)], ["plan", indexed],
        # configs, recipes, adapters, scales
        ["export", p.edited(p.factorized, "config.json", _set("model_type")), s, "-o", p.path("a")],
        ["export", p.edited(p.factorized, "config.json", _set("architectures", value=[EVIL])), s, "-o", p.path("a")],
        ["plan", p.edited(p.model, "config.json", _set("quantization_config", value=quantized))],
        ["plan", p.edited(p.model, "config.json", _set("quantization_config", value=fp8))],
        *(["plan", m, "--recipe", p.recipe(text)] for text in recipes),
        ["fold", f, s, "-o", p.path("o"), "--lora", p.adapter(peft_type=EVIL)],
        ["fold", f, s, "-o", p.path("o"), "--lora", p.adapter(module=EVIL)],
        ["fold", f, s, "-o", p.path("o"), "--lora", p.adapter(bias=EVIL)],
        ["fold", f, s, "-o", p.path("o"), "--lora", p.adapter(r=EVIL)],
        ["fold", f, p.scales_with(EVIL), "-o", p.path("o")], ["scales", "show", p.scales_with(EVIL)],
        ["scales", "show", p.scales_with(metadata=EVIL)], ["scales", "show", p.scales_with(metadata=json.dumps({EVIL: EVIL}))],
        ["blend", s, p.scales_with(EVIL), "-o", p.path("s")],
        # what earlier runs left
        ["inspect", p.edited(p.factorized, "surgery/manifest.json", _set("format_version"))],
        ["inspect", p.edited(p.factorized, "surgery/manifest.json", _set("layout"))],
        ["inspect", p.edited(p.factorized, "surgery/manifest.json", _set("source", "repo_id"))],
        ["inspect", p.edited(p.factorized, "surgery/manifest.json", _set(EVIL, value=1))],
        ["inspect", p.edited(p.factorized, "surgery/manifest.json", _set("files", 0, "file"))],
        ["verify", p.edited(p.factorized, "surgery/manifest.json", _set("files", 0, "sha256"))],
        ["fold", p.edited(p.overlay, "surgery/manifest.json", _set("source", "repo_id")), s, "-o", p.path("o")],
        ["factorize", m, "--rank", "2", "-o", unfinished],
        # a hub
        ["plan", p.repository("commit", commit=EVIL)],
        ["plan", p.repository("type", pages=[{"type": "file", "path": [EVIL], "size": 1, "oid": ""}])],
        ["plan", p.repository("entry", pages=[{"type": "file", "path": f"{EVIL}.py", "size": 1, "oid": "0" * 40}])],
        ["plan", p.repository("size", pages=[{"type": "file", "path": "x", "size": EVIL, "oid": "0" * 40}])],
        ["plan", p.repository("log", pages=[{"type": "file", "path": f"{EVIL}.log", "size": 1, "oid": "0" * 40}]), "--all"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hub: LoopbackHub) -> _Place:
    return _Place(tmp_path_factory.mktemp("escapes"), hub)


def test_no_text_of_a_stranger_reaches_a_terminal_as_it_is(place: _Place, tmp_path: Path) -> None:
    ways = _ways(place)
    assert len(ways) > 100
    for way, text in zip(ways, _seen(ways, tmp_path, HF_ENDPOINT=place.hub.url, HF_HUB_DISABLE_XET="1"), strict=True):
        about = f"{[escaped(part) for part in way]}\n{text!r}"
        assert _is_safe(text), about
        assert "Traceback" not in text, about
        lines = re.split(r"[\r\n]+", text)
        assert not any(line.startswith(("Error: forged", "note: forged")) for line in lines), about
        assert sum(line.startswith("Error: ") for line in lines) <= 1, about
        assert any(sign in text for sign in _SIGNS), about  # what says nothing of it would be no test


def test_the_address_of_a_hub_is_shown_safely(tmp_path: Path) -> None:
    [text] = _seen([["plan", "acme/model"]], tmp_path, HF_ENDPOINT=f"http://{EVIL.replace(' ', '')}")
    assert _is_safe(text)
    assert "Error: " in text
    assert not any(line.startswith(("Error:forged", "note:forged")) for line in re.split(r"[\r\n]+", text))


_BAR = """
import time
from surgery.cli.bar import Bar
evil = {evil!r}
bar = Bar(quiet=False)
for total in (100, 0):
    bar.start("factorizing", total)
    for _ in range(3):
        bar.item(evil)
        bar.advance(10)
        bar.note(f"about {{evil}}")
        time.sleep(0.15)
    bar.finish()
"""


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("width", [60, 100, 1000])
def test_a_bar_moves_to_the_beginning_of_its_line_and_nowhere_else(term: str, width: int) -> None:
    text = in_a_terminal(_BAR.format(evil=EVIL), width, TERM=term)
    assert _is_safe(text), repr(text)
    lines = re.split(r"[\r\n]+", text)
    assert not any(line.startswith(("Error", "note: forged")) for line in lines)
    assert sum(line.startswith("note: about \\x1b[2J") for line in lines) == 6
    # The bar is there, with the end of the name.
    assert term == "dumb" or any(re.match(r"factorizing +\d+%.*forged$", line.rstrip()) for line in lines)


_CARELESS = """
import logging, sys, threading, warnings
import click
from surgery.cli.main import main
from surgery.cli.text import tell
evil = {evil!r}

@main.command()
def careless():
    print(evil)
    click.echo(evil, err=True)
    logging.basicConfig(stream=sys.stderr)
    logging.warning("of a config: %s", evil)
    warnings.warn(evil)
    thread = threading.Thread(target=int, args=(evil,))
    thread.start()
    thread.join()
    raise RuntimeError(evil) from ValueError(evil)

sys.argv = ["surgery", "careless"]
try:
    main()
except RuntimeError:
    sys.excepthook(*sys.exc_info())
"""


def test_what_nobody_has_thought_of_moves_no_cursor_either() -> None:
    """Text of libraries, their logs and warnings, threads that end in errors, and a traceback."""
    text = in_a_terminal(_CARELESS.format(evil=EVIL), 4000)
    assert _is_safe(text), repr(text)
    assert text.count("\\x1b[2J") >= 7
    end = text[text.rindex("Traceback") :]
    assert "\nRuntimeError: \\x1b[2J" in end.replace("\r", "")
    assert not any(line.startswith("Error: forged") for line in end.splitlines())
    assert "WARNING:root:of a config: \\x1b[2J" in text


def test_an_error_is_as_many_lines_as_it_has_parts() -> None:
    error = SourceError(f"{EVIL} is no model", got=EVIL, expected=["a", EVIL], hint=EVIL)
    lines = str(error).split("\n")
    assert [line[:12] for line in lines] == ["\\x1b[2J\\x1b]", "  got:      ", "  expected: ", "  try:      "]
    assert all(map(_is_safe, lines))
    assert len(str(error).splitlines()) == 4
    assert error.got == EVIL
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.what, back.got, back.hint) == (str(error), error.what, EVIL, EVIL)
    inner = SurgeryError("outer", got=error)
    assert len(str(inner).splitlines()) == 2
    with pytest.raises(SurgeryError, match="層: é"):
        raise SurgeryError("層: é 👍🏽")


def test_a_note_is_one_line_for_whoever_hears_it(tmp_path: Path, llama: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        note(f"of {EVIL}")
    assert [str(warning.message) for warning in caught] == [f"of {escaped(EVIL)}"]
    assert caught[0].category is SurgeryWarning
    shutil.copytree(llama, tmp_path / EVIL)
    (tmp_path / EVIL / "model-x.safetensors").write_bytes(b"")
    heard = surgery.Silent()
    surgery.factorize(tmp_path / EVIL, tmp_path / "f", rank=1, include=["*0*q_proj*"], progress=heard)
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / f"o{EVIL}", progress=heard)
    assert all(text.isprintable() for text in heard.notes)


@pytest.mark.parametrize("one", ["é", "e\u0301", "模型", "한글", "👍🏽", "❤\ufe0f", "नमस्ते", "\\x1b", "a b", "'\"$`"])
def test_what_can_be_seen_stays(one: str) -> None:
    assert escaped(f"a{one}b") == f"a{one}b"


def test_all_that_cannot_be_seen_is_escaped() -> None:
    """By the categories of Unicode, character by character."""
    every = list(map(chr, range(0x110000)))
    seen = "".join(one for one in every if one == " " or unicodedata.category(one)[0] in "LMNPS")
    assert escaped(seen) == seen
    known = set(seen)
    hidden = [one for one in every if one not in known]
    found = escaped("\u00e9".join(hidden)).split("\u00e9")
    assert all(text.isascii() and text.isprintable() for text in found)
    assert len(set(found)) == len(hidden)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_suggested_command_is_what_is_meant_when_it_is_pasted(locale: str, tmp_path: Path) -> None:
    words = [
        EVIL,
        "plain",
        "two words",
        "it's",
        '$(x) `y` "z" \\',
        f"'{EVIL}\\",
        "\x1b1234",
        "é\n模型",
        "caf\udce9",
        "",
        "\x7ff",
    ]
    line = "printf '%s\\0' " + " ".join(map(quoted, words))
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | {"LC_ALL": locale}, timeout=60)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def test_a_suggested_pattern_matches_that_tensor_alone(tmp_path: Path) -> None:
    name = f"model.layers.0.it's [1] *{EVIL}.weight"
    line = f"printf '%s' {quoted_glob(name)}"
    glob = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60).stdout.decode()
    folder = save_llama(tmp_path / "m", torch.bfloat16, shard_size="1GB")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.randn(8, 8)}, folder / "model.safetensors")
    assert [target.tensor for target in surgery.plan(folder, rank=1, include=[glob]).targets] == [name]
