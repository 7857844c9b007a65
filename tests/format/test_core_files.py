"""Files of cores as trainings, other programs and nobody in their senses leave them: what is taken, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import ScalesError, SurgeryError, SurgeryWarning
from surgery.format.manifest import Manifest
from surgery.format.scales.reading import read_scales, read_scales_alone, read_trained
from surgery.format.scales.writing import write_scales
from tests.models import files_of

Tensors = dict[str, torch.Tensor]
RANK = 4


@pytest.fixture(scope="module")
def manifest(factorized: Path) -> Manifest:
    return Manifest.read(factorized)


@pytest.fixture(scope="module")
def cores(manifest: Manifest) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        target.key: torch.eye(RANK) + 0.3 * torch.randn(target.shape_of("core"), generator=generator)
        for target in manifest.targets
    }


@pytest.fixture(scope="module")
def folded(factorized: Path, cores: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the cores give as tensors. Read-only."""
    out = tmp_path_factory.mktemp("folded") / "out"
    surgery.fold(factorized, cores, out)
    return files_of(out)


def _save(path: Path, tensors: Tensors, owner: Any) -> Path:
    """By the safetensors library; ``owner`` is the JSON of the metadata, None for none."""
    save_file(tensors, path, metadata=None if owner is None else {"surgery": json.dumps(owner)})
    return path


def _owner(manifest: Manifest, **more: Any) -> dict[str, Any]:
    return {"format_version": 1, "fingerprint": manifest.fingerprint, "train": "core", **more}


def _commands(factorized: Path, path: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: surgery.fold(factorized, path, out / "folded")
    yield lambda: surgery.export(factorized, path, out / "adapter")
    yield lambda: read_trained(path, Manifest.read(factorized))


def _refused(factorized: Path, path: Path, said: str, tmp_path: Path) -> None:
    for command in _commands(factorized, path, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SurgeryWarning)
            with pytest.raises(ScalesError, match=said):
                command()
    assert not (tmp_path / "folded").exists()
    assert not (tmp_path / "adapter").exists()


# -- what is taken -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["full", "without train", "without metadata", "only train"])
def test_cores_with_and_without_what_says_so(
    owner: str, factorized: Path, manifest: Manifest, cores: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    """Where the metadata has no fingerprint, names and shapes tell; a file with one and without ``train`` has scales."""
    said = {
        "full": _owner(manifest),
        "without train": _owner(manifest),
        "without metadata": None,
        "only train": {"train": "core"},
    }
    if owner == "without train":
        said[owner].pop("train")  # type: ignore[union-attr]
    path = _save(tmp_path / "c", cores, said[owner])
    if owner == "without train":
        _refused(factorized, path, "has the wrong shape: that of its core, where its metadata says scales", tmp_path)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        surgery.fold(factorized, path, tmp_path / "o")
    assert files_of(tmp_path / "o") == folded
    expected = [] if owner == "full" else ["does not say which factors it belongs to"]
    assert ["does not say which factors it belongs to" for _ in caught] == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda core: core[None], r"is of shape \[1, 4, 4\], and is taken for \[4, 4\]"),
        (lambda core: core[:, None, :, None], r"is taken for \[4, 4\]"),
        (torch.Tensor.double, None),
        (lambda core: core.double() + 1e-9, r"224 of 224 numbers are rounded from F64"),
        (torch.Tensor.half, r"holds F16 numbers"),
        (torch.Tensor.bfloat16, r"holds BF16 numbers"),
    ],
)
def test_other_shapes_and_dtypes(change: Any, said: str | None, manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    changed = {key: change(value).contiguous() for key, value in cores.items()}
    path = _save(tmp_path / "c", changed, _owner(manifest))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_scales(path, manifest)
    for key, value in found.items():
        assert value.numpy().tolist() == changed[key].double().numpy().astype(np.float32).reshape(RANK, RANK).tolist()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])


def test_names_that_carry_something_with_what_is_kept_beside(
    factorized: Path, manifest: Manifest, cores: Tensors, folded: dict[str, bytes], tmp_path: Path
) -> None:
    beside = {
        "chosen": {key: torch.tensor([1, 0, 1, 1], dtype=torch.uint8) for key in cores},
        "orthogonal": {key: torch.arange(14.0) for key in cores},
    }
    tensors = {f"module.{key}": value for key, value in cores.items()}
    for kind, values in beside.items():
        tensors |= {f"module.{key}.{kind}": value for key, value in values.items()}
    path = _save(tmp_path / "c", tensors, _owner(manifest, beside=["chosen", "orthogonal"]))
    with pytest.warns(SurgeryWarning, match="correspond to them one to one") as caught:
        found = read_trained(path, manifest)
    assert len(caught) == 1
    assert found.train == "core"
    assert {kind: values.keys() for kind, values in found.beside.items()} == dict.fromkeys(beside, cores.keys())
    assert all(torch.equal(found.beside[kind][key], beside[kind][key]) for kind in beside for key in cores)
    with pytest.warns(SurgeryWarning, match="correspond to them one to one"):
        surgery.fold(factorized, path, tmp_path / "o")
    assert files_of(tmp_path / "o") == folded
    alone = read_scales_alone(path)
    assert alone.values.keys() == {f"module.{key}" for key in cores}
    assert alone.beside["orthogonal"].keys() == alone.values.keys()


def test_what_is_kept_is_written_and_read(manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    """For some targets or for all; and by safetensors it is what was given."""
    some = dict.fromkeys(list(cores)[:3], torch.tensor([0, 1, 1, 0], dtype=torch.uint8))
    write_scales(tmp_path / "c", cores, manifest.fingerprint, "core", {"chosen": some})
    found = read_trained(tmp_path / "c", manifest)
    assert found.beside["chosen"].keys() == some.keys()
    assert load_file(tmp_path / "c").keys() == cores.keys() | {f"{key}.chosen" for key in some}
    with pytest.raises(ScalesError, match="is the name of scales, and of other tensors that are saved with scales"):
        write_scales(
            tmp_path / "d", {"a": torch.ones(2), "a.chosen": torch.ones(2)}, None, "scales", {"chosen": {"a": some[min(some)]}}
        )
    assert not (tmp_path / "d").exists()


def test_a_target_that_is_called_as_what_is_kept_beside_another(tmp_path: Path) -> None:
    """With the checkpoint known it is what it is: the scales of a target."""
    (tmp_path / "m").mkdir()
    save_file({name: torch.randn(8, 8) for name in ("layers.0.a", "layers.0.a.chosen")}, tmp_path / "m/model.safetensors")
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=2, include=["*"]).manifest
    values = {"layers.0.a": torch.full((2,), 2.0), "layers.0.a.chosen": torch.full((2,), 3.0)}
    path = _save(tmp_path / "s", values, {"format_version": 1, "fingerprint": manifest.fingerprint, "beside": ["chosen"]})
    assert {key: value.tolist() for key, value in read_scales(path, manifest).items()} == {
        "layers.0.a": [2, 2],
        "layers.0.a.chosen": [3, 3],
    }


@pytest.mark.parametrize("train", ["scales", "core"])
def test_rank_one(train: Any, tmp_path: Path) -> None:
    """Scales and cores are the same number, in whatever shape."""
    (tmp_path / "m").mkdir()
    save_file({"layers.0.q": torch.randn(6, 5), "layers.0.experts": torch.randn(3, 6, 5)}, tmp_path / "m/model.safetensors")
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=1, train=train, include=["*"]).manifest
    assert surgery.inspect(tmp_path / "f").train == train
    flat = {"layers.0.q": torch.tensor([2.0]), "layers.0.experts": torch.tensor([1.0, 3.0, 0.5])}
    surgery.fold(tmp_path / "f", flat, tmp_path / "0", progress=surgery.Silent())
    for i, shapes in enumerate([((1,), (3, 1)), ((1, 1), (3, 1, 1)), ((), (3,)), ((1, 1, 1), (1, 3))], 1):
        values = {key: value.reshape(shape) for (key, value), shape in zip(flat.items(), shapes, strict=True)}
        said: Any = {"format_version": 1, "fingerprint": manifest.fingerprint} | ({"train": "core"} if train == "core" else {})
        path = _save(tmp_path / f"c{i}", values, said)
        surgery.fold(tmp_path / "f", path, tmp_path / str(i), progress=surgery.Silent())
        assert files_of(tmp_path / str(i)) == files_of(tmp_path / "0")


def test_cores_of_all_directions_are_no_weights(tmp_path: Path) -> None:
    """Of a square weight they have its name and its shape; the weights of the other one are still known as such."""
    (tmp_path / "m").mkdir()
    weights = {"layers.0.q": torch.randn(6, 6), "layers.0.up": torch.randn(8, 6)}
    save_file(weights, tmp_path / "m/model.safetensors")
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=6, include=["*"]).manifest
    cores = {key: torch.eye(6) + 0.1 * torch.randn(6, 6) for key in weights}
    for name, owner in (("a", _owner(manifest)), ("b", None)):
        path = _save(tmp_path / name, cores, owner)
        with pytest.warns(SurgeryWarning, match="does not say which") if owner is None else contextlib.nullcontext():
            found = read_scales(path, manifest)
        assert all(torch.equal(value, cores[key]) for key, value in found.items())
    with pytest.raises(ScalesError, match="holds the weights of a model"):
        read_scales(tmp_path / "m/model.safetensors", manifest)


def test_a_file_alone_that_does_not_say_what_it_holds(cores: Tensors, tmp_path: Path) -> None:
    """Square matrices may be either, and the note says for what they are taken; of stacks cores are known."""
    square = _save(tmp_path / "square", cores, None)
    with pytest.warns(SurgeryWarning, match="its square matrices are taken for the scales of stacks"):
        assert read_scales_alone(square).train == "scales"
    stacks = _save(tmp_path / "stacks", {**cores, "experts": torch.stack([torch.eye(RANK)] * 3)}, None)
    assert read_scales_alone(stacks).train == "core"
    plain = _save(tmp_path / "plain", {"a": torch.ones(4), "b": torch.ones(3, 3)}, None)
    assert read_scales_alone(plain).train == "scales"


KEPT = sorted(Path(__file__).parents[1].glob("kept/*/surgery/scales.safetensors"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.parts[-3])
def test_files_of_scales_are_what_they_have_always_been(kept: Path, tmp_path: Path) -> None:
    """Byte for byte, untouched and after they have been read."""
    surgery.new_scales(kept.parents[1], tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == kept.read_bytes()
    found = surgery.read_scales(kept)
    surgery.write_scales(tmp_path / "again", found.values, found.fingerprint)
    assert (tmp_path / "again").read_bytes() == kept.read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("many", ["scales", "cores"])
def test_half_scales_and_half_cores(
    owned: bool, many: str, factorized: Path, manifest: Manifest, cores: Tensors, tmp_path: Path
) -> None:
    share = 3 if many == "cores" else 11
    mixed = {key: value.diagonal().clone() if i < share else value for i, (key, value) in enumerate(cores.items())}
    path = _save(tmp_path / "c", mixed, _owner(manifest) if owned else None)
    others = "its metadata says cores" if owned else f"others have {many}"
    found = "scales" if owned or many == "cores" else "core"
    _refused(factorized, path, f"has the wrong shape: that of its {found}, where {others}", tmp_path)
    tensors: dict[str, torch.Tensor] = mixed
    with pytest.raises(ScalesError, match=f"where others have {many}"):
        surgery.fold(factorized, tensors, tmp_path / "o")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda core: core[:3], "has the wrong shape"),
        (lambda core: core[:3, :3].clone(), "has the wrong shape"),
        (lambda core: core.flatten(), "has the wrong shape"),
        (lambda core: torch.stack([core, core]), "has the wrong shape"),
        (lambda core: core[:0], "has the wrong shape"),
        (lambda core: core.to(torch.int32), "has a dtype that scales cannot have"),
        (lambda core: core * torch.tensor(float("nan")), "holds NaN or infinity"),
        (lambda core: core / 0, "holds NaN or infinity"),
        (lambda core: core.double() * 1e300, "beyond the range of float32"),
    ],
)
def test_a_core_that_is_none(
    change: Any, said: str, factorized: Path, manifest: Manifest, cores: Tensors, tmp_path: Path
) -> None:
    spoiled = cores | {(last := max(cores)): change(cores[last]).contiguous()}
    _refused(factorized, _save(tmp_path / "c", spoiled, _owner(manifest)), said, tmp_path)


@pytest.mark.parametrize("train", ["cores", "CORE", "butterfly", "", 1, True, [], ["core"], {"core": 1}])
def test_a_kind_that_is_not_known(train: Any, factorized: Path, manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    path = _save(tmp_path / "c", cores, _owner(manifest, train=train))
    _refused(factorized, path, "holds something that this version does not know", tmp_path)
    for command in (lambda: surgery.show_scales(path), lambda: surgery.blend([path], tmp_path / "mean")):
        with pytest.raises(ScalesError, match="holds something that this version does not know"):
            command()


@pytest.mark.parametrize("beside", ["chosen", {"chosen": 1}, 7, None, [["chosen"]], ["more"]])
def test_what_is_beside_and_is_not_said(beside: Any, manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    """Whatever the list is, a tensor that it does not name is one too many; and without one the list does no harm."""
    assert read_scales(_save(tmp_path / "c", cores, _owner(manifest, beside=beside)), manifest).keys() == cores.keys()
    for extra in ({f"{max(cores)}.chosen": torch.ones(4, dtype=torch.uint8)}, {f"{max(cores)}.more": torch.ones(4)}):
        path = _save(tmp_path / "c", cores | extra, _owner(manifest, beside=beside))
        with pytest.raises(
            ScalesError, match=r"(?s)has a dtype that scales cannot have.*if the metadata lists them|is no target"
        ):
            read_scales(path, manifest)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("chosen", torch.ones(3, dtype=torch.uint8), "does not fit what it belongs to"),
        ("chosen", torch.ones(4, 4, dtype=torch.uint8), "does not fit what it belongs to"),
        ("chosen", torch.full((4,), 2, dtype=torch.uint8), "is no choice of directions"),
        ("chosen", torch.ones(4), "has a dtype that it cannot have"),
        ("chosen", torch.ones(4, dtype=torch.bool), "has a dtype that it cannot have"),
        ("orthogonal", torch.zeros(13), "does not fit what it belongs to"),
        ("orthogonal", torch.zeros(1, 14), "does not fit what it belongs to"),
        ("orthogonal", torch.zeros(14, dtype=torch.float64), "has a dtype that it cannot have"),
        ("orthogonal", torch.full((14,), float("nan")), "holds NaN or infinity"),
    ],
)
def test_what_is_kept_beside_and_is_damaged(
    kind: str, value: torch.Tensor, said: str, factorized: Path, manifest: Manifest, cores: Tensors, tmp_path: Path
) -> None:
    path = _save(tmp_path / "c", {**cores, f"{max(cores)}.{kind}": value}, _owner(manifest, beside=[kind]))
    _refused(factorized, path, said, tmp_path)
    with pytest.raises(ScalesError, match=said):
        surgery.show_scales(path)


def test_what_is_kept_beside_nothing(manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    path = _save(
        tmp_path / "c", {**cores, "other.chosen": torch.ones(4, dtype=torch.uint8)}, _owner(manifest, beside=["chosen"])
    )
    with pytest.raises(ScalesError, match=r"'other\.chosen' belongs to none of the scales"):
        read_scales(path, manifest)
    scales = {key: torch.ones(4) for key in cores}
    owner = {"format_version": 1, "fingerprint": manifest.fingerprint, "beside": ["orthogonal"]}
    path = _save(tmp_path / "s", {**scales, f"{max(cores)}.orthogonal": torch.zeros(14)}, owner)
    with pytest.raises(ScalesError, match="only cores can be orthogonal"):
        read_scales(path, manifest)


@pytest.mark.parametrize(
    "shape", [(), (4,), (1,), (3, 4), (4, 3), (2, 3, 4), (1, 1, 1, 3), (2, 1, 1, 1), (0, 0), (2, 2, 2, 2), (1, 2, 2, 2, 2)]
)
def test_alone_a_shape_that_a_core_cannot_have(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = _save(tmp_path / "c", {"a": torch.ones(shape)}, {"train": "core"})
    for command in (lambda: surgery.show_scales(path), lambda: surgery.blend([path], tmp_path / "mean")):
        with pytest.raises(ScalesError, match="'a' has a shape that a core cannot have"):
            command()


@pytest.mark.parametrize(
    ("shape", "taken"), [((3, 3), (3, 3)), ((1, 3, 3), (1, 3, 3)), ((1, 1, 3, 3), (3, 3)), ((1, 1, 1, 1), (1, 1))]
)
def test_alone_a_shape_that_it_can_have(shape: tuple[int, ...], taken: tuple[int, ...], tmp_path: Path) -> None:
    path = _save(tmp_path / "c", {"a": torch.ones(shape)}, {"train": "core"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        assert read_scales_alone(path).values["a"].shape == taken


def test_changes_of_cores_are_told_from_cores(manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    path = _save(tmp_path / "c", {key: 0.1 * (core - torch.eye(RANK)) for key, core in cores.items()}, _owner(manifest))
    for command in (lambda: read_scales(path, manifest), lambda: surgery.show_scales(path)):
        with pytest.warns(SurgeryWarning, match="they look like changes C - I, and not like C, which is I"):
            command()


def test_any_metadata_at_all(manifest: Manifest, cores: Tensors, tmp_path: Path) -> None:
    """The cores, or an error of ours; nothing else comes out."""
    odd: list[Any] = [None, 0, "", [], {}, "core", ["core"], {"core": []}, 1e308, "\ud800"]
    reads: list[Callable[[Path], Any]] = [lambda path: read_trained(path, manifest), read_scales_alone]
    taken = 0
    for train, beside, read in itertools.product(odd, odd, reads):
        for more in ({}, {"fingerprint": train}, {"format_version": beside}):
            path = _save(tmp_path / "c", cores, {**_owner(manifest, train=train, beside=beside), **more})
            with warnings.catch_warnings(), contextlib.suppress(SurgeryError):
                warnings.simplefilter("ignore", SurgeryWarning)
                values = read(path).values
                taken += 1
                assert all(torch.equal(values[key], core) for key, core in cores.items())
    assert taken
