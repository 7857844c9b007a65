"""Mutates every kind of file that surgery reads, and sees to it that nothing worse than a SurgeryError comes of it.

    python -m tests.fuzz SEED COUNT [KIND]        from that seed on, COUNT mutations of each kind, or of one

Each mutation has a seed of its own, which a failure names: ``python -m tests.fuzz SEED 1`` repeats it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.errors import SurgeryError
from surgery.progress import Silent
from tests.adapters import is_tame, merged_by_peft, mutate_patterns, save_adapter
from tests.conftest import HUB
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
        outside = {path.name for path in self.folder.iterdir()} - {"model", "recipe.toml", "f", "half", "lora", "work"}
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
        try:
            surgery.factorize(
                "acme/fuzz", work / "f", rank=2, include=["*0*q_proj*"], stream=chance.random() < 0.3, device="cpu"
            )
        finally:
            written = {path.name for path in cache.iterdir()} if cache.is_dir() else set()
            assert written <= {"models--acme--fuzz", ".locks", "CACHEDIR.TAG", "version.txt"}, written
            assert {path.name for path in cache.parent.iterdir()} <= {"hub", "xet"}
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


class _Stop(Silent):
    """Interrupts a run in its third shard."""

    def item(self, name: str) -> None:
        if name == "model.layers.1.mlp.down_proj.weight":
            raise KeyboardInterrupt


def main(seed: int, count: int, only: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        for kind in [only] if only else fuzz.kinds:
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
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
