"""A parameter that the files of a model hold more than once: what is trained, once, is what a fold writes, everywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError, SourceError
from surgery.format.manifest import Manifest
from surgery.models import skeleton
from surgery.progress import Silent
from tests.families import FAMILIES
from tests.loopback_hub import LoopbackHub
from tests.models import planned, realistic, save_llama, tensors_of
from tests.releases import needs
from tests.sealing import put_manifest

# What is said of such a model, where a test does not listen.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* (is stored again as|may be one parameter|is already complete):surgery.errors.SurgeryWarning"
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYOUTS = ["residual", "overlay"]
#: Before, two parameters are made of a tied weight that is stored twice; scales reach both, and both are folded.
ties_copies = needs("transformers", ">=5.6", "tying what is stored twice and is the same")


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> Path:
    """Weights in files of their own making, with an index, and another config; None takes an entry out."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    place = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key].clone().contiguous() for key in sorted(tensors)[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    said = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder


def tied_llama(folder: Path, dtype: torch.dtype = torch.float32, *, shards: int = 1, **config: Any) -> Path:
    save_llama(folder, dtype, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    assert HEAD not in tensors
    return _rewrite(folder, {**tensors, HEAD: tensors[EMBEDDING]}, shards, **config)


def _written_out(make: Callable[[], Any], folder: Path, **config: Any) -> Path:
    """A model whose file holds each parameter under every name that it has, as a torch checkpoint does."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder)
    return _rewrite(folder, model.state_dict(), 2, **config)


def t5() -> Any:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=1, n_head=4))


def bert() -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def zamba() -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 32, "attention_hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_head_dim": 16, "n_mamba_heads": 2}
    blocks = {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8, "mamba_dt_rank": 4}
    return transformers.ZambaForCausalLM(transformers.ZambaConfig(**sizes, **heads, **blocks, use_mamba_kernels=False))


def _logits(model: Any) -> torch.Tensor:
    ids = {"input_ids": torch.arange(3, 14)[None]}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.arange(5, 12)[None]
    with torch.no_grad():
        return model(**ids).logits


def _check(folder: Path, tmp_path: Path, layout: str, include: Iterable[str] = (), kind: Any = None) -> Manifest:
    """Attached is folded, on the original weights and on the residual folder; untouched is the source; project leads back."""
    kind = kind or getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    base = folder if layout == "overlay" else None
    factorized = tmp_path / "f"
    manifest = surgery.factorize(folder, factorized, rank=4, include=list(include), layout=layout).manifest
    for loaded in [folder] if base else [folder, factorized]:
        model = kind.from_pretrained(loaded, dtype="auto").eval()
        scales = surgery.attach(model, factorized)
        for i, delta in enumerate(scales.parameters()):
            delta.data = torch.rand(delta.shape, generator=torch.Generator().manual_seed(i))
        attached = _logits(model)
        scales.save(tmp_path / "s.safetensors")
        out = tmp_path / f"folded-{loaded.name}"
        surgery.fold(factorized, tmp_path / "s.safetensors", out, base=base)
        folded = kind.from_pretrained(out, dtype="auto").eval()
        torch.testing.assert_close(attached, _logits(folded), rtol=1e-5, atol=1e-5 * attached.abs().max().item())
        tensors = tensors_of(out)
        for target in manifest.targets:
            for alias in target.aliases:
                assert torch.equal(tensors[target.tensor], tensors[alias.tensor])
    surgery.fold(factorized, factorized / "surgery/scales.safetensors", tmp_path / "untouched", base=base)
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "untouched" / file.name).read_bytes() == file.read_bytes()
    assert surgery.verify(factorized, base=base).ok
    surgery.project(factorized, out, tmp_path / "p.safetensors", base=base)
    trained = load_file(tmp_path / "s.safetensors")
    for name, found in load_file(tmp_path / "p.safetensors").items():
        torch.testing.assert_close(found, trained[name], rtol=1e-3, atol=1e-3)
    return manifest


def _aliases(manifest: Manifest) -> dict[str, list[str]]:
    return {target.tensor: [alias.tensor for alias in target.aliases] for target in manifest.targets}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("include", "shards"), [((EMBEDDING,), 1), ((EMBEDDING,), 3), ((HEAD,), 2), ((EMBEDDING, HEAD), 2), (("*.weight",), 3)]
)
def test_tied_head_beside_the_embedding(layout: str, include: tuple[str, ...], shards: int, tmp_path: Path) -> None:
    manifest = _check(tied_llama(tmp_path / "m", shards=shards), tmp_path, layout, include)
    found = _aliases(manifest)
    kept = next(name for name in (HEAD, EMBEDDING) if name in found)
    assert found.pop(kept) == [EMBEDDING if kept == HEAD else HEAD]
    assert not any(found.values())
    assert not {EMBEDDING, HEAD} & {skipped.tensor for skipped in manifest.skipped}
    known = [*found, kept, *manifest.targets[0].tensors, *(skipped.tensor for skipped in manifest.skipped)]
    assert set(known) >= set(tensors_of(tmp_path / "m")) - {EMBEDDING, HEAD}


@ties_copies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_tensors_are_rounded_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    """Else a loader would not tie them any more."""
    folder = tied_llama(tmp_path / "m", dtype, shards=2)
    surgery.factorize(folder, tmp_path / "f", rank=4, include=[EMBEDDING])
    g = {EMBEDDING: torch.tensor([1.3, 0.9, 1.01, 1.0])}
    surgery.fold(tmp_path / "f", g, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert torch.equal(after[EMBEDDING], after[HEAD])
    assert not torch.equal(after[EMBEDDING], before[EMBEDDING])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("make", "include"),
    [
        (t5, ["shared.weight"]),
        (t5, ["decoder.embed_tokens.weight"]),
        (t5, ["*embed*", "shared*", "lm_head*"]),
        (gpt2, ["transformer.wte.weight"]),
        (gpt2, ["lm_head.weight"]),
        (bert, ["*word_embeddings.weight"]),
        (zamba, []),
    ],
)
def test_families_whose_config_says_nothing(make: Callable[[], Any], include: list[str], layout: str, tmp_path: Path) -> None:
    """Whether their classes tie is known to transformers alone."""
    folder = _written_out(make, tmp_path / "m", tie_word_embeddings=None)
    manifest = _check(folder, tmp_path, layout, include)
    tensors = tensors_of(folder)
    aliased = {tuple(sorted(target.tensors)) for target in manifest.targets if target.aliases}
    assert aliased
    for names in aliased:
        alike = [name for name, tensor in tensors.items() if torch.equal(tensor, tensors[names[0]])]
        assert sorted(alike) == list(names)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("include", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]])
def test_a_head_that_differs_is_a_parameter_of_its_own(layout: str, include: list[str], tmp_path: Path) -> None:
    """Whatever the config says, as transformers loads it; also if a single row differs that no sample holds."""
    folder = tied_llama(tmp_path / "m")
    tensors = tensors_of(folder)
    tensors[HEAD][-2, 7] += 1
    manifest = _check(_rewrite(folder, tensors), tmp_path, layout, include)
    assert _aliases(manifest) == {name: [] for name in sorted(include)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_is_equal_and_not_tied(layout: str, tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m", tie_word_embeddings=False)
    assert _aliases(_check(folder, tmp_path, layout, [EMBEDDING])) == {EMBEDDING: []}


def test_copied_layers_are_not_tied(tmp_path: Path) -> None:
    """As in a model that was made deeper by copying: equal at first, and each trained by itself."""
    folder = save_llama(tmp_path / "m", torch.float32)
    tensors = tensors_of(folder)
    tensors |= {name.replace(".0.", ".1."): tensor for name, tensor in tensors.items() if ".0." in name}
    manifest = _check(_rewrite(folder, tensors, 2), tmp_path, "residual")
    assert len(manifest.targets) == 14
    assert not any(_aliases(manifest).values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_equal_experts_are_not_tied(family: str, layout: str, tmp_path: Path) -> None:
    """As in a mixture that was made by copying a dense model: stacked in one parameter, and each trained by itself."""
    folder = FAMILIES[family].save(tmp_path / "m")
    tensors = tensors_of(folder)
    copies = {name: tensors[name.replace("experts.1.", "experts.0.")] for name in tensors if ".experts.1." in name}
    assert copies
    manifest = _check(_rewrite(folder, {**tensors, **copies}, 2), tmp_path, layout)
    assert copies.keys() <= {target.tensor for target in manifest.targets}
    assert not any(_aliases(manifest).values())


_TEXT: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_TOWER |= {"image_size": 16, "patch_size": 8}


def gemma3() -> Any:
    text = {**_TEXT, "head_dim": 8, "sliding_window": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=_TOWER, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def idefics3() -> Any:
    text = {**_TEXT, "model_type": "llama"}
    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(text_config=text, vision_config=_TOWER, image_token_id=40)
    )


def qwen2_audio() -> Any:
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}
    config = transformers.Qwen2AudioConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        audio_config={**audio, "max_source_positions": 20},
        audio_token_index=40,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


@ties_copies
@pytest.mark.parametrize(("whole", "text"), [(None, True), (None, False), (True, None), (False, None), (True, False)])
@pytest.mark.parametrize("make", [gemma3, idefics3, qwen2_audio])
def test_what_a_config_says_counts_as_the_class_takes_it(
    make: Callable[[], Any], whole: bool | None, text: bool | None, tmp_path: Path
) -> None:
    """Of a model with a language model inside, transformers follows one of the two configs, or neither."""
    torch.manual_seed(0)
    model = make()
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))  # not tied, so that its file has both
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight") and tensors[name].shape == (50, 32))
    config = json.loads((tmp_path / "config.json").read_text())
    for part, said in ((config, whole), (config["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        if said is not None:
            part["tie_word_embeddings"] = said
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(model).from_pretrained(tmp_path)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    (target,) = planned(tmp_path, rank=2, include=[embedding]).targets
    assert bool(target.aliases) is tied


def test_the_config_counts_where_the_class_cannot_be_followed(tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m", tie_word_embeddings=True)
    _rewrite(folder, {**tensors_of(folder), "norm.weight": torch.ones(48)})  # beside model.norm.weight
    assert [len(t.aliases) for t in planned(folder, rank=2, include=[EMBEDDING]).targets] == [1]
    _rewrite(folder, tensors_of(folder), tie_word_embeddings=None)
    with pytest.raises(OptionError, match="it cannot be known") as caught:
        planned(folder, rank=2, include=[EMBEDDING])
    assert "two tensors of the checkpoint are loaded as 'model.norm.weight'" in str(caught.value)


@pytest.mark.parametrize("said", [{"llm_config": True}, {"language_config": True}, {"llm_config": False}, {}])
def test_a_class_of_its_own_that_says_it_of_its_language_model(said: dict[str, bool], tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m", tie_word_embeddings=None, architectures=["OurVLM"], model_type="ours")
    parts = {part: {"tie_word_embeddings": tied} for part, tied in said.items()}
    _rewrite(folder, tensors_of(folder), **parts)
    if said:
        (target,) = planned(folder, rank=2, include=[EMBEDDING]).targets
        assert bool(target.aliases) is next(iter(said.values()))
        _rewrite(folder, tensors_of(folder), tie_word_embeddings=not next(iter(said.values())))
    with pytest.raises(OptionError, match="it cannot be known whether the model ties them"):  # unsaid, or contradicted
        planned(folder, rank=2, include=[EMBEDDING])


@pytest.mark.parametrize("missing", ["no config", "a class of its own", "no transformers"])
def test_what_cannot_be_known_is_refused(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tied_llama(tmp_path / "m", tie_word_embeddings=None)
    if missing == "no config":
        (folder / "config.json").unlink()
    elif missing == "a class of its own":
        _rewrite(folder, tensors_of(folder), architectures=["OurLM"], model_type="ours")
    else:
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(OptionError, match=f"{HEAD} and {EMBEDDING}: they hold the same weights") as caught:
        planned(folder, rank=2, include=[EMBEDDING])
    assert "--exclude 'lm_head.weight' --exclude 'model.embed_tokens.weight'" in str(caught.value)
    assert "tie_word_embeddings" in str(caught.value)
    if missing != "no config":  # said in the config it is known, without transformers as well
        _rewrite(folder, tensors_of(folder), tie_word_embeddings=True)
        assert [len(t.aliases) for t in planned(folder, rank=2, include=[EMBEDDING]).targets] == [1]


class _Blocks(torch.nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(24, 32, bias=False)}) for _ in range(2)])
        if tied:
            self.layers[1]["up"].weight = self.layers[0]["up"].weight


def test_equal_weights_in_blocks_of_an_unknown_class(tmp_path: Path) -> None:
    """Copied blocks are targets of their own; where the model makes one parameter of them, that shows when it is there."""
    weight, folder = realistic(32, 24, seed=1), tmp_path / "m"
    folder.mkdir()
    save_file({"layers.0.up.weight": weight, "layers.1.up.weight": weight.clone()}, folder / "model.safetensors")
    told = Silent()
    manifest = surgery.factorize(folder, tmp_path / "f", rank=2, layout="overlay", progress=told).manifest
    assert len(manifest.targets) == 2
    assert [note for note in told.notes if "layers.1.up.weight holds the same weights as layers.0.up.weight" in note]
    for tied in (False, True):
        model = _Blocks(tied)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        if tied:
            with pytest.raises(OptionError, match=r"is one parameter of the model with 'layers\.1\.up\.weight'"):
                surgery.attach(model, tmp_path / "f")
        else:
            assert len(list(surgery.attach(model, tmp_path / "f").parameters())) == 2
    zeros = torch.zeros(32, 24)  # have no directions to change
    save_file({"layers.0.up.weight": zeros, "layers.1.up.weight": zeros.clone()}, folder / "model.safetensors")
    assert planned(folder, rank=2).notes == ()


def test_an_embedding_that_begins_with_zeros_is_compared(tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m")
    tensors = tensors_of(folder)
    for row in (0, 48, 96):
        tensors[EMBEDDING][row] = 0
    _rewrite(folder, {**tensors, HEAD: tensors[EMBEDDING]})
    assert [len(t.aliases) for t in planned(folder, rank=2, include=[EMBEDDING]).targets] == [1]


def test_without_a_correction_the_copies_would_part(tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m")
    with pytest.raises(OptionError, match="needs its correction"):
        surgery.factorize(folder, tmp_path / "f", rank=2, include=[EMBEDDING], correction=False)


@ties_copies
def test_a_parameter_that_the_manifest_knows_in_part_is_not_attached(tmp_path: Path) -> None:
    """As before aliases were recorded: the fold would edit one of the two."""
    folder = tied_llama(tmp_path / "m")
    manifest = surgery.factorize(folder, tmp_path / "f", rank=2, include=[EMBEDDING], layout="overlay").manifest
    described = dataclasses.asdict(manifest)
    described["skipped"].append({**described["targets"][0].pop("aliases")[0], "reason": "an output head"})
    put_manifest(tmp_path / "f", described)
    assert Manifest.read(tmp_path / "f").targets[0].aliases == []
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(OptionError, match=f"'{EMBEDDING}' is one parameter of the model with '{HEAD}'"):
        surgery.attach(model, tmp_path / "f")
    assert not any(parameter.requires_grad is False for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["skipped"].append({**d["targets"][0]["aliases"][0], "reason": ""}), "both a target and passed over"),
        (lambda d: d["targets"][0]["aliases"].append(d["targets"][0]["aliases"][0]), "make no sense"),
        (lambda d: d["targets"][0]["aliases"][0].update(shard="other.safetensors"), "make no sense"),
        (lambda d: d["targets"][0]["aliases"][0].update(tensor=d["targets"][1]["tensor"]), "belongs to two targets"),
        (lambda d: d["targets"][0]["aliases"][0].pop("shard"), "missing or unknown entries"),
    ],
)
def test_aliases_in_a_manifest_that_make_no_sense(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m")
    manifest = surgery.factorize(
        folder, tmp_path / "f", rank=2, include=["lm_head.*", "*q_proj.weight"], layout="overlay"
    ).manifest
    described = dataclasses.asdict(manifest)
    change(described)
    put_manifest(tmp_path / "f", described)
    with pytest.raises(FormatError, match=message):
        Manifest.read(tmp_path / "f")


def test_projected_models_hold_either_name_or_both(tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, include=[HEAD])
    surgery.fold(tmp_path / "f", {HEAD: torch.tensor([1.5, 1.0, 0.5, 2.0])}, tmp_path / "tuned")
    tensors = tensors_of(tmp_path / "tuned")
    without = {name: tensor for name, tensor in tensors.items() if name != HEAD}  # as save_pretrained writes it
    for kept in (tensors, without):
        _rewrite(tmp_path / "tuned", kept)
        surgery.project(tmp_path / "f", tmp_path / "tuned", tmp_path / "p.safetensors", overwrite=True)
        torch.testing.assert_close(load_file(tmp_path / "p.safetensors")[HEAD], torch.tensor([1.5, 1.0, 0.5, 2.0]))
    _rewrite(tmp_path / "tuned", {**tensors, EMBEDDING: tensors[EMBEDDING] + 1})
    with pytest.raises(SourceError, match="holds other weights"):
        surgery.project(tmp_path / "f", tmp_path / "tuned", tmp_path / "p.safetensors", overwrite=True)


@pytest.mark.parametrize("stream", [False, True])
def test_from_the_hub_they_are_compared_when_the_run_has_them(stream: bool, hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tied_llama(tmp_path / "m", shards=3)
    name = f"acme/tied-{stream}"
    hub.publish(name, folder)
    notes = planned(name, rank=2, include=[EMBEDDING]).notes
    assert any(f"{HEAD} and {EMBEDDING} may be one parameter" in note for note in notes)
    told = Silent()
    layout = "overlay" if stream else "residual"
    manifest = surgery.factorize(
        name, tmp_path / "f", rank=2, include=[EMBEDDING], stream=stream, layout=layout, progress=told
    ).manifest
    assert _aliases(manifest) == {EMBEDDING: [HEAD]}
    assert any("stored again" in note for note in told.notes)
    again = surgery.factorize(name, tmp_path / "f", rank=2, include=[EMBEDDING], stream=stream, layout=layout).manifest
    assert again == manifest
    scales = {EMBEDDING: torch.tensor([1.5, 0.5])}
    surgery.fold(tmp_path / "f", scales, tmp_path / "out", stream=stream)
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after[EMBEDDING], after[HEAD])
    local = surgery.factorize(folder, tmp_path / "local", rank=2, include=[EMBEDDING]).manifest
    surgery.fold(tmp_path / "local", scales, tmp_path / "local-out")
    assert local.targets[0].factors_sha256 == manifest.targets[0].factors_sha256
    assert all(torch.equal(tensor, after[key]) for key, tensor in tensors_of(tmp_path / "local-out").items())


def test_the_skeleton_is_not_needed_where_nothing_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning an ordinary model waits for no import of transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(skeleton, "skeleton", None)
    monkeypatch.setattr("surgery.planning.aliases.skeleton", None)
    assert len(planned(tmp_path / "m", rank=2).targets) == 14


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_an_adapter_of_a_model_that_only_its_names_tell(module: str, layout: str, tmp_path: Path) -> None:
    """An update of one of the tensors is one of all: a loader ties them only if they are the same."""
    weight, folder = realistic(40, 24, seed=3), tmp_path / "m"
    folder.mkdir()
    save_file({EMBEDDING: weight, HEAD: weight.clone()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    surgery.factorize(folder, tmp_path / "f", rank=4, include=["*"], layout=layout)
    lora = tmp_path / "lora"
    lora.mkdir()
    A, B = torch.randn(2, 24), torch.randn(40, 2)
    prefix = f"base_model.model.{module}.lora_"
    save_file({f"{prefix}A.weight": A, f"{prefix}B.weight": B}, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module], "bias": "none"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    base = folder if layout == "overlay" else None
    for g, name in ((torch.ones(4), "untouched"), (torch.tensor([1.5, 1.0, 0.5, 2.0]), "scaled")):
        surgery.fold(tmp_path / "f", {HEAD: g}, tmp_path / name, base=base, lora=lora)
        after = tensors_of(tmp_path / name)
        assert torch.equal(after[EMBEDDING], after[HEAD])
        U, s, V = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = weight.double() + U[:, :4] @ torch.diag(s[:4] * (g.double() - 1)) @ V[:4] + B.double() @ A.double()
        torch.testing.assert_close(after[HEAD].double(), expected, rtol=1e-4, atol=1e-4)
