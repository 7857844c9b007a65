"""Adapters of diffusion models in diffusers' and kohya's layouts: equal to what diffusers fuses, onto one component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import load_file, save_file

from surgery.errors import SurgeryError, SurgeryWarning
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.adapters.reading import read_adapters
from tests.models import tensors_of
from tests.releases import needs
from tests.updates.merging import adapt, assert_equal, entries_of, merged_by_us

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

#: Without annotations.
_Unet: Any = diffusers.UNet2DConditionModel
_maybe_map_sgm_blocks_to_diffusers: Any = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers
_convert_non_diffusers_lora_to_diffusers: Any = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers
_MODULES = ["to_q", "to_k", "to_out.0", "conv1", "conv_shortcut", "time_emb_proj", "proj_in"]
#: Modules of the original UNet, as kohya's scripts call them for SDXL -> in diffusers' (two layers in a block).
_ORIGINAL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_1_1_transformer_blocks_0_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_2_1_proj_in": "down_blocks.0.attentions.1.proj_in",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_0_emb_layers_1": "down_blocks.1.resnets.1.time_emb_proj",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_0_attn2_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_1_0_in_layers_2": "up_blocks.0.resnets.1.conv1",
    "output_blocks_3_1_transformer_blocks_0_ff_net_2": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    "output_blocks_5_0_skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "time_embed_0": "time_embedding.linear_1",
    "out_2": "conv_out",
}


def _unet() -> Any:
    torch.manual_seed(0)
    return _Unet(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet")
    _unet().save_pretrained(folder)
    return folder


def _halves(unet: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter of the UNet in PEFT's layout, without PEFT's prefix."""
    adapt(_Unet.from_pretrained(unet), folder, target_modules=_MODULES, **options)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def _fused(unet: Path, tensors: Mapping[str, torch.Tensor], out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What diffusers itself makes of an adapter."""
    model: Any = _Unet.from_pretrained(unet)
    model.load_lora_adapter(dict(tensors), prefix="unet", **options)
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(out)
    return tensors_of(out)


def _read(unet: Path, path: Path, component: str | None = "unet") -> AdapterUpdate:
    return read_adapters([(path, 1.0)], unet, entries_of(unet), component)


def _others() -> dict[str, torch.Tensor]:
    return {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 8)}


#: Older releases take one rank as the alpha of all modules where a file has no alphas, the newest each module's own.
_scales_by_one = needs("diffusers", ">=0.40", "a scaling of 1 for all ranks")
#: Older releases take no module outside of blocks, as conv_in, from kohya's names, nor the original names of such.
_knows_outer = needs("diffusers", ">=0.39", "kohya's names of conv_in and its like")


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, pytest.param({"r": 2, "rank_pattern": {"conv1": 4}}, marks=_scales_by_one)],
    ids=range(3),
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_the_layout_of_diffusers(options: dict[str, Any], in_folder: bool, unet: Path, tmp_path: Path) -> None:
    halves = {f"unet.{name}": tensor for name, tensor in _halves(unet, tmp_path / "lora", **options).items()}
    (tmp_path / "own").mkdir()
    path = tmp_path / "own/pytorch_lora_weights.safetensors"
    save_file(halves, path)
    update = _read(unet, path.parent if in_folder else path)
    assert_equal(merged_by_us(unet, update), _fused(unet, halves, tmp_path / "fused"), tensors_of(unet))
    assert update.accounts[0].keys() == halves.keys()


def test_other_components_are_told(unet: Path, tmp_path: Path) -> None:
    halves = {f"unet.{name}": tensor for name, tensor in _halves(unet, tmp_path / "lora").items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(halves | _others(), path)
    with pytest.warns(SurgeryWarning, match="only the tensors for unet are merged; there are others: 1 for text_encoder"):
        update = _read(unet, path)
    assert update.accounts[0].keys() == halves.keys()
    with pytest.raises(SurgeryError, match="is for several components of a diffusion model"):
        _read(unet, path, None)
    with pytest.raises(SurgeryError, match=r"nothing of it is for transformer\n  got: +1 for text_encoder, \d+ for unet"):
        _read(unet, path, "transformer")
    save_file(halves, path)
    assert _read(unet, path, None).digests() == update.digests()


def test_the_layout_that_diffusers_once_had(unet: Path, tmp_path: Path) -> None:
    halves = {f"unet.{name}": tensor for name, tensor in _halves(unet, tmp_path / "lora").items()}
    truth = _fused(unet, halves, tmp_path / "fused")
    old = {}
    for name, tensor in halves.items():
        name = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        for projection in ("to_q", "to_k", "to_out.0"):
            name = name.replace(f".{projection}.lora.", f".processor.{projection.removesuffix('.0')}_lora.")
        old[name] = tensor
    assert not old.keys() & halves.keys()
    save_file(old, tmp_path / "pytorch_lora_weights.safetensors")
    assert_equal(merged_by_us(unet, _read(unet, tmp_path / "pytorch_lora_weights.safetensors")), truth, tensors_of(unet))
    assert_equal(_fused(unet, old, tmp_path / "again"), truth, tensors_of(unet))


def test_ranks_and_alphas_in_the_metadata(unet: Path, tmp_path: Path) -> None:
    options = {"rank_pattern": {"conv1": 5}, "alpha_pattern": {"to_q": 9}, "use_rslora": True}
    halves = {f"unet.{name}": tensor for name, tensor in _halves(unet, tmp_path / "lora", **options).items()}
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    metadata = {f"unet.{key}": value for key, value in config.items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(halves, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    truth = _fused(unet, halves, tmp_path / "fused", metadata=metadata)
    for component in ("unet", None):
        assert_equal(merged_by_us(unet, _read(unet, path, component)), truth, tensors_of(unet))
    wrong = json.dumps(metadata | {"unet.r": 4})
    save_file(halves, path, {"format": "pt", "lora_adapter_metadata": wrong})
    with pytest.raises(SurgeryError, match="contradicts its config"):
        _read(unet, path)


@_scales_by_one
def test_metadata_of_another_component(unet: Path, tmp_path: Path) -> None:
    """It has no alphas for this one: a scaling of 1."""
    halves = {f"unet.{name}": one for name, one in _halves(unet, tmp_path / "lora", rank_pattern={"conv1": 5}).items()}
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    other = json.dumps({f"text_encoder.{key}": value for key, value in config.items()})
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(halves, path, {"format": "pt", "lora_adapter_metadata": other})
    assert_equal(merged_by_us(unet, _read(unet, path)), _fused(unet, halves, tmp_path / "plain"), tensors_of(unet))


def _of_kohya(unet: Path, names: Mapping[str, str], *, dora: bool, alpha: bool = True) -> dict[str, torch.Tensor]:
    """kohya's names -> matrices for the modules that they stand for, each with an alpha of its own."""
    generator, shapes = torch.Generator().manual_seed(3), {name: entry.shape for name, entry in entries_of(unet).items()}
    tensors = {}
    for number, (name, module) in enumerate(names.items()):
        out, *inputs = shapes[f"{module}.weight"]
        tensors[f"lora_unet_{name}.lora_down.weight"] = 0.1 * torch.randn(3, *inputs, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = 0.1 * torch.randn(out, 3, *(1,) * (len(inputs) - 1), generator=generator)
        if alpha:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0 + number % 2)
        if dora:
            norms = load_file(unet / "diffusion_pytorch_model.safetensors")[f"{module}.weight"].flatten(1).norm(dim=1)
            scale = norms * (1 + 0.2 * torch.rand(out, generator=generator))
            tensors[f"lora_unet_{name}.dora_scale"] = scale.view(out, *(1,) * len(inputs))
    return tensors


@_knows_outer
@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("original", [True, False])
def test_the_layout_of_kohya(original: bool, alpha: bool, unet: Path, tmp_path: Path) -> None:
    names = _ORIGINAL if original else {module.replace(".", "_"): module for module in _ORIGINAL.values()}
    tensors = _of_kohya(unet, names, dora=False, alpha=alpha)
    save_file(tensors, tmp_path / "style.safetensors")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for name, tensor in tensors.items():  # diffusers looks alphas up by names that it then gives up
        if name.endswith(".alpha"):
            plain[name.replace(".alpha", ".lora_down.weight")] *= tensor / 3
    layers: Any = SimpleNamespace(layers_per_block=2)
    mapped = _maybe_map_sgm_blocks_to_diffusers(plain, layers) if original else plain
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    truth = _fused(unet, converted, tmp_path / "fused")
    update = _read(unet, tmp_path / "style.safetensors")
    assert_equal(merged_by_us(unet, update), truth, tensors_of(unet))
    assert update.accounts[0].keys() == tensors.keys()
    assert _read(unet, tmp_path).digests() == update.digests()  # a folder with this one file


def test_names_without_dots_that_two_modules_have(tmp_path: Path) -> None:
    save_file({"a.b_c.weight": torch.ones(4, 4), "a_b.c.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    tensors = {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 4), "lora_unet_a_b_c.lora_up.weight": torch.ones(4, 1)}
    entries = entries_of(tmp_path)
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(SurgeryError, match=r"could be of any of several modules(.|\n)*a\.b_c, a_b\.c"):
        read_adapters([(tmp_path / "style.safetensors", 1.0)], None, entries, "unet")


def test_dora_of_kohya(unet: Path, tmp_path: Path) -> None:
    """Against the formula of LyCORIS, in float64: the rows of the sum have the scale as their norms."""
    names = {module.replace(".", "_"): module for module in _ORIGINAL.values()}
    tensors = _of_kohya(unet, names, dora=True)
    save_file(tensors, tmp_path / "style.safetensors")
    before = tensors_of(unet)
    truth = {name: tensor.double() for name, tensor in before.items()}
    for name, module in names.items():
        weight = truth[f"{module}.weight"]
        up, down, alpha, scale = (
            tensors[f"lora_unet_{name}.{part}"].double()
            for part in ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")
        )
        total = weight.flatten(1) + up.flatten(1) @ down.flatten(1) * alpha / 3
        truth[f"{module}.weight"] = (total / total.norm(dim=1, keepdim=True) * scale.view(-1, 1)).view(weight.shape)
    assert_equal(merged_by_us(unet, _read(unet, tmp_path / "style.safetensors")), truth, before)


def test_a_text_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    hf.CLIPTextModel(config).save_pretrained(tmp_path / "te")
    before = tensors_of(tmp_path / "te")
    name = next(name for name in before if name.endswith("self_attn.q_proj.weight"))
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    down, up = 0.1 * torch.randn(3, 16), 0.1 * torch.randn(16, 3)
    truth = before | {name: before[name].double() + up.double() @ down.double() * 2 / 3}
    alpha = torch.tensor(2.0)
    old = module.replace("q_proj", "to_q_lora")
    for tensors in (
        {
            f"lora_te1_{module.replace('.', '_')}.lora_down.weight": down,
            f"lora_te1_{module.replace('.', '_')}.lora_up.weight": up,
        }
        | {f"lora_te1_{module.replace('.', '_')}.alpha": alpha},
        {f"text_encoder.{module}.lora_linear_layer.down.weight": down * 2 / 3}
        | {f"text_encoder.{module}.lora_linear_layer.up.weight": up},
        {f"text_encoder.{old}.down.weight": down, f"text_encoder.{old}.up.weight": up * 2 / 3},
        {f"text_encoder.{module}.lora_A.weight": down, f"text_encoder.{module}.lora_B.weight": up * 2 / 3},
    ):
        save_file(tensors, tmp_path / "style.safetensors")
        update = _read(tmp_path / "te", tmp_path / "style.safetensors", "text_encoder")
        assert_equal(merged_by_us(tmp_path / "te", update), truth, before)


_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{_Q}.lora_mid.weight": torch.ones(3, 3)}, r"is no part of a LoRA update(.|\n)*LoCon with a core"),
        ({f"{_Q}.hada_w1_a": torch.ones(3, 3)}, r"is no part of a LoRA update(.|\n)*LoHa"),
        ({f"{_Q}.lokr_w1": torch.ones(3, 3)}, r"is no part of a LoRA update(.|\n)*LoKr"),
        ({f"{_Q}.diff": torch.ones(3, 3)}, r"is no part of a LoRA update(.|\n)*a full difference"),
        ({f"{_Q}.something": torch.ones(3, 3)}, r"something' is no part of a LoRA update(.|\n)*F32 \[3, 3\]"),
        ({"unet.norm.weight": torch.ones(3)}, "'unet.norm.weight' is no part of a LoRA update"),
        ({"anything": torch.ones(3)}, "'anything' is no part of a LoRA update"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(3, 3)},
            "a module that is not in this checkpoint",
        ),
        ({f"{_Q}.lora_up.weight": None}, "lacks a half of its update"),
        ({f"{_Q}.alpha": torch.ones(2)}, "the alpha of .* is no number"),
        ({f"{_Q}.alpha": torch.tensor(torch.nan)}, "holds NaN or infinity"),
        ({f"{_Q}.dora_scale": torch.ones(1, 16)}, "the magnitude of .* does not fit"),
        ({f"{_Q}.dora_scale": torch.ones(15)}, "the magnitude of .* does not fit"),
        ({f"{_Q}.lora_down.weight": torch.ones(3, 17)}, "does not fit its weight"),
        ({f"{_Q}.lora_down.weight": torch.ones(2, 16)}, "the halves of .* do not fit"),
        (
            {f"unet.{_ORIGINAL['input_blocks_1_1_transformer_blocks_0_attn1_to_q']}.lora_A.weight": torch.ones(3, 16)},
            "two tensors",
        ),
        ({f"{_Q}.lora_up.weight": torch.zeros(16, 3)}, "changes nothing"),
    ],
    ids=range(17),
)
def test_what_is_refused(change: dict[str, torch.Tensor | None], message: str, unet: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    good: dict[str, torch.Tensor] = {f"{_Q}.lora_down.weight": torch.ones(3, 16), f"{_Q}.lora_up.weight": torch.ones(16, 3)}
    save_file(good, path)
    assert _read(unet, path).tensors()
    save_file({name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}, path)
    with pytest.raises(SurgeryError, match=message) as caught:
        _read(unet, path)
    assert len(str(caught.value)) < 1000
