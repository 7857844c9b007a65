"""Adapters that are written in the layouts of diffusers and kohya: pipelines load and fuse them, and give what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file

import surgery
from surgery.errors import OptionError
from surgery.updates.adapters.reading import read_adapters
from surgery.updates.writing.low_rank import AdapterForm, Layout
from tests.families import FAMILIES
from tests.models import tensors_of
from tests.releases import needs, under_names_of
from tests.updates.merging import assert_equal, entries_of, merged_by_us
from tests.updates.writing import LowRank

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning", "ignore::UserWarning")

_names_text_encoders = needs("diffusers", ">=0.41", "kohya's names of today's text encoders")
#: Without annotations.
_Unet: Any = diffusers.UNet2DConditionModel
_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the components of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    FAMILIES["UNet"].save(folder / "unet")
    FAMILIES["Flux"].save(folder / "transformer")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=50, max_position_embeddings=8, **sizes, **special)).save_pretrained(
        folder / "text_encoder"
    )
    return folder


def _pipeline(parts: Path) -> Any:
    load: Any = hf.CLIPTextModel.from_pretrained
    pipeline: Any = diffusers.StableDiffusionPipeline
    return pipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=load(parts / "text_encoder"),
        tokenizer=None,
        unet=_Unet.from_pretrained(parts / "unet"),
        scheduler=diffusers.DDIMScheduler(),  # type: ignore[no-untyped-call]
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flux(parts: Path) -> Any:
    pipeline: Any = diffusers.FluxPipeline
    model: Any = diffusers.FluxTransformer2DModel
    rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipeline(transformer=model.from_pretrained(parts / "transformer"), scheduler=scheduler, **rest)


def _fused(pipeline: Any, component: str, path: Path, out: Path) -> dict[str, torch.Tensor]:
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora(components=[component])
    pipeline.unload_lora_weights()
    getattr(pipeline, component).save_pretrained(out)
    return {name: tensor.double() for name, tensor in tensors_of(out).items()}


@needs("diffusers", ">=0.39", "kohya's names of all layers")
@pytest.mark.parametrize(
    ("component", "form"),
    [
        ("unet", AdapterForm("diffusers")),
        ("unet", AdapterForm("diffusers", "BF16", uniform_rank=True)),
        ("unet", AdapterForm("kohya", name="style")),
        ("unet", AdapterForm("kohya", "F16", uniform_rank=True, name="style")),
        ("text_encoder", AdapterForm("diffusers")),
        pytest.param("text_encoder", AdapterForm("kohya", name="style"), marks=_names_text_encoders),
        ("transformer", AdapterForm("diffusers")),
    ],
    ids=lambda one: one if isinstance(one, str) else f"{one.layout}-{one.dtype}{'-padded' * one.uniform_rank}",
)
def test_a_pipeline_adds_what_was_meant(component: str, form: AdapterForm, parts: Path, tmp_path: Path) -> None:
    """Of all weights: as it fuses them, and read by us."""
    form = AdapterForm(form.layout, form.dtype, component, form.uniform_rank, name=form.name)
    folder = parts / component
    low = LowRank(folder, lambda name, shape: component != "text_encoder" or any(layer in name for layer in _LAYERS))
    adapter = low.write(tmp_path / "lora", form)
    (path,) = (tmp_path / "lora").iterdir()
    truth = low.after({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[form.dtype])
    pipeline = _flux(parts) if component == "transformer" else _pipeline(parts)
    fused = under_names_of(low.before, _fused(pipeline, component, path, tmp_path / "fused"))
    assert_equal(fused, truth, low.before)
    for given in (path, tmp_path / "lora"):
        update = read_adapters([(given, 1.0)], folder, entries_of(folder), component)
        assert_equal(merged_by_us(folder, update), truth, low.before)
    assert adapter.modules == len(low.tensors)


@needs("diffusers", ">=0.39", "kohya's names of all layers")
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("component", ["unet", pytest.param("text_encoder", marks=_names_text_encoders)])
def test_exported_scales_and_cores_do_in_a_pipeline_what_fold_does(
    component: str, to: Any, parts: Path, tmp_path: Path
) -> None:
    include = ["*attn*", "*proj*"] if component == "unet" else ["*.mlp.*", "*_proj*"]
    surgery.factorize(parts, tmp_path / "f", subfolder=component, rank=3, include=include, exclude=["*norm*", "*.bias"])
    targets = surgery.inspect(tmp_path / "f").targets
    generator = torch.Generator().manual_seed(0)
    for train, start in (("scales", torch.ones(3)), ("core", torch.eye(3))):
        values = {one.key: start + 0.3 * torch.randn(start.shape, generator=generator) for one in targets}
        report = surgery.export(tmp_path / "f", values, tmp_path / train, to=to)
        assert (report.format, report.modules, report.rank, report.trainable) == (to, len(targets), 3, 0)
        surgery.export(tmp_path / "f", values, tmp_path / train, to=to)  # is there already
        (path,) = (tmp_path / train).iterdir()
        fused = _fused(_pipeline(parts), component, path, tmp_path / f"fused-{train}")
        surgery.fold(tmp_path / "f", values, tmp_path / f"o-{train}")
        folded = tensors_of(tmp_path / f"o-{train}")
        for name, tensor in under_names_of(folded, fused).items():
            torch.testing.assert_close(tensor, folded[name].double(), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_no_part_of_a_pipeline_is_refused(tmp_path: Path) -> None:
    surgery.factorize(FAMILIES["llama"].save(tmp_path / "m"), tmp_path / "f", rank=2)
    with pytest.raises(OptionError, match="is for a component of a diffusion pipeline"):
        surgery.export(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "a", to="diffusers")


def test_other_releases_are_told_of_the_ranks(parts: Path, tmp_path: Path) -> None:
    """In the metadata, which diffusers follows since 0.34, and with one alpha for all modules of kohya's file."""
    low = LowRank(parts / "unet", lambda name, shape: "attn1" in name)
    low.write(tmp_path / "diffusers", AdapterForm("diffusers", component="unet"))
    with safe_open(tmp_path / "diffusers/pytorch_lora_weights.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"]
    assert {*config["unet.rank_pattern"].values()} == {1, 2, 3, 4}
    low.write(tmp_path / "kohya", AdapterForm("kohya", component="unet"))
    with safe_open(tmp_path / "kohya/adapter.safetensors", "pt") as file:
        alphas = {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
    assert alphas == {4}


def test_the_transformer_in_kohyas_layout_comes_back(parts: Path, tmp_path: Path) -> None:
    """ComfyUI takes these names; diffusers has none such for it."""
    folder = parts / "transformer"
    low = LowRank(folder, lambda name, shape: True)
    low.write(tmp_path / "lora", AdapterForm("kohya", component="transformer"))
    update = read_adapters([(tmp_path / "lora/adapter.safetensors", 1.0)], folder, entries_of(folder), "transformer")
    assert_equal(merged_by_us(folder, update), low.after(), low.before)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_these_layouts_cannot_say_is_refused(layout: Layout, parts: Path) -> None:
    low = LowRank(parts / "text_encoder", lambda name, shape: "embedding" in name)
    with pytest.raises(OptionError, match=r"position_embedding(.|\n)*an embedding, by its name"):
        low.adapter(AdapterForm(layout, component="text_encoder"))
    unet = LowRank(parts / "unet", lambda name, shape: "to_q" in name)
    with pytest.raises(OptionError, match=r"to_q(.|\n)*a layer of a text encoder that diffusers does not adapt"):
        unet.adapter(AdapterForm(layout, component="text_encoder"))
    for component in (None, "vae"):
        with pytest.raises(OptionError, match=f"the layout {layout} is for a component of a diffusion pipeline"):
            low.adapter(AdapterForm(layout, component=component))
    with pytest.raises(OptionError, match=rf"'conv_out\.bias' cannot be(.|\n)*for which the layout {layout} has no place"):
        unet.adapter(AdapterForm(layout, component="unet"), ["conv_out.bias"])


def test_two_layers_of_one_name_in_kohyas_layout(tmp_path: Path) -> None:
    save_file({"a.b_c.weight": torch.ones(4, 4), "a_b.c.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    low = LowRank(tmp_path, lambda name, shape: True)
    low.folder = None  # type: ignore[assignment]
    with pytest.raises(OptionError, match=r"'a_b\.c\.weight' cannot be(.|\n)*a layer that kohya's layout calls as 'a\.b_c'"):
        low.adapter(AdapterForm("kohya", component="unet"))
