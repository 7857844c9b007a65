"""Why tensors are passed over; the globs; the plan."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FormatError, OptionError
from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.format.tensor_view import by_tensor
from surgery.planning.plan import Plan
from surgery.planning.recipes import read_recipe, recipe_for_family
from surgery.planning.targets import Model, Skipped, Target, choose
from surgery.progress import Silent
from surgery.quantized.recognize import Quantization
from tests.families import FAMILIES
from tests.fp8_models import quantize_model
from tests.models import planned, tensors_of


def test_reasons(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.q.weight": torch.randn(8, 8),
        "model.layers.0.q.bias": torch.randn(8),
        "model.layers.0.norm.weight": torch.randn(8, 8),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 8),
        "model.layers.0.mlp.router.weight": torch.randn(4, 8),
        "model.layers.0.mlp.experts.down_proj_bias": torch.randn(4, 8),
        "model.layers.0.mixer.A_log": torch.randn(8, 4),
        "model.layers.0.conv.weight": torch.randn(8, 1, 4),
        "model.layers.0.one.weight": torch.randn(1, 8),
        "model.layers.0.quantized.weight": torch.randn(8, 8).to(torch.float8_e4m3fnuz),
        "model.layers.0.table": torch.randn(8, 8),
        "model.embed_tokens.weight": torch.randn(9, 8),
        "model.position_ids": torch.arange(4)[None],
        "lm_head.weight": torch.randn(9, 8),
        "projection.weight": torch.randn(8, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    steps = planned(tmp_path, rank=2)
    assert [target.tensor for target in steps.targets] == ["model.layers.0.q.weight"]
    reasons = {item.tensor: item.reason for item in steps.skipped}
    expected = {
        "q.bias": "a vector",
        "norm.weight": "a norm",
        "mlp.gate.weight": "a router",
        "mlp.router.weight": "a router",
        "down_proj_bias": "no weight",
        "A_log": "no weight",
        "conv.weight": "a depthwise convolution",
        "one.weight": "a single row",
        "quantized.weight": "F8_E4M3FNUZ",
        "table": "no weight of a linear layer",
        "embed_tokens.weight": "an embedding",
        "position_ids": "no floating-point weight",
        "lm_head.weight": "an output head",
        "projection.weight": "outside the transformer blocks",
    }
    for ending, reason in expected.items():
        (found,) = [text for name, text in reasons.items() if name.endswith(ending)]
        assert reason in found, ending


_QUERY = "model.layers.1.self_attn.q_proj.weight"


def _changed(llama: Path, folder: Path, change: dict[str, torch.Tensor], **config: object) -> Path:
    """The tiny Llama in one file, with other tensors, and settings in its config."""
    folder.mkdir()
    save_file({**tensors_of(llama), **change}, folder / "model.safetensors")
    settings = json.loads((llama / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("shape", [(0,), (0, 48), (48, 0), (0, 0)])
@pytest.mark.parametrize("model_type", ["llama", "unheard of"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_an_empty_weight_is_a_broken_checkpoint(
    shape: tuple[int, ...], model_type: str, dtype: torch.dtype, llama: Path, tmp_path: Path
) -> None:
    folder = _changed(llama, tmp_path / "m", {_QUERY: torch.zeros(shape, dtype=dtype)}, model_type=model_type)
    with pytest.raises(FormatError, match="the checkpoint is broken") as caught:
        planned(folder, rank=4)
    assert repr(_QUERY) in str(caught.value)
    assert str(list(shape)) in str(caught.value)
    with pytest.raises(FormatError, match="the checkpoint is broken"):
        surgery.factorize(folder, tmp_path / "f", rank=4, include=["*.q_proj.*"])
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"])
def test_an_empty_weight_that_is_no_target(name: str, llama: Path, tmp_path: Path) -> None:
    """No loader takes it: transformers refuses the shape."""
    folder = _changed(llama, tmp_path / "m", {name: torch.zeros(0)})
    with pytest.raises(FormatError, match=rf"the checkpoint is broken: '{name}' is empty"):
        planned(folder, rank=4)
    assert len(planned(folder, rank=4, exclude=[name]).targets) == 14


def test_an_empty_stack_of_experts(tmp_path: Path) -> None:
    folder = FAMILIES["gpt_oss"].save(tmp_path / "m")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = load_file(folder / "model.safetensors")
    for shape in ((0,), (4, 0, 96)):
        save_file({**stored, name: torch.zeros(shape)}, folder / "model.safetensors")
        for split in (None, True):
            with pytest.raises(FormatError, match=rf"the checkpoint is broken: '{name}' is empty"):
                planned(folder, rank=4, split=split)


def test_what_may_be_empty(llama: Path, tmp_path: Path) -> None:
    """Buffers, a head for no classes, an embedding of no rows, and what loaders leave out."""
    change = {
        "model.layers.0.self_attn.cache": torch.zeros(0),
        "model.layers.0.self_attn.positions": torch.zeros(0, dtype=torch.int64),
        "score.weight": torch.zeros(0, 48),
        "score.bias": torch.zeros(0),
        "model.token_type_embeddings.weight": torch.zeros(0, 48),
        "mtp.layers.0.self_attn.q_proj.weight": torch.zeros(0),
        "model.layers.2.self_attn.q_proj.weight": torch.zeros(0),
    }
    steps = planned(_changed(llama, tmp_path / "m", change), rank=4)
    assert len(steps.targets) == 14
    assert change.keys() <= {item.tensor for item in steps.skipped}
    assert steps.notes == ()


def _notes(steps: Plan) -> list[str]:
    """Without those on weights of this model that are equal, where nobody knows whether its class ties them."""
    return [note for note in steps.notes if "holds the same weights" not in note]


@pytest.mark.parametrize("model_type", ["llama", "unheard of"])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "F64"), (torch.float8_e4m3fnuz, "F8_E4M3FNUZ"), (torch.complex64, "C64"), (torch.int64, "I64")],
)
def test_a_weight_of_another_dtype_is_noted(
    dtype: torch.dtype, name: str, model_type: str, llama: Path, tmp_path: Path
) -> None:
    stored = tensors_of(llama)
    others = [_QUERY, "model.layers.1.mlp.up_proj.weight"]
    change = {key: stored[key].to(dtype) for key in [*others, "model.norm.weight", "model.embed_tokens.weight"]}
    folder = _changed(llama, tmp_path / "m", change, model_type=model_type)
    steps = planned(folder, rank=4)
    assert len(steps.targets) == 12
    reasons = {item.tensor: item.reason for item in steps.skipped}
    assert all(name in reasons[key] for key in others)
    if dtype.is_floating_point:  # what is no target in any dtype has that for a reason
        assert "a vector" in reasons["model.norm.weight"]
        assert re.search("embedding|recipe", reasons["model.embed_tokens.weight"])
    (note,) = _notes(steps)
    assert note.startswith("2 of 14 tensors that would be targets are passed over, ")
    assert name in note
    assert any(key in note for key in others)
    progress = Silent()
    surgery.factorize(folder, tmp_path / "f", rank=4, progress=progress)
    assert note in progress.notes
    # Not if nobody wants them.
    assert _notes(planned(folder, rank=4, exclude=others)) == []
    assert _notes(planned(folder, rank=4, include=["*.o_proj.weight"])) == []


def test_a_flat_weight_is_noted_where_a_rule_takes_it(llama: Path, tmp_path: Path) -> None:
    flat = tensors_of(llama)[_QUERY].flatten()[:1000]
    folder = _changed(llama, tmp_path / "m", {_QUERY: flat})
    steps = planned(folder, rank=4)
    assert [note for note in steps.notes if "a vector" in note and _QUERY in note]
    assert planned(folder, rank=4, include=["*"], exclude=["*o_proj*"]).notes == ()


def _names(steps: Plan) -> list[str]:
    return sorted(re.sub(r"\.\d+\.", ".N.", target.tensor) for target in steps.targets)


def test_include_and_exclude(llama: Path) -> None:
    assert set(_names(planned(llama, include=["*q_proj*"]))) == {"model.layers.N.self_attn.q_proj.weight"}
    assert set(_names(planned(llama, include=["*q_proj*", "*k_proj*"], exclude=["*.1.*"]))) == {
        "model.layers.N.self_attn.q_proj.weight",
        "model.layers.N.self_attn.k_proj.weight",
    }
    assert not [name for name in _names(planned(llama, exclude=["*mlp*"])) if "mlp" in name]
    assert _names(planned(llama, include=["lm_head.weight", "model.embed_tokens.weight"], rank=3)) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    # What is no matrix cannot be asked for.
    with pytest.raises(OptionError, match="nothing that --include matches") as caught:
        planned(llama, include=["*layernorm*"])
    assert "input_layernorm.weight (a vector (norm, bias))" in str(caught.value)
    _check_the_glob_of(caught.value, "vectors are never targets; --include ", llama)
    with pytest.raises(OptionError, match="nothing that --include matches") as caught:
        planned(llama, include=["*q_proj*"], exclude=["*q_proj*"])
    assert "--exclude takes out all that --include matches" in str(caught.value.hint)


def _check_the_glob_of(error: OptionError, before: str, model: Path) -> None:
    """That the hint gives an option that works."""
    hint = str(error.hint)
    assert hint.startswith(before)
    _, glob, *_ = shlex.split(hint[hint.index("--include ") :])
    assert planned(model, include=[glob], rank=4).targets


def test_the_scales_of_a_weight_cannot_be_asked_for_but_the_weight_can(llama: Path, tmp_path: Path) -> None:
    model = quantize_model(llama, tmp_path / "m")
    with pytest.raises(OptionError, match="nothing that --include matches") as caught:
        planned(model, include=["*up_proj.weight_scale_inv"])
    assert "up_proj.weight_scale_inv (the scales of an FP8 weight)" in str(caught.value)
    _check_the_glob_of(caught.value, "give the name of the weight that it belongs to: --include ", model)
    assert "up_proj.weight" in str(caught.value.hint)


def test_a_glob_that_takes_nothing_beside_others_is_noted(llama: Path, tmp_path: Path) -> None:
    (note,) = planned(llama, rank=4, include=["*q_proj*", "*norm.weight"]).notes
    assert note.startswith("--include '*norm.weight' takes no tensor: a vector (norm, bias) (first: model.")
    assert planned(llama, rank=4, include=["*q_proj*", "*"]).notes == ()
    tensors = {"layers.0.q.weight": torch.randn(8, 8), "layers.0.one.weight": torch.randn(1, 8)}
    save_file({**tensors, "layers.0.conv.weight": torch.randn(8, 1, 4)}, tmp_path / "model.safetensors")
    assert set(planned(tmp_path, rank=2, include=["*.q.weight", "*.one.weight", "*conv.weight"]).notes) == {
        "--include '*.one.weight' takes no tensor: a single row or column (first: layers.0.one.weight)",
        "--include '*conv.weight' takes no tensor: a depthwise convolution (first: layers.0.conv.weight)",
    }
    assert planned(tmp_path, rank=2, include=["*"]).notes == ()  # a wide glob matches them by chance
    assert planned(tmp_path, rank=2).notes == ()


def test_glob_that_matches_nothing_names_near_misses(llama: Path) -> None:
    with pytest.raises(OptionError, match=r"--include '\*qproj\*' matches no tensor") as caught:
        planned(llama, include=["*qproj*"])
    assert "q_proj" in str(caught.value)
    with pytest.raises(OptionError, match="--exclude"):
        planned(llama, exclude=["nothing"])


def test_model_without_targets_lists_what_came_close(tmp_path: Path) -> None:
    save_file({"head.weight": torch.randn(4, 4), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="is a target") as caught:
        planned(tmp_path)
    assert "head.weight (an output head)" in str(caught.value)


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one(llama: Path, rank: int) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        planned(llama, rank=rank)


def test_rank_is_cut_to_small_matrices_and_says_so(llama: Path) -> None:
    steps = planned(llama, rank=32)
    assert {target.rank for target in steps.targets if "k_proj" in target.tensor} == {24}
    assert {target.rank for target in steps.targets if "q_proj" in target.tensor} == {32}
    assert len(steps.notes) == 1
    assert "larger than 4 of 14 targets" in steps.notes[0]
    assert steps.trainable == 4 * 24 + 10 * 32
    with pytest.raises(OptionError, match="larger than every target") as caught:
        planned(llama, rank=1000)
    assert "at most 48" in str(caught.value)


def test_targets_of_one_tensor_are_found_together_in_their_order(tmp_path: Path) -> None:
    targets = planned(FAMILIES["phi3"].save(tmp_path / "m"), rank=2, split=True).targets
    mixed = [*targets[1::2], *targets[::2]]
    found = by_tensor(mixed)
    tensors = [target.key.partition("[")[0] for target in mixed]
    assert list(found) == list(dict.fromkeys(tensors))
    assert found == {name: [mixed[i] for i, own in enumerate(tensors) if own == name] for name in tensors}
    assert any(len(parts) > 1 for parts in found.values())


_MIXTURE = {"model_type": "unheard of", "text_config": {"num_local_experts": 16, "num_experts_per_tok": 2}}
_JOINED = "experts joined in one matrix, and config.json does not tell how many"


@pytest.mark.parametrize(
    ("name", "shape", "config", "reason"),
    [
        # A gate that chooses experts, and gates of layers.
        ("language_model.model.layers.0.mlp.gate.weight", (16, 4096), _MIXTURE, "a router"),
        ("model.layers.0.mlp.gate.wg.weight", (16, 4096), _MIXTURE, "a router"),
        ("model.layers.0.mlp.gate.weight", (17, 4096), _MIXTURE, "a router"),
        ("model.layers.0.mlp.gate.weight", (4096, 16), _MIXTURE, "a router"),
        ("model.layers.0.mlp.gate.weight", (11008, 4096), _MIXTURE, None),
        ("model.layers.0.self_attn.gate.weight", (16, 4096), _MIXTURE, None),
        ("layers.0.feed_forward.gate.weight", (8, 4096), {}, "a router"),
        ("layers.0.feed_forward.gate.weight", (11008, 4096), {}, None),
        ("layers.0.altup.modality_router.weight", (4, 2048), {"model_type": "gemma3n_text"}, "a router"),
        ("encoder.layers.0.gateway.gate.weight", (512, 512), {"model_type": "d_fine"}, None),
        # Towers, projectors and heads.
        ("model.vision_embed_tokens.img_processor.vision_model.encoder.layers.3.mlp.fc1.weight", (4096, 1024), {}, None),
        ("model.vision_embed_tokens.img_projection.0.weight", (3072, 4096), {}, "an embedding"),
        ("model.mm_projector.0.weight", (4096, 1024), {}, "outside the transformer blocks"),
        ("mlp1.3.weight", (4096, 4096), {}, "outside the transformer blocks"),
        ("action_head.model.transformer_blocks.3.attn1.to_q.weight", (64, 64), {}, None),
        ("mask_decoder.iou_prediction_head.layers.1.weight", (256, 256), {}, "an output head"),
        ("model.decoder.bbox_embed.0.layers.1.weight", (256, 256), {}, "an output head"),
        ("lm_heads.0.weight", (2048, 1024), {}, "an output head"),
        ("encoder.blocks.0.1.attention.q_head.weight", (768, 768), {}, None),
        ("bert.pooler.dense.weight", (768, 768), {}, "a pooler"),
        # What decides where to look, and what modulates, is a layer like any other.
        ("model.layers.0.self_attn.indexer.wq_b.weight", (8192, 1536), {"model_type": "deepseek_v32"}, None),
        ("model.layers.0.self_attn.indexer.weights_proj.weight", (64, 7168), {"model_type": "deepseek_v32"}, None),
        ("decoder.layers.0.encoder_attn.sampling_offsets.weight", (256, 256), {}, None),
        ("flow.blocks.2.adaLN_modulation.1.weight", (1536, 512), {}, None),
        ("flow.final_layer.adaLN_modulation.1.weight", (1024, 512), {}, "outside the transformer blocks"),
        # Tables.
        ("quantizer.quantizers.3.codebook.weight", (1024, 8), {}, "an embedding"),
        ("encoder.layers.3.attn.rel_pos_emb.weight", (1025, 128), {}, "an embedding"),
        ("encoder.layers.3.position_wise_ffn.w_1.weight", (64, 32), {}, None),
        ("encoder.layers.3.decomposition.weight", (64, 32), {}, None),
        # Adapters inside of a model.
        ("model.layers.0.mlp.down_proj.lora_A.speech.weight", (320, 8192), {"model_type": "phi4mm"}, "part of a LoRA adapter"),
        ("model.layers.0.mlp.down_proj.base_layer.weight", (3072, 8192), {"model_type": "phi4_multimodal"}, None),
        # Experts.
        ("transformer.blocks.0.ffn.experts.mlp.w1", (64, 48), {}, _JOINED),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", (64, 48), _MIXTURE, None),
        ("model.layers.0.mlp.experts.gate_up_proj", (16, 64, 48), _MIXTURE, None),
        ("model.layers.0.mlp.shared.up_proj.weight", (64, 48), _MIXTURE, None),
        ("decoder.shared.weight", (64, 48), {}, "an embedding"),
        ("model.layers.0.moe.w1", (16, 64, 48), _MIXTURE, None),
        ("model.layers.0.moe.gate_w", (16, 48), _MIXTURE, "no weight of a linear layer"),
    ],
)
def test_names_of_repositories(name: str, shape: tuple[int, ...], config: dict[str, object], reason: str | None) -> None:
    fates = choose(
        TensorEntry(name, "BF16", shape, 0, 1), "f", Options(), Model(config, recipe_for_family(config), Quantization())
    )
    assert [fate.reason if isinstance(fate, Skipped) else None for fate in fates] == [reason]


@pytest.mark.parametrize("options", [Options(), Options(split=False), Options(include=("*",))])
def test_experts_below_one_another_are_matrices_of_their_own(options: Options) -> None:
    """As in DBRX and nomic's mixture."""
    name = "encoder.layers.1.mlp.experts.mlp.w2"
    config = {"num_experts": 16, "moe_top_k": 2}
    fates = choose(TensorEntry(name, "BF16", (16 * 24, 32), 0, 1), "f", options, Model(config, None, Quantization()))
    assert [(fate.key, fate.matrices) for fate in fates if isinstance(fate, Target)] == [
        (f"{name}[expert_{i}]", (1, 24, 32)) for i in range(16)
    ]


def test_a_recipe_may_keep_a_fused_weight_whole(tmp_path: Path) -> None:
    """A recipe of one's own sees a weight as it says, and splits nothing by itself."""
    (tmp_path / "r.toml").write_text('[[rules]]\nmatch = "*.in_proj_weight"\nview = "matrix"')
    entry = TensorEntry("blocks.0.attn.in_proj_weight", "BF16", (96, 32), 0, 1)
    for recipe, keys in ((read_recipe(tmp_path / "r.toml"), [""]), (None, ["[q]", "[k]", "[v]"])):
        fates = choose(entry, "f", Options(), Model({}, recipe, Quantization()))
        assert [fate.key for fate in fates if isinstance(fate, Target)] == [entry.name + key for key in keys]
