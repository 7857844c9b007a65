"""Training scales in a loaded model: what is trained is what is folded."""

from __future__ import annotations

import copy
import io
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, PermuteForRope, Transpose, WeightConverter

import surgery
from surgery.errors import FormatError, MissingExtra, OptionError, SourceError, SurgeryWarning
from surgery.planning.plan import Layout
from surgery.training.ways import Way
from tests.families import FAMILIES
from tests.models import save_llama
from tests.releases import has


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


IDS = torch.arange(40)[None]


def _randomize(scales: surgery.Scales) -> None:
    generator = torch.Generator().manual_seed(1)
    for delta in scales.parameters():
        delta.data = 0.5 * torch.randn(delta.shape, generator=generator)


def _train(model: torch.nn.Module, scales: surgery.Scales, steps: int = 5) -> None:
    optimizer = torch.optim.Adam(scales.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


#: What is trained -> how many numbers of 8 directions.
NUMBERS: dict[Way, int] = {"scales": 8, "core": 64, "orthogonal": 28 + 16}


@pytest.mark.parametrize("train", NUMBERS)
@pytest.mark.parametrize(("layout", "loaded"), [("residual", "factorized"), ("residual", "original"), ("overlay", "original")])
def test_what_is_trained_is_what_is_folded(layout: Layout, loaded: str, train: Way, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8, layout=layout)
    model = _load(tmp_path / "f" if loaded == "factorized" else llama)
    scales = surgery.attach(model, tmp_path / "f", train=train)
    assert scales.train == train
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in scales.parameters()}
    assert sum(p.numel() for p in trainable) == 14 * NUMBERS[train]
    untouched = _load(llama)(IDS).logits
    if loaded == "original":
        assert torch.equal(model(IDS).logits, untouched)
    else:
        assert torch.allclose(model(IDS).logits, untouched, atol=1e-4)
    before = model(input_ids=IDS, labels=IDS).loss.item()
    _train(model, scales)
    attached = model(input_ids=IDS, labels=IDS)
    assert attached.loss.item() < before
    scales.save(tmp_path / "scales.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "scales.safetensors", tmp_path / "out", base=llama if layout == "overlay" else None)
    assert torch.allclose(_load(tmp_path / "out")(IDS).logits, attached.logits, atol=1e-4)
    assert not torch.allclose(attached.logits, untouched, atol=1e-2)


@pytest.mark.parametrize("train", NUMBERS)
def test_save_load_and_detach(train: Way, llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    model = _load(llama)
    names = set(model.state_dict())
    original = model(IDS).logits
    scales = surgery.attach(model, tmp_path / "f", train=train)
    _train(model, scales, 2)
    trained = model(IDS).logits
    scales.save(tmp_path / "s.safetensors")
    scales.detach()
    assert torch.equal(model(IDS).logits, original)
    assert set(model.state_dict()) == names
    again = surgery.attach(model, tmp_path / "f", train=train)
    again.load(tmp_path / "s.safetensors")
    assert torch.allclose(model(IDS).logits, trained, atol=1e-5)
    with pytest.raises(OptionError, match="attached to this model already"):
        surgery.attach(model, tmp_path / "f")


@pytest.mark.parametrize("train", ["scales", "core"])
def test_conv1d_stores_its_weight_transposed(train: Way, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4)
    model = _load(tmp_path / "m").eval()
    with pytest.raises(OptionError, match=r"'transformer\.h\.0\.attn\.c_attn\.weight' is not in this model"):
        surgery.attach(model.transformer.h[0], tmp_path / "f")
    scales = surgery.attach(model, tmp_path / "f", train=train)
    for value in scales.parameters():
        value.data.uniform_(-0.5, 0.5)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out")
    assert torch.allclose(_load(tmp_path / "out").eval()(IDS).logits, model(IDS).logits, atol=1e-4)


class _Odd(nn.Module):
    """Weights that are used in other ways than by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.line = nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.plane = nn.Conv2d(32, 16, 3, padding="same", padding_mode="reflect")
        self.space = nn.Conv3d(16, 32, 2, stride=2)
        self.back = nn.ConvTranspose1d(32, 24, 3, padding=1)
        self.bilinear = nn.Bilinear(24, 24, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.line((x + self.attention(x, x, x)[0]).mT)
        plane = self.plane(x[..., None].expand(-1, -1, -1, 4))
        space = self.space(plane[..., None].expand(-1, -1, -1, -1, 4))
        x = self.back(x + space.mean(dim=(2, 3, 4))[..., None]).mT
        return self.head(self.bilinear(x, x.flip(1)))


def test_any_module(tmp_path: Path) -> None:
    """Convolutions, tied embeddings, attention that reads its weights itself, modules that nothing is known of."""
    torch.manual_seed(0)
    model = _Odd().eval()
    weights = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    (tmp_path / "m").mkdir()
    save_file(weights, tmp_path / "m/model.safetensors")
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, include=["*weight"]).manifest
    assert len(manifest.targets) == 10  # in_proj_weight by queries, keys and values
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    scales = surgery.attach(model, tmp_path / "f")
    assert torch.equal(model(ids), before)
    _randomize(scales)
    attached = model(ids)
    attached.square().mean().backward()
    assert all(delta.grad is not None for delta in scales.parameters())
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out")
    folded = _Odd().eval()
    weights = load_file(tmp_path / "out/model.safetensors")
    folded.load_state_dict(weights | {"head.weight": weights["embed.weight"]})
    assert torch.allclose(folded(ids), attached, atol=1e-4)
    assert not torch.allclose(attached, before, atol=1e-1)
    with torch.no_grad():  # where attention has a fast path of its own
        assert torch.allclose(folded(ids), model(ids), atol=1e-4)


class _Resblock(nn.Module):
    """A block of open_clip's towers."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(32, 48), gelu=nn.GELU(), c_proj=nn.Linear(48, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _OpenClip(nn.Module):
    """The text tower of open_clip, in its names."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(40, 32)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(40, 32))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([_Resblock(), _Resblock()])})
        self.text_projection = nn.Parameter(torch.randn(32, 24))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer["resblocks"]:
            x = block(x)
        return x @ self.text_projection


@pytest.mark.parametrize("split", [None, False])
def test_attention_of_torch(split: bool | None, tmp_path: Path) -> None:
    """Its in_proj_weight is a target by default, as q, k and v; all the way round, as it was and as it is trained."""
    torch.manual_seed(0)
    model = _OpenClip().eval()
    (tmp_path / "m").mkdir()
    save_file(model.state_dict(), tmp_path / "m/model.safetensors")
    manifest = surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, split=split).manifest
    parts = ["[q]", "[k]", "[v]"] if split is None else [""]
    layers = [
        *(f"attn.in_proj_weight{part}" for part in parts),
        *(f"{x}.weight" for x in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")),
    ]
    assert {target.key for target in manifest.targets} == {f"transformer.resblocks.{i}.{x}" for i in (0, 1) for x in layers}
    surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()

    scales = surgery.attach(model, tmp_path / "f")
    _randomize(scales)
    attached = model(IDS)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out")
    folded = _OpenClip().eval()
    folded.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    assert torch.allclose(folded(IDS), attached, atol=1e-4)
    values = {key: 1 + delta.detach() for key, delta in zip(scales.values(), scales.parameters(), strict=True)}
    factors = load_file(next((tmp_path / "f/surgery").glob("factors-*")))
    before, after = (load_file(tmp_path / f"{x}/model.safetensors") for x in ("m", "out"))
    name = "transformer.resblocks.1.attn.in_proj_weight"
    for i, part in enumerate(parts):
        U, s, V = (factors[f"{name}{part}.{x}"].double() for x in ("U", "s", "V"))
        rows = slice(32 * i, 32 * i + len(U))
        expected = before[name][rows].double() + U * (s * (values[f"{name}{part}"].double() - 1)) @ V.T
        assert torch.equal(after[name][rows], expected.float())


@has("transformers.core_model_loading", "Interleave")
def test_names_and_shapes_are_followed_as_transformers_converts_them(tmp_path: Path) -> None:
    """A checkpoint whose weights are fused, interleaved, permuted and transposed against those in memory."""
    from transformers.core_model_loading import Interleave

    fused = [
        WeightConverter(
            "self_attn.qkv.weight",
            [f"self_attn.{name}_proj.weight" for name in "qkv"],
            operations=[Chunk(dim=0), PermuteForRope(permute_layer_names=["q_proj", "k_proj"])],
        ),
        WeightConverter(
            "mlp.both.weight",
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            operations=[Interleave(dim=0), Chunk(dim=0)],
        ),
        WeightConverter("mlp.down.weight", ["mlp.down_proj.weight"], operations=[Transpose(0, 1)]),
    ]
    known = get_checkpoint_conversion_mapping("llama")
    register_checkpoint_conversion_mapping("llama", fused, overwrite=True)
    try:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        llama = tmp_path / "m"
        transformers.LlamaForCausalLM(config).save_pretrained(llama)
        manifest = surgery.factorize(
            llama, tmp_path / "f", rank=4, include=["*_proj.*", "*.qkv.*", "*.both.*", "*.down.*"]
        ).manifest
        assert len(manifest.targets) == 4 * 2
        original = _load(llama)(IDS).logits
        ways: list[tuple[Path, Way]] = [
            (llama, "scales"),
            (tmp_path / "f", "scales"),
            (llama, "core"),
            (tmp_path / "f", "core"),
        ]
        for loaded, train in ways:
            model = _load(loaded)
            scales = surgery.attach(model, tmp_path / "f", train=train)
            assert torch.allclose(model(IDS).logits, original, atol=1e-4)
            _randomize(scales)
            scales.save(tmp_path / "s.safetensors")
            surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out", overwrite=True)
            attached = model(IDS).logits
            assert not torch.allclose(attached, original, atol=1e-2)
            assert torch.allclose(_load(tmp_path / "out")(IDS).logits, attached, atol=1e-4)
    finally:
        register_checkpoint_conversion_mapping("llama", known or [], overwrite=True)


def test_a_conversion_that_cannot_be_followed(tmp_path: Path) -> None:
    class Shuffle(Transpose):
        def convert(self, input_dict: Any, **known: Any) -> Any:
            return {name: [value[0].unfold(0, 2, 2)] for name, value in input_dict.items()}

    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=4)
    model = _load(llama)
    known = get_checkpoint_conversion_mapping("llama")
    odd = WeightConverter("mlp.down_proj.weight", ["mlp.down_proj.weight"], operations=[Shuffle()])
    register_checkpoint_conversion_mapping("llama", [odd], overwrite=True)
    try:
        with pytest.raises(OptionError, match=r"down_proj\.weight' cannot be followed into the model: .* by Shuffle"):
            surgery.attach(model, tmp_path / "f")
    finally:
        register_checkpoint_conversion_mapping("llama", known or [], overwrite=True)


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)  # as in 4.57: importing it fails


def _renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")


def _called_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.core_model_loading.rename_source_key", lambda key, *, transforms: (key, transforms))


@pytest.mark.parametrize("change", [_missing, _renamed, _called_otherwise])
def test_a_release_that_does_not_tell_how_it_loads(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Models that have all tensors under their own names need not ask; for others it is said which release does."""
    torch.manual_seed(0)
    gpt2 = FAMILIES["gpt2"].make()
    gpt2.transformer.save_pretrained(tmp_path / "m")  # type: ignore[union-attr]
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4)
    mixtral = FAMILIES["mixtral"].save(tmp_path / "mixtral")
    surgery.factorize(mixtral, tmp_path / "fm", rank=4)
    stacked = FAMILIES["mixtral"].load(mixtral)
    with_a_head = type(gpt2).from_pretrained(tmp_path / "m")  # type: ignore[attr-defined]
    change(monkeypatch)
    scales = surgery.attach(with_a_head, tmp_path / "f")
    _randomize(scales)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "out")
    with pytest.raises(MissingExtra, match=rf"(?s)block_sparse_moe.*transformers {transformers.__version__} .*5\.0 to 5\.\d+"):
        surgery.attach(stacked, tmp_path / "fm")
    monkeypatch.undo()
    folded = type(gpt2).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert torch.allclose(with_a_head(IDS).logits, folded(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("train", ["scales", "orthogonal"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_copy_has_scales_of_its_own(name: str, train: Way, tmp_path: Path) -> None:
    """As for a moving average of the model, or another process."""
    family = FAMILIES[name]
    folder = family.save(tmp_path / "m")
    surgery.factorize(folder, tmp_path / "f", rank=4, layout="overlay")
    model = family.load(folder)
    scales = surgery.attach(model, tmp_path / "f", train=train)
    before = family.run(model)
    copied = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    _randomize(scales)
    after = family.run(model)
    assert not torch.allclose(after, before, atol=1e-3)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(family.run(other), before)
        other.load_state_dict(model.state_dict())
        assert torch.equal(family.run(other), after)


def test_layers_that_were_never_run_are_named(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    model = _load(llama)
    scales = surgery.attach(model, tmp_path / "f")
    model.model.layers = model.model.layers[:1]
    model(IDS)
    with pytest.warns(SurgeryWarning, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' and of 6 other targets were never"):
        scales.save(tmp_path / "s.safetensors")


def test_damaged_factors_are_refused(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    path = sorted((tmp_path / "f/surgery").glob("factors-*"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not the file that the manifest describes"):
        surgery.attach(_load(llama), tmp_path / "f")


def test_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    other = _load(llama)
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 0.01
    with pytest.raises(SourceError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of the model is neither"):
        surgery.attach(other, tmp_path / "f")


def test_a_model_loaded_in_fewer_bits_is_refused(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=4)
    with pytest.raises(SourceError, match="neither the original weight nor its residual"):
        surgery.attach(_load(llama, torch.bfloat16), tmp_path / "f")


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 24) / 5)
        self.proj = nn.Linear(24, 24)


class _Reader(nn.Module):
    """Reads weights past the modules that hold them; calls one of these as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner.proj(x) @ self.inner.w
        return x + nn.functional.linear(x, self.inner.proj.weight)


class _Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner
        return inner.proj(x) @ inner.w


@pytest.mark.parametrize("train", ["scales", "core"])
def test_weights_that_are_read_past_their_module(train: Way, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Reader()
    (tmp_path / "m").mkdir()
    save_file(model.state_dict(), tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text("{}")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4, include=["inner.w", "inner.proj.weight"])
    x = torch.randn(5, 24)
    before = model(x)
    scales = surgery.attach(model, tmp_path / "f", train=train)
    assert torch.equal(model(x), before)
    _randomize(scales)
    attached = model(x)
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "o")
    folded = _Reader()
    folded.load_state_dict(load_file(tmp_path / "o/model.safetensors"))
    assert torch.allclose(folded(x), attached, atol=1e-4)
    # By way of a variable it is not found, and said to be unused.
    other = _Alias()
    other.load_state_dict(load_file(tmp_path / "m/model.safetensors"))
    scales = surgery.attach(other, tmp_path / "f", train=train)
    other(x)
    noun = "scales" if train == "scales" else "cores"
    with pytest.warns(SurgeryWarning, match=rf"the {noun} of 'inner\.w' and of 0 other targets were never used"):
        scales.save(tmp_path / "s.safetensors")


@pytest.mark.parametrize("train", ["scales", "core"])
def test_half_precision_does_not_overflow(train: Way, tmp_path: Path) -> None:
    """A sum over a vector may be beyond float16 where the layer's output is not; times a coefficient of 0 it is still 0."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4096, 8, bias=False)).half()
    sign = torch.where(torch.rand(4096) < 0.5, -1.0, 1.0)
    layer[0].weight.data = (1e-4 * sign * torch.ones(8, 1)).half()
    (tmp_path / "m").mkdir()
    save_file(layer.state_dict(), tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text("{}")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=1, include=["*"])
    x = (1500 * sign).half()[None]
    before = layer(x)
    assert torch.isfinite(before).all()
    surgery.attach(layer, tmp_path / "f", train=train)
    assert torch.equal(layer(x), before)


def test_models_that_are_not_ready(llama: Path, tmp_path: Path) -> None:
    surgery.factorize(llama, tmp_path / "f", rank=4)
    config = transformers.AutoConfig.from_pretrained(llama)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(OptionError, match="has no values: it is on the meta device"):
        surgery.attach(empty, tmp_path / "f")
    with pytest.raises(OptionError, match="the model is in DataParallel already"):
        surgery.attach(nn.DataParallel(_load(llama)), tmp_path / "f")
    wrapped = nn.Module()
    wrapped.inner = _load(llama)
    with pytest.raises(OptionError, match=r"is not in this model(.|\n)*inside a wrapper"):
        surgery.attach(wrapped, tmp_path / "f")


def test_tied_scales_are_saved_with_the_model_once(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "m", torch.float32, tie_word_embeddings=True)
    surgery.factorize(llama, tmp_path / "f", rank=4, include=["*embed_tokens*"])
    model = _load(llama)
    scales = surgery.attach(model, tmp_path / "f")
    _randomize(scales)
    attached = model(IDS).logits
    model.save_pretrained(tmp_path / "saved")
    scales.save(tmp_path / "s.safetensors")
    surgery.fold(tmp_path / "f", tmp_path / "s.safetensors", tmp_path / "o")
    assert torch.allclose(_load(tmp_path / "o")(IDS).logits, attached, atol=1e-4)


def test_scales_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of PEFT, and with the numbers that PEFT counts."""
    llama = save_llama(tmp_path / "m", torch.float32)
    surgery.factorize(llama, tmp_path / "f", rank=8)
    model = _load(llama)
    scales = surgery.attach(model, tmp_path / "f")
    where = repr(str(tmp_path / "f"))
    assert repr(scales) == f"Scales(14 targets, 112 trainable, {where}, cpu, untouched)"
    scales.print_trainable_parameters()
    peft.PeftModel.print_trainable_parameters(_Counted(model))
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert ours.startswith("trainable params: 112 || all params: ")
    with torch.no_grad():
        next(scales.parameters())[2] = 0.5
    assert repr(scales) == f"Scales(14 targets, 112 trainable, {where}, cpu, 1 changed)"
    model.requires_grad_(False)
    assert repr(scales).endswith("cpu, 1 changed, frozen)")
    model.to("meta")
    assert repr(scales).endswith("meta, offloaded)")
    scales.detach()
    assert repr(scales).endswith("offloaded, detached)")
    cores = surgery.attach(_load(llama), tmp_path / "f", train="orthogonal")
    assert (
        repr(cores)
        == f"Scales(14 targets, {14 * NUMBERS['orthogonal']} trainable, train='orthogonal', {where}, cpu, untouched)"
    )
    with pytest.raises(OptionError, match=r"(?s)unknown train.*scales or core or orthogonal"):
        surgery.attach(_load(llama), tmp_path / "f", train="cores")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_scales_beside_a_lora_count_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = save_llama(tmp_path / "m", torch.bfloat16)
    surgery.factorize(llama, tmp_path / "f", rank=8, include=["*.layers.0.*_proj.weight"])
    model = peft.get_peft_model(_load(llama), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    scales = surgery.attach(model, tmp_path / "f")
    scales.print_trainable_parameters()
    model.print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert repr(scales).startswith("Scales(7 targets, 56 trainable, ")


class _Counted:
    """What PEFT's own count looks at."""

    def __init__(self, model: nn.Module) -> None:
        self.named_parameters = model.named_parameters

    def get_nb_trainable_parameters(self) -> Any:
        return peft.PeftModel.get_nb_trainable_parameters(self)
