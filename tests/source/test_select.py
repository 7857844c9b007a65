"""Which files of a model are taken: by their names, and by what its configs and code name."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import transformers

from surgery.errors import FormatError, SourceError
from surgery.source.file_names import is_read_by_loaders
from surgery.source.model_folder import listing_of
from surgery.source.select import Selection, select_files
from surgery.source.weight_files import is_index


def _select(*names: str, index: object = None, **texts: object) -> Selection:
    """Of files by these names. ``texts``: what is in some of them, a dot in their name as two underscores."""
    contents = {name.replace("__", "."): text for name, text in texts.items()}

    def read_text(name: str) -> str:
        text = contents.get(name, index if is_index(name) else {})
        return text if isinstance(text, str) else json.dumps(text)

    return select_files(listing_of(names), read_text, where="m")


def _numbered(*numbers: int, of: int, stem: str = "model", suffix: str = "") -> list[str]:
    return [f"{stem}-{number:05d}-of-{of:05d}{suffix}.safetensors" for number in numbers]


def _index(*files: str) -> dict[str, object]:
    return {"metadata": {}, "weight_map": {f"t{i}": file for i, file in enumerate(files)}}


def test_single_file() -> None:
    found = _select("config.json", "model.safetensors", "tokenizer.json", ".gitattributes")
    assert found.shards == ("model.safetensors",)
    assert found.index is None
    assert found.others == ("config.json", "tokenizer.json")
    assert found.left_out == {".gitattributes": "hidden"}


def test_sharded_with_index() -> None:
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    found = _select(
        "model-1.safetensors", "model-2.safetensors", "other.safetensors", "model.safetensors.index.json", index=index
    )
    assert found.shards == ("model-1.safetensors", "model-2.safetensors")
    assert found.index == "model.safetensors.index.json"
    assert found.others == ("model.safetensors.index.json",)
    assert list(found.left_out) == ["other.safetensors"]
    assert found.notes == ("weight files that lie there and are not read: other.safetensors",)


def test_single_file_wins_over_an_index_as_in_transformers() -> None:
    found = _select(
        "model.safetensors", "model-1.safetensors", "model.safetensors.index.json", index={"weight_map": {"a": "gone"}}
    )
    assert found.shards == ("model.safetensors",)
    assert sorted(found.left_out) == ["model-1.safetensors", "model.safetensors.index.json"]
    assert "model-1.safetensors" in found.notes[0]


def test_the_weights_that_the_config_names_come_first_as_in_transformers() -> None:
    names = ["config.json", "model.safetensors", "ema.safetensors"]
    found = _select(*names, config__json={"transformers_weights": "ema.safetensors"})
    assert found.shards == ("ema.safetensors",)
    assert _select(*names, config__json={"transformers_weights": "gone.safetensors"}).shards == ("model.safetensors",)


def test_diffusers_and_variant_names() -> None:
    assert _select("diffusion_pytorch_model.safetensors").shards == ("diffusion_pytorch_model.safetensors",)
    for index in ("model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"):
        found = _select("model.fp16-1.safetensors", index, index=_index("model.fp16-1.safetensors"))
        assert (found.shards, found.index) == (("model.fp16-1.safetensors",), index)
        assert found.others == (index,)
    for suffix in ("", ".fp16"):
        names = _numbered(1, 2, of=2, stem="diffusion_pytorch_model", suffix=suffix)
        assert _select(*names).shards == tuple(names)


def test_a_variant_beside_the_plain_weights_is_told() -> None:
    variant = _numbered(1, 2, of=2, stem="model.fp16")
    for plain, index in ((["model.safetensors"], []), (_numbered(1, 2, of=2), ["model.safetensors.index.json"])):
        found = _select(*plain, *index, *variant, "model.safetensors.index.fp16.json", index=_index(*plain))
        assert found.shards == tuple(plain)
        assert {found.left_out[name] for name in variant} == {"a variant of the weights"}
        assert variant[0] in found.notes[0]
        assert "model.safetensors.index.fp16.json" in found.left_out


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (_numbered(1, 3, of=3), "model-00002-of-00003"),
        (_numbered(2, of=2), "model-00001-of-00002"),
        (_numbered(1, of=2), "model-00002-of-00002"),
        (_numbered(0, 2, of=3), "model-00001-of-00003"),
        (_numbered(1, 3, of=3, stem="model.fp16"), "model.fp16-00002-of-00003"),
        (_numbered(1, 3, of=3, stem="diffusion_pytorch_model", suffix=".fp16"), "diffusion_pytorch_model-00002-of-00003.fp16"),
        (_numbered(1, 3, of=3, stem="pytorch_model"), "pytorch_model-00002-of-00003"),
        (_numbered(1, 3, of=3, stem="consolidated"), "consolidated-00002-of-00003"),
        (["model-00001-of-000163.safetensors", "model-00163-of-000163.safetensors"], "model-00002-of-000163"),
        (["model-1-of-999999999999.safetensors"], "model-2-of-999999999999"),
        (["a-1-of-2-1-of-2.safetensors"], "a-1-of-2-2-of-2"),
        (["model_00001_of_00002.safetensors"], "model_00002_of_00002"),
        (["shard_0_of_4.safetensors", "shard_1_of_4.safetensors", "shard_3_of_4.safetensors"], "shard_2_of_4"),
        (["model.00001-of-00002.safetensors"], "model.00002-of-00002"),
        (["00002-of-00002.safetensors"], "00001-of-00002"),
        (["model-00001-of-00002-v2.safetensors"], "model-00002-of-00002-v2"),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_numbered_file_that_is_missing(names: list[str], missing: str, indexed: bool) -> None:
    """Also where an index does not name it."""
    indexes = ["model.safetensors.index.json"] if indexed else []
    with pytest.raises(FormatError, match=f"lacks the weight file {missing}.safetensors"):
        _select(*names, *indexes, index=_index(*names))


def test_an_index_with_a_dot_before_its_files_as_transformers_reads_it() -> None:
    found = _select("model-1.safetensors", "model.safetensors.index.json", index=_index("./model-1.safetensors"))
    assert found.shards == ("model-1.safetensors",)


def test_numbers_and_counts_as_others_write_them() -> None:
    for names in (
        ["shard_0_of_2.safetensors", "shard_1_of_2.safetensors"],
        ["model_00001_of_00002.safetensors", "model_00002_of_00002.safetensors"],
        ["00001-of-00002.safetensors", "00002-of-00002.safetensors"],
        ["model.1-of-2.safetensors", "model.2-of-2.safetensors"],
    ):
        assert _select(*names).shards == tuple(names)
    assert _select("step_of_2.safetensors").shards == ("step_of_2.safetensors",)


def test_numbers_without_a_count() -> None:
    for names in (["part-0.safetensors", "part-1.safetensors"], ["weights.00.safetensors", "weights.01.safetensors"]):
        assert _select(*names).shards == tuple(names)
    with pytest.raises(FormatError, match=r"lacks the weight file part-01\.safetensors"):
        _select("part-00.safetensors", "part-02.safetensors")
    names = ["part-00.safetensors", "part-02.safetensors"]  # an index knows better
    assert _select(*names, "model.safetensors.index.json", index=_index(*names)).shards == tuple(names)


def test_numbers_from_0_and_numbers_of_what_is_not_read() -> None:
    assert len(_select(*_numbered(0, 1, 2, of=3)).shards) == 3
    assert _select("model.safetensors", *_numbered(1, 3, of=3)).shards == ("model.safetensors",)
    assert _select("model-00001-of-00001.safetensors").shards == ("model-00001-of-00001.safetensors",)


def test_an_index_that_names_too_few() -> None:
    names = _numbered(1, 2, of=2)
    found = _select(*names, "model.safetensors.index.json", index=_index(names[0]))
    assert found.shards == (names[0],)
    assert found.notes == (f"weight files that lie there and are not read: {names[1]}",)
    with pytest.raises(FormatError, match="names a shard that is not there"):
        _select(names[0], "model.safetensors.index.json", index=_index(*names))


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "diffusion_pytorch_model.safetensors"],
        [*_numbered(1, 2, of=2), "diffusion_pytorch_model.safetensors"],
        ["model.safetensors", *_numbered(1, 2, of=2, stem="diffusion_pytorch_model")],
        ["model.fp16.safetensors", "model.bf16.safetensors"],
        [*_numbered(1, 2, of=2, stem="model.fp16"), *_numbered(1, 2, of=2, stem="model.bf16")],
        [*_numbered(1, 2, of=2), *_numbered(1, 2, 3, of=3)],
        ["sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"],
        ["a-1.safetensors", "a_1.safetensors", "a-01.safetensors"],
        ["a.safetensors", "a.safetensors.index.json", "b.safetensors.index.json"],
        ["model.fp16-1.safetensors", "model.safetensors.index.fp16.json", "model.bf16.safetensors"],
    ],
)
def test_several_models_side_by_side(names: list[str]) -> None:
    with pytest.raises(SourceError, match="several models or variants side by side") as caught:
        _select(*names, index=_index(names[0]))
    assert names[-1].split("-0")[0] in str(caught.value)
    assert "--local-dir" in str(caught.value)


def test_mistrals_own_format_beside_the_model() -> None:
    names = _numbered(1, 2, of=2)
    found = _select("consolidated.safetensors", *names, "model.safetensors.index.json", "params.json", index=_index(*names))
    assert found.shards == tuple(names)
    assert found.left_out == {"consolidated.safetensors": "the publisher's own copy of the weights"}
    assert found.notes == ()
    assert _select("consolidated.safetensors", "params.json").shards == ("consolidated.safetensors",)


PIPELINE = ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/a.safetensors", "big.gguf")


@pytest.mark.parametrize(
    "top", [(), ("sd_xl_base_1.0.safetensors",), ("model.safetensors", "diffusion_pytorch_model.safetensors")]
)
def test_the_top_of_a_pipeline(top: tuple[str, ...]) -> None:
    with pytest.raises(SourceError, match="a pipeline of several models") as caught:
        _select(*PIPELINE, *top)
    assert "--subfolder unet" in str(caught.value)
    assert "unet, vae" in str(caught.value)
    assert all(name in str(caught.value) for name in top)


def test_what_stays_behind() -> None:
    reasons = {
        "pytorch_model.bin": "weights in another format",
        "model.gguf": "weights in another format",
        ".git/": "hidden",
        ".env": "hidden",
        "original/": "the publisher's own copy of the weights",
        "onnx/": "no loader looks for it",
        "checkpoint-100/": "left by a training run",
        "wandb/": "left by a training run",
        "runs/": "left by a training run",
        "training_args.bin": "left by a training run",
        "optimizer.safetensors": "left by a training run",
        "__0_0.distcp": "left by a training run",
        "eval_results.json": "left by a training run",
        "config.json.bak": "an unfinished file or a spare copy",
        "tokenizer.json.partial": "an unfinished file or a spare copy",
        "vocab.bak": "an unfinished file or a spare copy",
        "train.parquet": "no loader looks for it",
        "data.jsonl": "no loader looks for it",
        "notes.txt": "no loader looks for it",
        "secrets.json": "no loader looks for it",
        "logo.png": "no loader looks for it",
        "unet/": "no loader looks for it",
        "surgery/": "no loader looks for it",
    }
    inside = {
        "original/": "consolidated.safetensors",
        "unet/": "a.safetensors",
        "surgery/": "notes.py",
        "checkpoint-100/": "config.json",
    }
    names = [name + inside.get(name, "x.py") if name.endswith("/") else name for name in reasons]
    found = _select("model.safetensors", *names)
    assert found.left_out == reasons
    assert found.others == ()
    assert found.notes == ()


LITTER = ("._model.safetensors", "._config.json", ".DS_Store", "Thumbs.db", "desktop.ini")


def test_what_file_managers_leave() -> None:
    pooling = ["modules.json", "1_Pooling/config.json"]
    modules = [{"path": "1_Pooling"}]
    inside = [f"{folder}/{name}" for folder in ("1_Pooling", "additional_chat_templates") for name in (*LITTER, "._x.jinja")]
    found = _select(
        "model.safetensors", "config.json", *LITTER, *pooling, *inside, "additional_chat_templates/x.jinja",
        "__MACOSX/._model.safetensors", ".ipynb_checkpoints/model-checkpoint.safetensors", "._model.safetensors.index.json",
        ".cache/huggingface/download/model.safetensors.metadata", modules__json=modules,
    )  # fmt: skip
    assert found.shards == ("model.safetensors",)
    assert found.index is None
    assert found.others == ("1_Pooling/config.json", "additional_chat_templates/x.jinja", "config.json", "modules.json")
    assert found.notes == ()
    assert {*LITTER, "__MACOSX/", ".ipynb_checkpoints/", ".cache/"} <= found.left_out.keys()
    for names in (["__MACOSX/._model.safetensors", "._model.safetensors", ".DS_Store"], ["sub/._model.safetensors"]):
        with pytest.raises(SourceError, match="has no safetensors weights"):
            _select("config.json", *names)
    with pytest.raises(SourceError, match=r"got:      unet\n"):
        _select("unet/a.safetensors", "vae/._a.safetensors", "__MACOSX/unet/._a.safetensors")


@pytest.mark.parametrize("copy", ["{} (1)", "{}(2)", "{} - Copy", "{} - Copy (3)", "{} copy", "{} copy 2"])
def test_copies_that_browsers_and_file_managers_make(copy: str) -> None:
    for names in (["model"], [name.removesuffix(".safetensors") for name in _numbered(1, 2, of=2)], ["part-0", "part-1"]):
        weights = [f"{name}.safetensors" for name in names]
        copies = [f"{copy.format(name)}.safetensors" for name in names]
        found = _select("config.json", f"{copy.format('config')}.json", *weights, *copies)
        assert found.shards == tuple(weights)
        assert found.others == ("config.json",)
        assert {found.left_out[name] for name in copies} == {"an unfinished file or a spare copy"}
        assert copies[0] in found.notes[0]
    alone = f"{copy.format('model')}.safetensors"
    assert _select("config.json", alone).shards == (alone,)


@pytest.mark.parametrize("suffix", [".incomplete", ".tmp", ".part", ".crdownload", ".download", ".partial"])
def test_downloads_that_were_not_finished(suffix: str) -> None:
    for names in ([f"model.safetensors{suffix}"], [".cache/huggingface/download/hash.0123.incomplete"]):
        if suffix != ".partial" or "/" in names[0]:
            with pytest.raises(SourceError, match="only downloads that were not finished") as caught:
                _select("config.json", *names)
            assert names[0] in str(caught.value)
        assert _select("config.json", "model.safetensors", *names).shards == ("model.safetensors",)
    names = _numbered(1, 2, of=2)
    with pytest.raises(FormatError, match=f"lacks the weight file {names[1]}"):
        _select(names[0], names[1] + suffix)


def test_a_file_that_a_download_has_only_set_aside() -> None:
    """aria2 makes the whole file at once, full of zeros, and keeps its own beside it until the end."""
    with pytest.raises(SourceError, match=r"m/model\.safetensors is not all there"):
        _select("config.json", "model.safetensors", "model.safetensors.aria2")


def test_an_index_of_an_earlier_save() -> None:
    old, new = _numbered(1, 2, of=2), _numbered(1, 2, 3, of=3)
    for there in (new, ["weights.safetensors"]):
        with pytest.raises(FormatError, match="names a shard that is not there") as caught:
            _select("config.json", *there, "model.safetensors.index.json", index=_index(*old))
        label = "model-*-of-3.safetensors" if there is new else "weights.safetensors"
        assert f"remove it to take {label}" in str(caught.value)
        assert old[0] in str(caught.value)
    for there in (new[:2], [old[0]]):  # not whole either; of the same model
        with pytest.raises(FormatError, match="names a shard that is not there") as caught:
            _select("config.json", *there, "model.safetensors.index.json", index=_index(*old))
        assert "the model is incomplete" in str(caught.value)


def test_subfolders_that_can_be_taken() -> None:
    """Not those of adapters, of results of ours, of runs and of file managers."""
    with pytest.raises(SourceError, match="a pipeline of several models") as caught:
        _select(
            "model_index.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
            "text_encoder/model.fp16.safetensors", "vae/x.safetensors", "lora/adapter_model.safetensors", "vae_bin/x.bin",
            "factorized/model.safetensors", "factorized/surgery/manifest.json", "checkpoint-1/model.safetensors",
        )  # fmt: skip
    assert "got:      text_encoder, unet, vae\n" in str(caught.value)
    with pytest.raises(SourceError, match="has no weights at its top") as caught:
        _select(
            "a/model.safetensors", "b/model.safetensors", "a-factorized/surgery/manifest.json", "a-factorized/x.safetensors"
        )
    assert "got:      a, b\n" in str(caught.value)


def test_a_run_that_has_only_its_checkpoints() -> None:
    names = [f"checkpoint-{step}/{file}" for step in (500, 90, 1000) for file in ("config.json", "model.safetensors")]
    with pytest.raises(SourceError, match="the folder of a training run") as caught:
        _select("runs/events.out.tfevents.1", "trainer_state.json", *names)
    assert "got:      checkpoint-1000, checkpoint-500, checkpoint-90\n" in str(caught.value)
    assert "--subfolder checkpoint-1000" in str(caught.value)
    with pytest.raises(SourceError, match="adapters in its subfolders"):
        _select("checkpoint-1/adapter_config.json", "checkpoint-1/adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"has no safetensors weights\n"):
        _select("checkpoint-1/optimizer.pt", "checkpoint-1/trainer_state.json")


def test_folders_that_stay_behind_are_not_looked_into() -> None:
    top = [
        "model.safetensors",
        "config.json",
        "modules.json",
        "1_Pooling/",
        "wandb/",
        "data/",
        ".git/",
        "checkpoint-1/",
        "big.txt",
    ]
    asked = []

    def listing(folder: str) -> list[str]:
        asked.append(folder)
        return {"": top, "1_Pooling": ["config.json"]}[folder]

    texts = {"modules.json": '[{"path": "1_Pooling", "type": "x.Pooling"}]', "config.json": '{"_name_or_path": "checkpoint-1"}'}
    assert select_files(listing, texts.__getitem__, where="m").others == (
        "1_Pooling/config.json",
        "config.json",
        "modules.json",
    )
    assert sorted({*asked}) == ["", "1_Pooling"]


def test_an_adapter_beside_the_weights() -> None:
    for pair in (
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.bin"],
        ["adapter_config.json", "adapters.safetensors"],
        ["adapter_config.json"],
        ["adapter_config.json", "adapter_model.safetensors.index.json", *_numbered(1, 3, of=3, stem="adapter_model")],
        ["pytorch_lora_weights.safetensors"],
    ):
        found = _select("config.json", "model.safetensors", *pair)
        assert (found.shards, found.others) == (("model.safetensors",), ("config.json",))
        assert found.left_out == dict.fromkeys(sorted(pair), "an adapter")
        assert "adapter" in found.notes[0]
        with pytest.raises(SourceError, match="holds an adapter and no safetensors weights"):
            _select("config.json", *pair)
    assert _select("model.safetensors", "adapter_layers.py").others == ("adapter_layers.py",)


def test_an_adapter_and_nothing_else() -> None:
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "checkpoint-10/"]
    for config, said in (
        ({"base_model_name_or_path": "meta/Llama 3", "peft_type": "LORA"}, "surgery merge 'meta/Llama 3' m"),
        ({"base_model_name_or_path": "meta/L3"}, "base_model_name_or_path: 'meta/L3'"),
        ({"base_model_name_or_path": None}, "surgery merge MODEL m"),
        ({"base_model_name_or_path": "a\x1b[2Jb"}, "surgery merge MODEL m"),
        ([], "surgery merge MODEL m"),
        ("{", "surgery merge MODEL m"),
    ):
        with pytest.raises(SourceError, match="holds an adapter and no safetensors weights") as caught:
            _select(*names, adapter_config__json=config)
        assert said in str(caught.value)
        assert "\x1b" not in str(caught.value)
    with pytest.raises(SourceError, match="holds adapters in its subfolders"):
        _select("default/adapter_config.json", "default/adapter_model.safetensors", "ref/adapter_model.safetensors")


def test_weights_that_are_called_as_what_a_run_leaves() -> None:
    names = _numbered(1, 2, of=2, stem="checkpoint")
    assert _select(*names).shards == tuple(names)
    assert _select("checkpoint-best.safetensors").shards == ("checkpoint-best.safetensors",)


def test_what_every_tokenizer_and_processor_of_transformers_looks_for() -> None:
    """Independent truth: the names in the installed library."""
    wanted: set[str] = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for block in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", path.read_text(encoding="utf-8")):
            wanted |= set(re.findall(r":\s*\"([^\"]+)\"", block))
    assert {"spiece.model", "vocab.txt", "entity_vocab.json", "source.spm", "merges.txt"} <= wanted
    hub = transformers.utils
    wanted |= {
        hub.CONFIG_NAME,
        hub.FEATURE_EXTRACTOR_NAME,
        hub.IMAGE_PROCESSOR_NAME,
        hub.PROCESSOR_NAME,
        hub.GENERATION_CONFIG_NAME,
    }
    wanted |= {
        hub.MODEL_CARD_NAME,
        hub.VIDEO_PROCESSOR_NAME if hasattr(hub, "VIDEO_PROCESSOR_NAME") else "video_preprocessor_config.json",
    }
    wanted |= {
        hub.CHAT_TEMPLATE_FILE,
        hub.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    wanted |= {
        f"{hub.CHAT_TEMPLATE_DIR}/tools.jinja",
        "tokenizer.model.v3",
        "tekken.json",
        "qwen.tiktoken",
        "custom_generate/generate.py",
    }
    assert set(_select("model.safetensors", *wanted).others) == wanted
    assert all(is_read_by_loaders(name) for name in (*wanted, "model.safetensors", "model.safetensors.index.json"))


def test_card_licence_and_code() -> None:
    wanted = {
        "README.md", "LICENSE", "LICENCE.txt", "LICENSE-Llama-3.1.md", "llama3-license.txt", "NOTICE", "USE_POLICY.md",
        "NOTICE.txt", "THIRD_PARTY_NOTICES.txt", "modeling_x.py", "requirements.txt", "hf_quant_config.json", "params.json",
    }  # fmt: skip
    assert set(_select("model.safetensors", *wanted).others) == wanted
    assert _select("model.safetensors", "noticeboard.csv", "licenses.parquet").others == ()
    assert not is_read_by_loaders("noticeboard.csv")
    assert not is_read_by_loaders("checkpoint-1/config.json")


def test_what_configs_and_the_models_code_name() -> None:
    found = _select(
        "model.safetensors", "config.json", "tokenizer_config.json", "modeling_x.py", "train.py",
        "blocks/__init__.py", "blocks/attn.py", "blocks/deep/norm.py", "blocks/data.csv", "lone.py", "pkg/__init__.py",
        "odd.json", "voices.npz", "lexicon.txt", "data.csv", "assets/a.npy", "assets/b.npy", "unrelated/x.py", ".env",
        "other.bin",
        config__json={"auto_map": {"AutoModel": "modeling_x.X"}, "w": "other.bin", "e": ".env"},
        tokenizer_config__json={"file": "./odd.json"},
        modeling_x__py="from .blocks.attn import A  # don't\nfrom . import (\n  pkg,\n lone)\n"
        "open('lexicon.txt'), load(\"assets/a.npy\", 'voices.npz')\n",
        train__py="from .unrelated import x\nopen('data.csv')",
    )  # fmt: skip
    assert set(found.others) == {
        "config.json", "tokenizer_config.json", "modeling_x.py", "train.py", "blocks/__init__.py", "blocks/attn.py",
        "blocks/deep/norm.py", "lone.py", "pkg/__init__.py", "odd.json", "voices.npz", "lexicon.txt", "assets/a.npy",
    }  # fmt: skip
    assert {"data.csv", ".env", "other.bin", "unrelated/"} <= found.left_out.keys()


def test_modules_of_sentence_transformers() -> None:
    modules = [
        {"idx": i, "path": path, "type": "x.Y"} for i, path in enumerate(["", "1_Pooling", "2_Dense", "3_Dense", "wandb"])
    ]
    found = _select(
        "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin",
        "3_Dense/model.safetensors", "3_Dense/pytorch_model.bin", "3_Dense/.cache/x", "3_Dense/optimizer.pt", "wandb/x.json",
        "4_Other/config.json",
        modules__json=modules,
    )  # fmt: skip
    assert found.others == (
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "3_Dense/model.safetensors",
        "modules.json",
    )  # fmt: skip
    assert set(found.left_out) == {"3_Dense/pytorch_model.bin", "3_Dense/.cache/", "3_Dense/optimizer.pt", "wandb/", "4_Other/"}


def test_folders_that_processors_look_into() -> None:
    found = _select(
        "model.safetensors", "alphabet.json", "language_model/attrs.json", "language_model/unigrams.txt",
        "language_model/5gram.bin", "speech_tokenizer/config.json", "speech_tokenizer/model.safetensors",
        "char_tokenizer/vocab.txt", "char_tokenizer/.DS_Store", "tokenizers/x.json",
    )  # fmt: skip
    assert set(found.others) == {
        "alphabet.json", "language_model/attrs.json", "language_model/unigrams.txt", "language_model/5gram.bin",
        "speech_tokenizer/config.json", "speech_tokenizer/model.safetensors", "char_tokenizer/vocab.txt",
    }  # fmt: skip
    assert set(found.left_out) == {"char_tokenizer/.DS_Store", "tokenizers/"}
    # The language model of a model that sees, which has no alphabet.
    assert _select("model.safetensors", "language_model/pytorch_model.bin").others == ()


def test_an_adapter_in_a_folder_that_the_models_code_names() -> None:
    files = ["adapters/adapter_config.json", "adapters/adapter_model.safetensors", "adapters/README.md"]
    names = ["model.safetensors", "config.json", "modeling_x.py", *files, "data/x.csv"]
    config = {"auto_map": {"AutoModel": "modeling_x.X"}}
    code = "folder = os.path.join(base.name_or_path, 'adapters')\nload('data')"
    found = _select(*names, config__json=config, modeling_x__py=code)
    assert found.others == (*files[:2], "config.json", "modeling_x.py")
    assert found.notes == ()
    found = _select(*names, config__json=config)
    assert set(found.left_out) == {"adapters/", "data/"}


def test_a_folder_of_the_models_own_where_ours_is() -> None:
    with pytest.raises(SourceError, match="needs files of its own in surgery/"):
        _select(
            "model.safetensors", "config.json", "modeling_x.py", "surgery/__init__.py",
            config__json={"auto_map": {"AutoModel": "modeling_x.X"}}, modeling_x__py="from .surgery import cut",
        )  # fmt: skip
    for name in ("manifest.json", "scales.safetensors", "factors-00001-of-00002.safetensors.partial"):
        with pytest.raises(SourceError, match="m is itself a factorized checkpoint"):
            _select("model.safetensors", f"surgery/{name}")
    with pytest.raises(SourceError, match=r"m is an unfinished result\n.*continues where it stopped"):
        _select("model.safetensors", "surgery/factors-00001-of-00002.safetensors", ".surgery/run.json")


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
        ({"weight_map": {"a": "sub/model-1.safetensors"}}, "names a shard that is not beside it"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_index(index: object, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        _select("model-1.safetensors", "model.safetensors.index.json", index=index)
    assert "m/model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json"], "no safetensors weights"),
        ([], "no files"),
        (["config.json", "pytorch_model.bin"], "only a pickle checkpoint, which is never opened"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "save_pretrained"),
        (["model.Q4_K_M.gguf", "README.md"], "only GGUF"),
        (["config.json", "gguf/model.gguf"], "gguf/model.gguf"),
        (["config.json", "model.onnx"], "only ONNX"),
        (["config.json", "onnx/model.onnx", "onnx/model.onnx_data"], "onnx/model.onnx"),
        (["config.json", "flax_model.msgpack"], "flax_model.msgpack"),
        (["config.json", "tf_model.h5"], "another format"),
        (["config.json", "weights.npz"], "only weights in another format"),
        (["unet/diffusion_pytorch_model.safetensors", "vae/x.safetensors"], "--subfolder unet"),
        (["a/b/model.safetensors"], "--subfolder a/b"),
    ],
)
def test_nothing_usable(names: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)):
        _select(*names)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/cron.d/x", "a/../../b", "C:\\x", "a\0b", ""])
def test_names_that_leave_the_folder(name: str) -> None:
    """As a hub may list them: what they name would be written there."""
    with pytest.raises(FormatError, match="leaves its folder") as caught:
        select_files(lambda _: ["model.safetensors", name], lambda _: "", where="m")
    assert "without : and \\" in str(caught.value.expected)


@pytest.mark.parametrize(
    "code",
    [
        "from " + "." * 500_000,
        "from .a import (\n" * 50_000,
        "from .a" + " " * 500_000 + "x",
        "\n" * 500_000 + "x",
        "from " * 100_000,
        "import ." + "a." * 250_000,
        "'\"" * 250_000,
    ],
    ids=range(7),
)
def test_hostile_code_takes_bounded_time(code: str) -> None:
    """Whatever the code of a model is, it is searched once; names after a bracket that is closed nowhere count."""
    names = ("model.safetensors", "config.json", "modeling_x.py", "a/__init__.py", "b/__init__.py")
    config = {"auto_map": {"AutoModel": "modeling_x.X"}}
    started = time.perf_counter()
    found = _select(*names, config__json=config, modeling_x__py=f"from . import b\n{code}")
    assert time.perf_counter() - started < 10
    assert "b/__init__.py" in found.others
