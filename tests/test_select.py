"""Which files of a model are taken: by name alone."""

from __future__ import annotations

import json

import pytest

from surgery.errors import FormatError, SourceError
from surgery.source.select import Selection, select_files


def _select(*names: str, index: object = None) -> Selection:
    return select_files(list(names), lambda _: index if isinstance(index, str) else json.dumps(index), where="m")


def test_single_file() -> None:
    found = _select("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json", ".gitattributes")
    assert found.shards == ("model.safetensors",)
    assert found.index is None
    assert found.others == (".gitattributes", "1_Pooling/config.json", "config.json", "tokenizer.json")
    assert found.left_out == {}


def test_sharded_with_index() -> None:
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    found = _select(
        "model-1.safetensors", "model-2.safetensors", "other.safetensors", "model.safetensors.index.json", index=index
    )
    assert found.shards == ("model-1.safetensors", "model-2.safetensors")
    assert found.index == "model.safetensors.index.json"
    assert found.others == ("model.safetensors.index.json",)
    assert list(found.left_out) == ["other.safetensors"]


def test_single_file_wins_over_an_index_as_in_transformers() -> None:
    found = _select(
        "model.safetensors", "model-1.safetensors", "model.safetensors.index.json", index={"weight_map": {"a": "gone"}}
    )
    assert found.shards == ("model.safetensors",)
    assert sorted(found.left_out) == ["model-1.safetensors", "model.safetensors.index.json"]


def test_diffusers_and_variant_names() -> None:
    assert _select("diffusion_pytorch_model.safetensors").shards == ("diffusion_pytorch_model.safetensors",)
    found = _select(
        "model.fp16-1.safetensors", "model.fp16.safetensors.index.json", index={"weight_map": {"a": "model.fp16-1.safetensors"}}
    )
    assert found.shards == ("model.fp16-1.safetensors",)


def test_what_stays_behind() -> None:
    found = _select(
        "model.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        ".git/config",
        "original/consolidated.safetensors",
        "onnx/model.onnx",
    )
    assert set(found.left_out) == {
        "pytorch_model.bin",
        "model.gguf",
        ".git/config",
        "original/consolidated.safetensors",
        "onnx/model.onnx",
    }
    assert found.others == ()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("nonsense", "not valid JSON"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": {"a": "missing.safetensors"}}, "names a shard that is not there"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "leaves its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "leaves its folder"),
        ({"weight_map": {"a": "C:\\x.safetensors"}}, "leaves its folder"),
        ({"weight_map": {"a": ""}}, "leaves its folder"),
        ({"weight_map": {"a": "."}}, "leaves its folder"),
        ({"weight_map": {"a": "sub/model-1.safetensors"}}, "not there"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_index(index: object, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        _select("model-1.safetensors", "model.safetensors.index.json", index=index)
    assert "m/model.safetensors.index.json" in str(caught.value)


def test_nothing_usable() -> None:
    with pytest.raises(SourceError, match="no safetensors weights"):
        _select("config.json")
    with pytest.raises(SourceError, match="pickle checkpoint, which is never opened") as caught:
        _select("config.json", "pytorch_model.bin")
    assert "save_pretrained" in str(caught.value)
    with pytest.raises(SourceError, match="no safetensors weights"):
        _select("adapter_model.safetensors", "adapter_config.json")


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/cron.d/x", "a/../../b", "C:\\x", "a\0b", ""])
def test_names_that_leave_the_folder(name: str) -> None:
    """As a hub may list them: what they name would be written there."""
    with pytest.raises(FormatError, match="leaves its folder"):
        select_files(["model.safetensors", name], lambda _: "", where="m")
