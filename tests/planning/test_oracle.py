"""Which weights are targets, held against the modules that own them, for every model class that transformers makes here.

Targets are the linear layers inside numbered blocks, experts among them. Each exception is named, with its reason; nothing else
is a target. The names are those in memory and those that ``save_pretrained`` writes, which are the ones on the hub.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from tests.releases import OLDER, ROOT

if OLDER:
    pytest.skip("the classes are those of the newest transformers", allow_module_level=True)

from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.planning.recipes import recipe_for_family
from surgery.planning.targets import Model, Skipped, Target, choose
from surgery.quantized.recognize import Quantization
from tests import oracle
from tests.oracle import Made, Weight

#: Linear layers in numbered blocks that are no targets: what the plan says of them, their names, and why that is right.
EXCEPTIONS: tuple[tuple[str, str, str], ...] = (
    (
        "a router",
        r"\.(router|gate)\.|_router\.|\.shared_expert_gate\.",
        "it decides which experts are used",
    ),
    ("a single row or column", r"", "it has one singular value, and nothing is to choose"),
    ("an output head", r"bbox_(embed|head)\.\d+\.", "boxes of a detector, once for each layer of the decoder"),
    ("an output head", r"\.output_hypernetworks_mlps\.\d+\.", "masks of SAM"),
    ("an output head", r"(^|\.)tdnn\.\d+\.", "the head for speaker verification of wav2vec 2.0 and its kin"),
    ("an output head", r"(^|\.)\w+_head\.reassemble\.readout_projects\.", "the dense heads of TIPSv2"),
    ("an embedding", r"position_bias_mlp|rel_pos|relative_pos", "it makes a table of relative positions"),
    ("an embedding", r"relative_position_embedding\.pos_proj", "it makes a table of relative positions"),
    ("an embedding", r"\.patch_embedder\.proj\.", "patches go through it once more in each layer of Muse Spark's audio tower"),
    ("an embedding", r"(timestep_embeddings|time_embed)\.\d+\.", "times of a flow, two of them"),
    ("outside the transformer blocks", r"\.layers\.linear_\d+\.", "Inkling numbers its layers, not blocks of them, on the hub"),
    ("an embedding", r"embed.*\.layers\.linear_\d+\.", "the same, inside of an embedding"),
    (
        "past the 2 layers of the model: loaders leave it out",
        r"^layers\.2\.",
        "CLIPSeg's decoder without the rest",
    ),
    ("experts joined in one matrix, and config.json does not tell how many", r"\.experts\.mlp\.", "nobody tells how to cut it"),
    (
        "no weight of a linear layer",
        r"_sconv\.weight_proj$",
        "a kernel of Inkling 2's convolution; a parameter on the hub",
    ),
    ("a convolution", r"\.mlp\.\w+_linear\.", "experts of JetMoE where nobody knows that it is one: like a convolution"),
    ("a convolution", r"", "Moshi's depth decoder, a matrix for each codebook: name and shape are those of a convolution"),
)
#: Exceptions that hold for some owners only, by the class of the owner.
_ONLY = {"a convolution": ("MoshiFlexibleLinear", "JetMoeParallelExperts")}
#: Routers that nothing tells from the gate of a layer but the number of experts: stored as [in, out].
_UNTOLD = ("Ernie4_5_VLMoeMoeTopKRouter",)

#: Classes that cannot be made here from the defaults of their configs: packages that are not here, or values that have none.
UNTRIED = frozenset(
    re.findall(
        r"\w+",
        """
    BeitForSemanticSegmentation BridgeTowerForContrastiveLearning CohereCompassForCausalLM
    CohereCompassForConditionalGeneration CohereCompassModel CohereCompassTextForSequenceClassification
    CohereCompassTextModel ConditionalDetrForSegmentation Deimv2DINOv3ConvEncoder DetrForSegmentation DinatBackbone
    DinatForImageClassification DinatModel EdgeTamModel EdgeTamVisionModel EsmForProteinFolding
    FastVlmForConditionalGeneration FastVlmModel Gemma3nForConditionalGeneration Gemma3nModel Gemma4AssistantForCausalLM
    Gemma4UnifiedAssistantForCausalLM HieraForPreTraining LayoutLMv2ForQuestionAnswering
    LayoutLMv2ForSequenceClassification LayoutLMv2ForTokenClassification LayoutLMv2Model OmDetTurboForObjectDetection
    PPOCRV5ServerDetForObjectDetection PPOCRV5ServerDetModel PPOCRV6MediumDetForObjectDetection PPOCRV6MediumDetModel
    PatchTSTEncoder PeAudioVideoEncoder PeAudioVideoModel PeVideoEncoder PeVideoModel
    PerceiverForImageClassificationConvProcessing PerceiverForImageClassificationFourier
    PerceiverForMultimodalAutoencoding PerceiverForOpticalFlow PerceptionLMForConditionalGeneration PerceptionLMModel
    Qwen3OmniMoeCode2WavDecoderBlock ReformerForMaskedLM Sapiens2ForImageMatting Sapiens2ForNormalEstimation
    Sapiens2ForPointmapEstimation Sapiens2ForPoseEstimation Sapiens2ForSemanticSegmentation SeamlessM4Tv2TextToUnitDecoder
    SeamlessM4Tv2TextToUnitModel SwinEncoder T5Gemma2Decoder T5Gemma2Encoder T5Gemma2TextEncoder T5GemmaDecoder
    T5GemmaEncoder T5GemmaEncoderModel TimmBackbone TimmWrapperForImageClassification TimmWrapperModel UVDocBridge
    ViltForImagesAndTextClassification
    """,
    )
)
#: Classes that differ from another of their family in the head only.
_SAME_BLOCKS = re.compile(
    "For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$"
)
_LINEAR = ("linear", "experts", "in_proj")


def namings(made: Made) -> Iterator[tuple[str, Model, list[Weight]]]:
    """The tensors of a model by the names that they have somewhere, with what is known of the model there."""
    family = Model(made.config, recipe_for_family(made.config), Quantization())
    in_memory = oracle.weights(made.model)
    saved = _different(oracle.saved(made.model, in_memory))
    yield "in memory", family, _different(in_memory)
    yield "saved", family, saved
    # As a tower of a model that nobody knows, where no recipe helps.
    inside = [replace(weight, name=f"model.vision_embed_tokens.img_processor.{weight.name}") for weight in saved]
    yield "inside of another", Model({"model_type": "unheard of", "tower_config": made.config}, None, Quantization()), inside
    yield "without config", Model({}, None, Quantization()), [weight for weight in saved if weight.module not in _UNTOLD]


def _different(weights: Sequence[Weight]) -> list[Weight]:
    """The matrices that differ in more than the number of their block: the first of each kind."""
    kinds: dict[tuple[str, tuple[int, ...], str], Weight] = {}
    for weight in weights:
        if len(weight.shape) > 1 and 0 not in weight.shape:
            kinds.setdefault((re.sub(r"\.\d+\.", ".*.", weight.name), weight.shape, weight.module), weight)
    return list(kinds.values())


def judged(model: Model, weights: Sequence[Weight]) -> Iterator[tuple[Weight, str, str | None]]:
    """Each matrix with what is to be said of it, and what is wrong with its fate, None where it is right."""
    for weight in weights:
        entry = TensorEntry(weight.name, "BF16", weight.shape, 0, 1)
        fates = choose(entry, "model.safetensors", Options(rank=1), model)
        targets = [fate for fate in fates if isinstance(fate, Target)]
        if weight.owner not in _LINEAR or not weight.in_block:
            yield weight, "no layer of a block", f"a target, and it is a {weight.owner}" if targets else None
        elif targets:
            yield weight, "target", _wrong_view(weight, targets)
        else:
            reason = next(fate.reason for fate in fates if isinstance(fate, Skipped))
            known = next((why for *case, why in EXCEPTIONS if _is(weight, reason, *case)), None)
            yield weight, known or "?", None if known else f"passed over: {reason}"


def _is(weight: Weight, reason: str, of: str, pattern: str) -> bool:
    return reason == of and re.search(pattern, weight.name) is not None and weight.module in _ONLY.get(of, (weight.module,))


def _wrong_view(weight: Weight, targets: list[Target]) -> str | None:
    kinds = {target.view.kind for target in targets}
    if kinds != {"stack" if len(weight.shape) == 3 else "matrix"}:
        return f"seen as {kinds}"
    parts = [target.view.slice.name for target in targets if target.view.slice]
    if weight.name.endswith("in_proj_weight") and parts != ["q", "k", "v"]:
        return "not q, k and v"
    joined = (
        weight.owner == "experts" and len(weight.shape) == 2 and re.search(r"experts\b.*\.\d+\.|expert_\d", weight.name) is None
    )
    return "several experts as one matrix" if joined and len(parts) < 2 else None


@pytest.mark.parametrize("family", oracle.families())
def test_targets_are_the_linear_layers_of_the_blocks(family: str) -> None:
    _check([kind for kind in oracle.classes_of(family) if not _SAME_BLOCKS.search(kind.__name__)])


def test_what_is_not_tried_is_documented() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    assert set(re.findall(r"\w+", page.partition("Not tried,")[2])) >= UNTRIED


@pytest.mark.slow
@pytest.mark.parametrize("family", oracle.families())
def test_targets_of_models_with_other_heads(family: str) -> None:
    _check([kind for kind in oracle.classes_of(family) if _SAME_BLOCKS.search(kind.__name__)])


def _check(kinds: Sequence[type]) -> None:
    wrong: Counter[str] = Counter()
    for kind in kinds:
        made = oracle.make(kind)
        if isinstance(made, str):
            assert kind.__name__ in UNTRIED, made
            continue
        assert kind.__name__ not in UNTRIED
        for where, model, weights in namings(made):
            for weight, _, fault in judged(model, weights):
                if fault is not None:
                    name = re.sub(r"(?<=\.)\d+(?=\.)", "*", weight.name)
                    wrong[f"{kind.__name__}, {where}: {name} {list(weight.shape)} of {weight.module}: {fault}"] += 1
    assert not wrong


def counts() -> Counter[str]:
    """How many there are, for docs/recipes.md; layers are those of all classes that were made, as they are saved."""
    found: Counter[str] = Counter()
    for kind in (kind for family in oracle.families() for kind in oracle.classes_of(family)):
        made = oracle.make(kind)
        found["classes"] += 1
        if isinstance(made, str):
            found["classes that cannot be made"] += 1
            continue
        found["classes with all their layers"] += not made.cut
        model = Model(made.config, recipe_for_family(made.config), Quantization())
        weights = oracle.saved(made.model, oracle.weights(made.model))
        for weight, said, _ in judged(model, [weight for weight in weights if len(weight.shape) > 1 and 0 not in weight.shape]):
            found[f"layers of blocks: {said}" if weight.owner in _LINEAR and weight.in_block else "other matrices"] += 1
    return found


if __name__ == "__main__":
    for what, number in sorted(counts().items()):
        print(f"{number:7} {what}")
