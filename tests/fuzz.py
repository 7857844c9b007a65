"""Mutates every kind of file that surgery reads, and sees to it that nothing worse than a SurgeryError comes of it.

    python -m tests.fuzz SEED COUNT [KIND ...]      from that seed on, COUNT mutations of each kind

Each mutation has a seed of its own, which a failure names: ``python -m tests.fuzz SEED 1`` repeats it.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.conftest import HUB  # the hub's client, which others import, reads what this sets

# isort: split

import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, SurgeryError
from surgery.progress import Silent
from surgery.report.listing import write_csv
from surgery.report.page import write_page
from tests.adapters import is_tame, merged_by_peft, mutate_patterns, save_adapter
from tests.models import files_of, save_llama, tensors_of
from tests.sealing import MANIFEST, seal

#: No mutated file of a tiny model may keep a run busy for longer, on whatever machine.
SECONDS = 20.0
_ODD: list[Any] = [
    *(None, True, False, "", "x", "../../etc/passwd", "/etc/passwd", "a\\b", "\ud800", "nul\0l", "é" * 300),
    *(-1, 0, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *([], {}, [[]], [1, 2], {"a": 1}, [None], "F8_E4M3", "F32", "I64", "stack", "overlay", "residual"),
]


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(out)) if out else 0
        near = min(at, chance.choice((len(out), 200)))  # headers are where it hurts
        match chance.randrange(6):
            case 0 if out:
                out[near] = chance.randrange(256)
            case 1 if out:
                out[near] ^= 1 << chance.randrange(8)
            case 2:
                del out[at:]
            case 3:
                out[near:near] = chance.choice((b"\0", b"{", b'"', b"[" * 2000, b"-", b"9" * 30, b"\xff\xfe", b" " * 50))
            case 4:
                out[near:near] = out[at : at + chance.randrange(64)]
            case _:
                del out[near : near + chance.randrange(64)]
    return bytes(out)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """One node of a JSON value replaced, removed, doubled, or moved to another's place."""
    value = json.loads(json.dumps(value))
    paths = list(_paths(value, ()))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        *parents, key = chance.choice(paths)
        holder = value
        try:
            for parent in parents:
                holder = holder[parent]
            match chance.randrange(5):
                case 0 | 1:
                    holder[key] = chance.choice(_ODD)
                case 2:
                    del holder[key]
                case 3 if isinstance(holder, dict):
                    holder[chance.choice(("new", "", "__metadata__", str(chance.choice(_ODD))))] = holder[key]
                case _:
                    other: Any = value
                    for part in chance.choice(paths):
                        other = other[part]
                    holder[key] = json.loads(json.dumps(other))
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return value


def _paths(value: Any, path: tuple[Any, ...]) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _mutate_text(data: bytes, chance: random.Random) -> bytes:
    """JSON by its structure, one time in three by its bytes."""
    if chance.randrange(3) == 0:
        return mutate_bytes(data, chance)
    return json.dumps(mutate_json(json.loads(data), chance)).encode("utf-8", "surrogatepass")


def _mutate_manifest(data: bytes, chance: random.Random) -> bytes:
    """As any JSON, and sealed anew: else its hash alone would be tried. One time in five that is."""
    if chance.randrange(5) == 0:
        return _mutate_text(data, chance)
    value = json.loads(data)
    del value["sha256"]
    return seal(_mutate_text(json.dumps(value, indent=1).encode(), chance))


def _mutate_safetensors(data: bytes, chance: random.Random) -> bytes:
    """The header by its structure with a right length before it, or all by bytes."""
    if chance.randrange(3) == 0:
        return mutate_bytes(data, chance)
    length = int.from_bytes(data[:8], "little")
    header = _mutate_text(data[8 : 8 + length].rstrip(), chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


_ODD_NAMES = (
    *("../evil", "/abs/evil", "surgery/../../evil", "a\\..\\evil", "C:evil", "\ud800", "", ".", "..", "a//b", "./a", "x."),
    *("n\0l", "a\nb", "\x1b[2J", "a\u202eb", "\u200b", "x" * 300, "a/" * 600 + "b", "CON", "nul.txt", "config.json/x", "x "),
    *("./config.json", "/model.safetensors", "../model.safetensors", "model\n.safetensors", "model.safetensors", "é.md"),
    *(".surgery/run.json", "surgery/manifest.json", "surgery/x", "Surgery/x.py", ".git/config", "x.partial", "tokenizer.json/"),
    *("CONFIG.JSON", "👩\u200d💻.md"),
)


def _mutate_listing(entries: list[dict[str, Any]], chance: random.Random) -> list[Any]:
    """Pages of a hub's listing: entries that are changed, renamed, added, doubled, lost or moved, and pages that are none."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        entry, name = chance.choice(entries), chance.choice((*_ODD_NAMES, chance.choice(entries)["path"]))
        match chance.randrange(6):
            case 0:
                entries = [{**one, "path": name} if one is entry else one for one in entries]
            case 1:
                entries = [*entries, {**entry, "path": name}]
            case 2:
                entries = [*entries, {**entry, "size": chance.choice((0, 1, -1, 2**70, 1.5, None, 7))}]
            case 3:
                entries = [one for one in entries if one is not entry] or entries
            case 4:
                changed = {"oid": "0" * 40, "lfs": {"oid": "0" * 64, "size": entry["size"]}}
                entries = [{**one, **changed} if one is entry else one for one in entries]
            case _:
                changed = {chance.choice(("type", "size", "oid", "lfs", "path")): chance.choice(_ODD)}
                entries = [{**one, **changed} if one is entry else one for one in entries]
    pages: list[Any] = [entries]
    match chance.randrange(6):
        case 0:
            at = chance.randrange(len(entries))
            pages = [entries[:at], [], entries[at:]]
        case 1:
            pages = [mutate_json(entries, chance)]
        case 2:
            pages = [entries, mutate_bytes(json.dumps(entries).encode(), chance)]
        case 3:
            pages = [entries, chance.choice((entries, []))]
    return pages


_RECIPE = b"""
description = "x"
split = false
[[rules]]
match = ["*.q_proj.weight", "*.k_proj.weight"]
slices = ["q", "k"]
every = "group"
rank = 3
[[rules]]
regex = '.*mlp\\.(up|down)_proj\\.weight'
energy = 0.4
max_rank = 9
view = "matrix"
[[rules]]
match = "*norm*"
skip = "why"
"""


class Fuzz:
    """A tiny model, its factorized forms, and what is done with mutated copies of them.

    Attributes:
        compared: how many results of mutated files were held against what another program makes of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_llama(folder / "model", torch.bfloat16)
        self.recipe = folder / "recipe.toml"
        self.recipe.write_bytes(_RECIPE)
        self.factorized = folder / "f"
        surgery.factorize(self.model, self.factorized, rank=2, recipe="attention")
        self.half = folder / "half"
        with contextlib.suppress(KeyboardInterrupt):
            surgery.factorize(self.model, self.half, rank=2, progress=_Stop(), device="cpu")
        self.scales = self.factorized / "surgery/scales.safetensors"
        self.adapter = save_adapter(self.model, folder / "lora")
        self.compared = 0
        self.tuned = _changed(self.model, folder / "tuned")
        self.study: dict[str, Any] = {"top": 3, "include": ["*q_proj*", "*down_proj*"], "device": "cpu", "progress": Silent()}
        surgery.spectra(self.model, self.tuned, out=folder / "report", **self.study)
        self.report = (folder / "report/spectra.json").read_bytes()
        self.begun = folder / "begun"
        with contextlib.suppress(KeyboardInterrupt):
            surgery.spectra(self.model, self.tuned, out=self.begun, **{**self.study, "progress": _Stop()})
        self.kinds: dict[str, Callable[[Path, random.Random], None]] = {
            "weights": self._weights,
            "index": self._index,
            "config": self._config,
            "recipe": self._recipe,
            "manifest": self._manifest,
            "scales": self._scales,
            "factors": self._factors,
            "journal": self._journal,
            "listing": self._listing,
            "adapter config": self._adapter_config,
            "adapter weights": self._adapter_weights,
            "spectra": self._spectra,
            "measured": self._measured,
            "report": self._report,
            "recommend": self._recommend,
        }

    def one(self, kind: str, seed: int) -> bool:
        """Whether a mutation is taken as if nothing were wrong; raises what is neither that nor a SurgeryError."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        before = files_of(self.model)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", surgery.errors.SurgeryWarning)
                self.kinds[kind](work, random.Random(f"{kind} {seed}"))
            taken = True
        except SurgeryError:
            taken = False
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - start < SECONDS, f"{kind}, seed {seed}: took too long"
        assert files_of(self.model) == before, f"{kind}, seed {seed}: the source was written to"
        known = {"model", "recipe.toml", "f", "half", "lora", "work", "tuned", "report", "begun"}
        outside = {path.name for path in self.folder.iterdir()} - known
        assert not outside, f"{kind}, seed {seed}: {outside} written outside of the output"
        return taken

    def _model(self, work: Path, name: str, chance: random.Random, mutate: Callable[[bytes, random.Random], bytes]) -> Path:
        shutil.copytree(self.model, work / "m")
        (work / "m" / name).write_bytes(mutate((work / "m" / name).read_bytes(), chance))
        return work / "m"

    def _weights(self, work: Path, chance: random.Random) -> None:
        shard = chance.choice(sorted(path.name for path in self.model.glob("*.safetensors")))
        surgery.factorize(self._model(work, shard, chance, _mutate_safetensors), work / "o", rank=2, device="cpu")

    def _index(self, work: Path, chance: random.Random) -> None:
        model = self._model(work, "model.safetensors.index.json", chance, _mutate_text)
        surgery.factorize(model, work / "o", rank=2, layout="overlay", include=["*q_proj*"], device="cpu")

    def _config(self, work: Path, chance: random.Random) -> None:
        config = json.loads((self.model / "config.json").read_bytes())
        config["model_type"] = chance.choice(("llama", "phi3", "gpt_neox", "falcon", "gpt_oss"))
        config["quantization_config"] = chance.choice(({}, None, {"quant_method": "fp8", "weight_block_size": [8, 8]}))
        model = self._model(work, "config.json", chance, lambda _, __: _mutate_text(json.dumps(config).encode(), chance))
        recipe = chance.choice((None, str(self.recipe)))
        surgery.plan(model, rank=2, split=True, recipe=recipe, device="cpu")

    def _recipe(self, work: Path, chance: random.Random) -> None:
        (work / "r.toml").write_bytes(mutate_bytes(_RECIPE, chance))
        surgery.plan(self.model, recipe=work / "r.toml", device="cpu")

    def _checkpoint(
        self, work: Path, name: str, chance: random.Random, mutate: Callable[[bytes, random.Random], bytes]
    ) -> Path:
        shutil.copytree(self.factorized, work / "f")
        (work / "f" / name).write_bytes(mutate((work / "f" / name).read_bytes(), chance))
        return work / "f"

    def _use(self, factorized: Path, work: Path, scales: Path) -> None:
        with contextlib.suppress(SurgeryError):
            surgery.verify(factorized, device="cpu")
        surgery.fold(factorized, scales, work / "o", device="cpu")

    def _manifest(self, work: Path, chance: random.Random) -> None:
        folder = self._checkpoint(work, MANIFEST, chance, _mutate_manifest)
        self._use(folder, work, self.scales)

    def _scales(self, work: Path, chance: random.Random) -> None:
        (work / "s.safetensors").write_bytes(_mutate_safetensors(self.scales.read_bytes(), chance))
        surgery.fold(self.factorized, work / "s.safetensors", work / "o", device="cpu")

    def _factors(self, work: Path, chance: random.Random) -> None:
        name = chance.choice(sorted(path.name for path in (self.factorized / "surgery").glob("factors*")))
        folder = self._checkpoint(work, f"surgery/{name}", chance, _mutate_safetensors)
        self._use(folder, work, self.scales)

    def _journal(self, work: Path, chance: random.Random) -> None:
        shutil.copytree(self.half, work / "o")
        path = chance.choice(sorted((work / "o/.surgery").glob("*.json")))
        path.write_bytes(_mutate_text(path.read_bytes(), chance))
        surgery.factorize(self.model, work / "o", rank=2, device="cpu")
        assert surgery.verify(work / "o", device="cpu").ok

    def _listing(self, work: Path, chance: random.Random) -> None:
        """What comes of it gives back the weights, and no other file than the model has."""
        repo = HUB.publish("acme/fuzz", self.model)
        repo.pages = _mutate_listing(HUB.described(repo), chance)
        cache = Path(os.environ["HF_HOME"], "hub")
        shutil.rmtree(cache, ignore_errors=True)
        others = {path.name for path in cache.parent.glob("*")}  # of tests before, in the same process
        try:
            surgery.factorize(
                "acme/fuzz", work / "f", rank=2, include=["*0*q_proj*"], stream=chance.random() < 0.3, device="cpu"
            )
        finally:
            written = {path.name for path in cache.iterdir()} if cache.is_dir() else set()
            assert written <= {"models--acme--fuzz", ".locks", "CACHEDIR.TAG", "version.txt"}, written
            assert {path.name for path in cache.parent.iterdir()} <= others | {"hub", "xet"}
        surgery.fold(work / "f", work / "f/surgery/scales.safetensors", work / "o", device="cpu")
        before, after = files_of(self.model), files_of(work / "o")
        assert all(before.get(name) == data for name, data in after.items())
        assert {name for name in before if name.endswith(".safetensors")} <= after.keys()

    def _adapter_config(self, work: Path, chance: random.Random) -> None:
        folder = shutil.copytree(self.adapter, work / "a")
        text = (folder / "adapter_config.json").read_bytes()
        by_pattern = chance.randrange(2) == 0
        text = mutate_patterns(json.loads(text), chance).encode() if by_pattern else _mutate_text(text, chance)
        (folder / "adapter_config.json").write_bytes(text)
        self._fold_adapter(folder, work)

    def _adapter_weights(self, work: Path, chance: random.Random) -> None:
        folder = shutil.copytree(self.adapter, work / "a")
        path = folder / "adapter_model.safetensors"
        path.write_bytes(_mutate_safetensors(path.read_bytes(), chance))
        self._fold_adapter(folder, work)

    def _fold_adapter(self, adapter: Path, work: Path) -> None:
        """Where PEFT takes all of the adapter as well, the weights are those of its merge, rounded once."""
        surgery.fold(self.factorized, self.scales, work / "o", lora=adapter, device="cpu")
        if not is_tame(json.loads((adapter / "adapter_config.json").read_bytes())):
            return
        merged = merged_by_peft(self.model, adapter)
        if merged is None:
            return
        self.compared += 1
        for name, weight in tensors_of(work / "o").items():
            torch.testing.assert_close(
                weight.double(), merged[name], rtol=2**-8, atol=1e-6, msg=f"{name} is another than PEFT's"
            )

    def _spectra(self, work: Path, chance: random.Random) -> None:
        """Either model damaged, with any options: the figures are those of the weights that the safetensors library reads."""
        name = chance.choice([path.name for path in sorted(self.model.iterdir()) if path.suffix in (".safetensors", ".json")])
        mutate = _mutate_safetensors if name.endswith(".safetensors") else _mutate_text
        models = {"base": self.model, "tuned": self.tuned}
        which = chance.choice(("base", "tuned"))
        models[which] = work / which
        shutil.copytree(self.tuned if which == "tuned" else self.model, models[which])
        (models[which] / name).write_bytes(mutate((models[which] / name).read_bytes(), chance))
        odd = {
            "top": chance.choice((1, 2, 7, 64, 2**31, 2**63, 10**30, 0, -1)),
            "subspace": chance.choice((None, 1, 2, 16, 2**40, 0, -3)),
            "seed": chance.choice((0, 1, 2**63 - 1, 2**64, -1)),
            "tolerance": chance.choice((1e-5, 1e-3, 1e-30, 0.0, 1.0, -1.0, float("nan"), float("inf"))),
        }
        options = {**self.study, **dict(chance.sample(sorted(odd.items()), chance.choice((0, 0, 1, 2))))}
        out = work / "o" if chance.randrange(4) == 0 else None
        tuned = models["tuned"] if chance.randrange(4) else None
        try:
            report = surgery.spectra(models["base"], tuned, out=out, **options)
        except SurgeryError:
            assert out is None or not (out / "spectra.json").exists(), "a report is there all the same"
            raise
        for target in report.targets:
            _check_values(target, models["base"])
            if tuned is not None:
                _check_values({**target, **target["tuned"]}, tuned)
        if out is not None:
            assert {path.name for path in out.iterdir()} == {"spectra.json", "spectra.csv", "index.html"}
            assert json.loads((out / "spectra.json").read_text()) == json.loads(json.dumps(report.as_json()))

    def _measured(self, work: Path, chance: random.Random) -> None:
        """What an unfinished study has left is damaged: the same command refuses, or gives what an undisturbed one does."""
        shutil.copytree(self.begun, work / "o")
        path = chance.choice(sorted((work / "o/.surgery").glob("*.json")))
        path.write_bytes(_mutate_text(path.read_bytes(), chance))
        surgery.spectra(self.model, self.tuned, out=work / "o", **self.study)
        assert (work / "o/spectra.json").read_bytes() == self.report
        assert not (work / "o/.surgery").exists()

    def _report(self, work: Path, chance: random.Random) -> None:
        """The numbers of a report damaged, with hostile names in it: the page is inert, and the table has every matrix."""
        try:
            found = json.loads(_mutate_text(self.report, chance))
        except (ValueError, RecursionError):
            raise FormatError("no JSON") from None
        if isinstance(found, dict) and chance.randrange(2):
            found = _renamed(found, chance)
        if chance.randrange(2):
            found = _resized(json.loads(self.report), chance)
        write_csv(found, work / "o" / "spectra.csv")
        with open(work / "o" / "spectra.csv", newline="", encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) == len(found["targets"])
        write_page(found, work / "o" / "index.html")
        _check_inert((work / "o" / "index.html").read_text("utf-8"))

    def _recommend(self, work: Path, chance: random.Random) -> None:
        """Any weights, names and budgets: the ranks keep the most, by another way of finding them, and factorize takes them."""
        weights = _any_weights(chance)
        (work / "m").mkdir()
        save_file(weights, work / "m/model.safetensors")
        (work / "m/config.json").write_text("{}")
        budget = chance.choice((1, 2, 3, 5, 8, 13, 40, 90, 300, 1000, 10**4, 10**5, 2**31, 2**63, 10**30, 0, -1))
        most = chance.choice((1, 2, 3, 4, 5, 256, 256, 2**31, 2**63, 0, -1))
        unit = chance.choice(("numbers", "numbers", "bytes"))
        names = [_literal(name) for name in weights]
        options: dict[str, Any] = {"include": names, "device": "cpu", "progress": Silent()}
        try:
            found = surgery.recommend(work / "m", budget=budget, unit=unit, max_rank=most, out=work / "o" / "r.toml", **options)
        except SurgeryError:
            assert not (work / "o").exists(), "something is left"
            raise
        assert [path.name for path in (work / "o").iterdir()] == ["r.toml"]
        planned = surgery.plan(work / "m", rank=1, include=names, device="cpu").targets
        assert found.ranks.keys() == {target.tensor for target in planned}
        matrices = {target.tensor: target.view.matrices(weights[target.tensor]) for target in planned}
        _check_ranks(matrices, found, budget, unit, most)
        plan = surgery.plan(work / "m", recipe=work / "o/r.toml", device="cpu")
        assert {target.tensor: target.rank for target in plan.targets} == {k: rank for k, rank in found.ranks.items() if rank}


def _changed(model: Path, folder: Path) -> Path:
    """A model that has been trained a little."""
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(1)
    for path in sorted(folder.glob("*.safetensors")):
        weights = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if tensor.ndim == 2
            else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def _check_values(target: Mapping[str, Any], model: Path) -> None:
    """The singular values that are told of a matrix are those of the weights in a file of the model, by LAPACK in float64."""
    for path in model.glob("*.safetensors"):
        try:
            weights = load_file(path)
        except Exception:  # which file the model's index leads to is another matter
            continue
        if target["tensor"] in weights:
            matrix = weights[target["tensor"]].double()
            matrix = matrix if target["matrix"] is None else matrix[target["matrix"]]
            true = torch.linalg.svdvals(matrix)[: len(target["singular_values"])]
            told = torch.tensor(target["singular_values"], dtype=torch.float64)
            close = (told - true).abs().max() <= 1e-4 * true.max()
            if bool(close) or not target["converged"]:
                return
    raise AssertionError(f"{target['key']}: no weights of {model.name} have the values that are told")


#: What would do something in a page or a spreadsheet if it were not taken for text.
_HOSTILE = (
    "</script><script>boom()</script>",
    "<img src=x onerror=boom()>",
    '" onmouseover="boom()',
    "' style='x",
    "]]><svg onload=boom()>",
    "<!--",
    "-->",
    "data:text/html,<script>boom()</script>",
    "<a href='javascript:boom()'>x</a>",
    "</title></svg><iframe src=//boom>",
    "=boom()",
    "&lt;b&gt;&#60;",
    "{{boom}}${boom}$x^2_{$",
    "\u202e\n\0\ud800",
)


def _renamed(found: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Some of its texts are hostile ones."""

    def other(value: Any) -> Any:
        if isinstance(value, str) and chance.randrange(3) == 0:
            return value + chance.choice(_HOSTILE)
        if isinstance(value, dict):
            return {key: other(item) for key, item in value.items()}
        return [other(item) for item in value] if isinstance(value, list) else value

    return {key: other(value) for key, value in found.items()}


def _resized(found: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Some of its numbers are others: a little, or as far as numbers go."""
    numbers = [path for path in _paths(found, ()) if isinstance(_at(found, path), int | float)]
    for *parents, key in chance.sample(numbers, chance.choice((1, 3, len(numbers) // 4))):
        factor = chance.choice((0, -1, 1e-300, 1e-30, 0.5, 0.999999, 1.000001, 2, 1e3, 1e30, 1e60, 1e99))
        _at(found, parents)[key] *= factor
    return found


def _at(value: Any, path: Any) -> Any:
    for part in path:
        value = value[part]
    return value


class _Inert(HTMLParser):
    """Counts scripts, and refuses what comes from elsewhere or runs by itself."""

    scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        assert tag not in ("iframe", "object", "embed", "base", "img", "link", "form"), tag
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "srcdoc", "data"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, name, value)


def _check_inert(page: str) -> None:
    parser = _Inert()
    parser.feed(page)
    parser.close()
    assert parser.scripts == 1, f"{parser.scripts} scripts"
    assert "nan" not in re.findall(r' d="([^"]*)"', page), "a line that leads nowhere"


def _any_weights(chance: random.Random) -> dict[str, torch.Tensor]:
    """A few matrices and stacks, of any size of numbers, under any names."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    odd = (
        "q*",
        "[a]",
        "a?b",
        "é",
        '"',
        "'",
        "\\",
        "\n",
        "]]]",
        "#",
        "a b",
        "x" * 300,
        "9" * 5000,
        "\u202e",
        "=1+1",
        "<b>",
        "1",
    )
    weights = {}
    for i in range(chance.choice((1, 2, 3, 4))):
        shape = [chance.choice((1, 2, 3, 5, 8)), chance.choice((1, 2, 4, 7))]
        if chance.randrange(5) == 0:
            shape.insert(0, chance.choice((1, 2, 3)))
        size = chance.choice((0.0, 1e-44, 1e-30, 1e-3, *[1.0] * 9, 1e4, 1e10, 1e30, 1e37, float("inf"), float("nan")))
        dtype = chance.choice((torch.float32, torch.bfloat16, torch.float16))
        matrix = torch.randn(shape, generator=generator)
        name = f"model.layers.{i}.{chance.choice(odd)}.weight"
        weights[name] = (matrix * size if i or size == size else matrix).to(dtype)
    return weights


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _check_ranks(
    matrices: Mapping[str, torch.Tensor], found: surgery.Recommendation, budget: int, unit: str, most: int
) -> None:
    """Against float64 LAPACK, and every way to spend a budget that is small."""
    gains, costs, total = {}, {}, 0.0
    for name, stack in matrices.items():
        B, m, n = stack.shape
        squares = torch.linalg.svdvals(stack.double()).square().sum(dim=0)
        gains[name], total = squares[:most].tolist(), total + squares.sum().item()
        costs[name] = B * (1 if unit == "numbers" else 4 * (m + n + 1))
        assert 0 <= found.ranks[name] <= min(m, n, most)
    spent = sum(costs[name] * rank for name, rank in found.ranks.items())
    assert found.spent == spent <= budget
    kept = sum(sum(gains[name][:rank]) for name, rank in found.ranks.items())
    # Below the normal numbers of float32 a singular value has a few bits.
    subnormal = max(stack.abs().max().item() for stack in matrices.values()) < torch.finfo(torch.float32).tiny
    near = 0.1 if subnormal else 1e-4
    assert found.kept <= 1 + 1e-9
    assert abs(kept / total - found.kept) <= near
    ways = [range(len(gains[name]) + 1) for name in matrices]
    if math.prod(map(len, ways)) <= 5000:
        best = max(
            sum(sum(gains[name][:rank]) for name, rank in zip(matrices, ranks, strict=True))
            for ranks in itertools.product(*ways)
            if sum(costs[name] * rank for name, rank in zip(matrices, ranks, strict=True)) <= budget
        )
        assert kept >= best - near * total, f"{kept / total} kept, {best / total} can be"


class _Stop(Silent):
    """Interrupts a run in its third shard."""

    def item(self, name: str) -> None:
        if name == "model.layers.1.mlp.down_proj.weight":
            raise KeyboardInterrupt


def main(seed: int, count: int, kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        for kind in kinds or fuzz.kinds:
            start, taken, failures, fuzz.compared = time.perf_counter(), 0, [], 0
            for i in range(count):
                try:
                    taken += fuzz.one(kind, seed + i)
                except AssertionError as error:
                    failures.append(str(error))
            print(
                f"{kind}: {count} mutations, {taken} taken, {fuzz.compared} compared, {time.perf_counter() - start:.1f} s",
                flush=True,
            )
            print("\n".join(failures[:20]), end="\n" if failures else "", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
