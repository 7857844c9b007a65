"""The reference model of a trainer is the model with its scales untouched; where it would be another, it is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import OptionError
from surgery.training.reference import Reference
from surgery.training.trainer import SaveScales
from surgery.training.ways import Way
from tests.models import save_llama
from tests.releases import checkpoint_activations, needs
from tests.trl_runs import preferences, settings_of, tokenizer

IDS = (torch.arange(4 * 12).reshape(4, 12) * 7) % 257
SOURCES = ["m", "f"]  # the original model, and the folder of residuals

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # names that TRL and PEFT use
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 Llama (``m``), and factorized (``f``). Read-only."""
    folder = tmp_path_factory.mktemp("reference")
    save_llama(folder / "m", torch.float32, vocab_size=257, hidden_size=64, intermediate_size=128)
    surgery.factorize(folder / "m", folder / "f", rank=6)
    return folder


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _attached(made: Path, source: str = "m", train: Way = "scales") -> tuple[Any, surgery.Scales]:
    model = _load(made / source)
    return model, surgery.attach(model, made / "f", train=train)


def _touch(scales: surgery.Scales) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in scales.parameters():
        parameter.data.normal_(generator=generator)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


# Scales.untouched


@pytest.mark.parametrize("train", ["scales", "core", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untouched_on_the_original_weights_is_the_original_model_bit_for_bit(
    dtype: torch.dtype, train: Way, tmp_path: Path
) -> None:
    save_llama(tmp_path / "m", dtype, vocab_size=257)
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=6)
    original = _logits(_load(tmp_path / "m", dtype))
    for source, tolerance in (("m", 0.0), ("f", 1e-4 if dtype == torch.float32 else 0.1)):
        model = _load(tmp_path / source, dtype)
        bare = _logits(model)
        scales = surgery.attach(model, tmp_path / "f", train=train)
        _touch(scales)
        touched, values = _logits(model), scales.values()
        with scales.untouched():
            assert (_logits(model) - original).abs().max() <= tolerance * original.abs().max()
            with scales.untouched():
                pass
            assert (_logits(model) - original).abs().max() <= tolerance * original.abs().max()  # still, after an inner one
        assert torch.equal(_logits(model), touched)
        assert (touched - original).abs().max() > 0.2 * original.abs().max()
        assert all(torch.equal(value, values[key]) for key, value in scales.values().items())
        assert (source == "m") is torch.equal(bare, original)


def test_untouched_records_no_gradients_and_ends_with_an_exception(made: Path) -> None:
    model, scales = _attached(made)
    _touch(scales)
    touched = _logits(model)
    with pytest.raises(ZeroDivisionError), scales.untouched():
        assert not model(input_ids=IDS).logits.requires_grad
        raise ZeroDivisionError
    assert torch.equal(_logits(model), touched)
    assert model(input_ids=IDS).logits.requires_grad


@pytest.mark.parametrize("source", SOURCES)
def test_untouched_between_forward_and_backward_changes_no_gradient(source: str, made: Path) -> None:
    """As a trainer does it: the policy's forward, the reference's, the backward pass, which computes the first once more."""

    def gradients(between: bool, checkpointed: bool) -> list[torch.Tensor]:
        model, scales = _attached(made, source)
        _touch(scales)
        model.train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if between:
            with scales.untouched():
                _logits(model)
        loss.backward()
        return [parameter.grad for parameter in scales.parameters()]  # type: ignore[misc]

    plain = gradients(False, False)
    for checkpointed in (False, True):
        for gradient, right in zip(gradients(True, checkpointed), plain, strict=True):
            assert torch.allclose(gradient, right, rtol=1e-4, atol=1e-7)


def test_untouched_under_compile_autocast_and_in_stacked_experts(made: Path, tmp_path: Path) -> None:
    original = _load(made / "m")
    model, scales = _attached(made)
    _touch(scales)
    with scales.untouched(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_logits(model), _logits(original))

    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    block, right = model.model.layers[0].mlp, original.model.layers[0].mlp(x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    touched = compiled(x)
    with scales.untouched():
        assert torch.allclose(compiled(x), right, atol=1e-6)
    assert torch.equal(compiled(x), touched)
    assert (touched - right).abs().max() > 0.1 * right.abs().max()

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    surgery.factorize(tmp_path / "experts", tmp_path / "f", rank=4)
    mixture = _load(tmp_path / "experts")
    right = _logits(mixture)
    scales = surgery.attach(mixture, tmp_path / "f")
    _touch(scales)
    assert not torch.equal(_logits(mixture), right)
    with scales.untouched():
        assert torch.equal(_logits(mixture), right)


def test_a_reference_is_in_eval_mode_and_leaves_the_model_in_training_mode(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.5)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    surgery.factorize(tmp_path / "m", tmp_path / "f", rank=4)
    model = _load(tmp_path / "m").train()
    scales = surgery.attach(model, tmp_path / "f")
    _touch(scales)
    reference = Reference(lambda: model, scales).train()
    assert torch.equal(_logits(reference), _logits(_load(tmp_path / "m")))
    assert all(module.training for module in model.modules())
    assert not torch.equal(_logits(model), _logits(model))  # it drops out
    assert not list(reference.parameters())
    with pytest.raises(AttributeError):
        reference.get_output_embeddings()


# TRL


def _dpo(out: Path, model: Any, scales: surgery.Scales, ref_model: Any = None, **options: Any) -> Any:
    import trl

    class ScalesDPOTrainer(SaveScales, trl.DPOTrainer):
        pass

    return ScalesDPOTrainer(
        model,
        ref_model,
        args=settings_of(trl.DPOConfig, out, **options),
        train_dataset=preferences("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
        scales=scales,
    )


def _length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def _grpo(out: Path, model: Any, scales: surgery.Scales, name: str = "GRPO", **options: Any) -> Any:
    import trl

    class ScalesTrainer(SaveScales, getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        pass

    settings = {"beta": 0.1, "num_generations": 4, "max_completion_length": 6, **options}
    return ScalesTrainer(
        model,
        args=settings_of(getattr(trl, f"{name}Config"), out, **settings),
        train_dataset=preferences("prompt"),
        processing_class=tokenizer(),
        reward_funcs=_length,
        scales=scales,
    )


def _logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def _of_completions(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p of each completion in a batch of DPO, by transformers' own forward and in float64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    each = logits[:, :-1].double().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def _moved(trainer: Any) -> bool:
    return all(parameter.abs().max() > 0.02 for parameter in trainer.scales.parameters())


@pytest.mark.parametrize(("source", "train"), [("m", "scales"), ("f", "scales"), ("m", "core")])
def test_dpo_starts_at_ln_2_and_its_reference_stays(source: str, train: Way, made: Path, tmp_path: Path) -> None:
    original = _load(made / "m")

    def trained(out: str, resume: str | None = None, **options: Any) -> Any:
        trainer = _dpo(tmp_path / out, *_attached(made, source, train), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")
    losses = _logged(whole, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 1e-3
    assert _moved(whole)
    batch = next(iter(whole.get_train_dataloader()))
    right = _of_completions(original, batch)
    reference = torch.cat(whole.compute_ref_log_probs(whole.ref_model, batch))
    assert torch.allclose(reference.double(), right, atol=1e-3)
    assert (_of_completions(_load(made / "f"), batch) - right).abs().max() > 0.05
    assert (_of_completions(whole.model.eval(), batch) - right).abs().max() > 0.05

    # A resumed run goes on against the same reference, not against the scales that it has read.
    resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert _logged(resumed, "loss")[-1] == pytest.approx(losses[-1], abs=1e-5)
    assert torch.equal(torch.cat(resumed.compute_ref_log_probs(resumed.ref_model, batch)), reference)

    ahead = trained("ahead", precompute_ref_log_probs=True)
    assert _logged(ahead, "loss") == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_on_scales_that_were_loaded_has_the_untouched_model_for_its_reference(
    precomputed: bool, made: Path, tmp_path: Path
) -> None:
    model, scales = _attached(made, "f")
    _touch(scales)
    values = scales.values()
    trainer = _dpo(tmp_path, model, scales, precompute_ref_log_probs=precomputed)
    assert all(torch.equal(value, values[key]) for key, value in scales.values().items())
    batch = next(iter(trainer.get_train_dataloader()))
    found = (batch["ref_chosen_logps"], batch["ref_rejected_logps"]) if precomputed else None
    reference = torch.cat(found or trainer.compute_ref_log_probs(trainer.ref_model, batch))
    assert torch.allclose(reference.double(), _of_completions(_load(made / "m"), batch), atol=1e-3)
    # And where data come after training: TRL by itself refuses to compute a reference for them.
    trainer.train()
    found_loss = trainer.evaluate(preferences("prompt", "chosen", "rejected"))["eval_loss"]
    gained = _of_completions(model.eval(), batch) - _of_completions(_load(made / "m"), batch)
    chosen, rejected = gained.chunk(2)
    right = -nn.functional.logsigmoid(trainer.beta * (chosen - rejected)).mean().item()
    assert found_loss == pytest.approx(right, abs=1e-4)
    assert abs(right - math.log(2)) > 1e-3


def test_dpo_with_adapters_beside_the_scales(made: Path, tmp_path: Path) -> None:
    """TRL would switch the adapters off, and not the scales."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(_load(made / "f"), config)
    scales = surgery.attach(model, made / "f")
    trainer = _dpo(tmp_path, model, scales)
    trainer.train()
    assert _logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert _moved(trainer)
    adapters = {name: value for name, value in model.named_parameters() if "lora_B.default" in name}
    assert all(value.abs().max() > 0 and value.requires_grad for value in adapters.values())
    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    assert torch.allclose(reference.double(), _of_completions(_load(made / "m"), batch), atol=1e-3)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_kl_starts_at_0_and_is_that_to_the_original_model(
    name: str, source: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl

    seen = []
    kind = getattr(trl, f"{name}Trainer")
    logps = kind._get_per_token_logps_and_entropies

    def recorded(self: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = logps(self, model, ids, mask, *args, **kwargs)
        if model is self.ref_model:
            seen.append((ids, mask, args[0], found[0]))
        return found

    monkeypatch.setattr(kind, "_get_per_token_logps_and_entropies", recorded)
    trainer = _grpo(tmp_path, *_attached(made, source), name)
    trainer.train()
    kl = _logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert abs(kl[-1]) > 1e-6
    assert _moved(trainer)
    assert len(seen) == 3
    original = _load(made / "m")
    for ids, mask, kept, found in seen:
        logits = original(input_ids=ids, attention_mask=mask).logits[:, :-1].double() / trainer.temperature
        right = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -kept:]
        valid = mask[:, -kept:].bool()
        assert torch.allclose(found.double()[valid], right[valid], atol=1e-4)


@pytest.mark.parametrize("make", [_dpo, _grpo])
def test_directions_are_chosen_by_the_loss_of_a_trainer(make: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    """Before it counts steps of its own; and its reference is the untouched model then too."""
    model, scales = _attached(made, "m", "core")
    trainer = make(tmp_path, model, scales)
    trainer.add_callback(surgery.ChooseDirections(scales, keep=2, batches=1))
    trainer.train()
    assert {int(mask.sum()) for mask in (scales.chosen or {}).values()} == {2}
    assert _moved(trainer)


@pytest.mark.parametrize("source", SOURCES)
def test_kto(source: str, made: Path, tmp_path: Path) -> None:
    import trl

    class ScalesKTOTrainer(SaveScales, trl.KTOTrainer):
        pass

    model, scales = _attached(made, source)
    arguments = settings_of(trl.KTOConfig, tmp_path)
    data = preferences("prompt", "completion", "label")
    trainer = ScalesKTOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer(), scales=scales)
    trainer.train()
    losses = _logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert losses[-1] < losses[0] - 1e-4
    _touch(scales)
    assert torch.allclose(_logits(trainer.ref_model), _logits(_load(made / "m")), atol=1e-4)


def test_a_reference_that_trl_copies_stays_untouched(made: Path, tmp_path: Path) -> None:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class ScalesOnlineDPOTrainer(SaveScales, OnlineDPOTrainer):  # type: ignore[misc]
        pass

    model, scales = _attached(made, "f")
    _touch(scales)
    trainer = ScalesOnlineDPOTrainer(
        model,
        reward_funcs=_length,
        args=settings_of(OnlineDPOConfig, tmp_path, max_new_tokens=4, max_steps=1),
        train_dataset=preferences("prompt"),
        processing_class=tokenizer(),
        scales=scales,
    )
    trainer.train()
    assert trainer.ref_model is not model
    assert torch.allclose(_logits(trainer.ref_model), _logits(_load(made / "m")), atol=1e-4)


# What the user passes


def test_a_reference_of_ones_own_is_taken_as_it_is(made: Path, tmp_path: Path) -> None:
    other = _load(made / "m")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    expected = _logits(other)
    trainer = _dpo(tmp_path, *_attached(made), ref_model=other)
    trainer.train()
    assert trainer.ref_model is other
    assert torch.equal(_logits(other), expected)

    attached = _load(made / "f")  # a residual with scales of its own is no bare one
    surgery.attach(attached, made / "f")
    assert _dpo(tmp_path, *_attached(made), ref_model=attached).ref_model is attached


def test_a_reference_that_would_change_with_the_model_is_refused(made: Path, tmp_path: Path) -> None:
    import peft

    model, scales = _attached(made)
    with pytest.raises(OptionError, match=r"(?s)ref_model is the model that is trained.*leave ref_model out"):
        _dpo(tmp_path, model, scales, ref_model=model)
    base = _load(made / "m")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(OptionError, match="shares its scales"):
        _dpo(tmp_path, adapted, surgery.attach(adapted, made / "f"), ref_model=base)


def test_a_bare_residual_for_a_reference_or_teacher_is_refused(made: Path, tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class ScalesGKDTrainer(SaveScales, GKDTrainer):  # type: ignore[misc]
        pass

    with pytest.raises(OptionError, match=r"(?s)ref_model is a bare residual.*the original model"):
        _dpo(tmp_path, *_attached(made), ref_model=_load(made / "f"))
    for teacher in (str(made / "f"), _load(made / "f")):
        model, scales = _attached(made)
        with pytest.raises(OptionError, match="teacher_model is a bare residual"):
            ScalesGKDTrainer(model, teacher, args=settings_of(GKDConfig, tmp_path), train_dataset=None, scales=scales)


# What is refused


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_by_its_path_is_refused(source: str, made: Path, tmp_path: Path) -> None:
    """The Trainer would load one of its own."""
    _, scales = _attached(made)
    with pytest.raises(OptionError, match="DPOTrainer would load a model by itself"):
        _dpo(tmp_path, str(made / source), scales)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_sending_weights_to_vllm_is_refused_before_it_is_looked_for(name: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"(?s){name}Trainer sends the model's weights to vLLM.*use_vllm=False"):
        _grpo(tmp_path, *_attached(made), name, use_vllm=True)


def test_trainers_that_always_send_weights_are_refused(made: Path, tmp_path: Path) -> None:
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    class ScalesAsyncGRPOTrainer(SaveScales, AsyncGRPOTrainer):  # type: ignore[misc]
        pass

    model, scales = _attached(made)
    with pytest.raises(OptionError, match="AsyncGRPOTrainer sends the model's weights to vLLM"):
        ScalesAsyncGRPOTrainer(model, reward_funcs=_length, train_dataset=preferences("prompt"), scales=scales)


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_reference_that_follows_the_model_is_refused(name: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="SyncRefModelCallback mixes the model's weights"):
        {"DPO": _dpo, "GRPO": _grpo}[name](tmp_path, *_attached(made), sync_ref_model=True)


def test_callbacks_that_make_whole_models_are_refused(made: Path, tmp_path: Path) -> None:
    import trl

    model, scales = _attached(made)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)

    class ScalesTrainer(SaveScales, transformers.Trainer):
        pass

    with pytest.raises(OptionError, match="BEMACallback averages and saves a second whole model"):
        ScalesTrainer(model, arguments, callbacks=[trl.BEMACallback()], scales=scales)
    trainer = ScalesTrainer(model, arguments, scales=scales)
    with pytest.raises(OptionError, match="BEMACallback averages"):
        trainer.add_callback(trl.BEMACallback)


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_teachers_that_a_trainer_makes_by_itself_are_refused(kind: str, made: Path, tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class ScalesSDFTTrainer(SaveScales, SDFTTrainer):  # type: ignore[misc]
        pass

    model, scales = _attached(made)
    arguments = settings_of(SDFTConfig, tmp_path, teacher_model_kind=kind, num_generations=4)
    with pytest.raises(OptionError, match=rf"(?s)SDFTTrainer makes a teacher.*'{kind}'.*'live'"):
        ScalesSDFTTrainer(model, args=arguments, train_dataset=None, scales=scales)


class _Loads(transformers.Trainer):
    """Makes its second model as a trainer of one's own may."""

    def __init__(self, *args: Any, attribute: str, make: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setattr(self, attribute, make(self.model))


class _Scaled(SaveScales, _Loads):
    pass


@pytest.mark.parametrize("source", SOURCES)
def test_any_other_trainer_that_makes_a_second_model_is_refused(source: str, made: Path, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)

    def trainer(attribute: str, make: Any) -> Any:
        model, scales = _attached(made, source)
        return _Scaled(model, arguments, attribute=attribute, make=make, scales=scales)

    def again(model: Any) -> Any:
        return _load(model.config._name_or_path)

    for attribute in ("ref_model", "teacher", "initial"):
        with pytest.raises(OptionError, match=rf"_Scaled has made {attribute} by itself: a second model"):
            trainer(attribute, again)
    with pytest.raises(OptionError, match="has made average by itself"):
        trainer("average", copy.deepcopy)
    # What is no second model: the model itself, a part of it, another small module.
    for make in (lambda model: model, lambda model: model.model, lambda _: nn.Linear(2, 2)):
        assert trainer("other", make) is not None
    copied = trainer("ref_model", copy.deepcopy)
    _touch(copied.scales)
    assert torch.allclose(_logits(copied.ref_model.eval()), _logits(_load(made / "m")), atol=1e-4)


class _Lossy(transformers.Trainer):
    """Takes a loss that is a module with the model inside, as the trainer of sentence-transformers does."""

    def __init__(self, *args: Any, loss: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss


class _ScaledLossy(SaveScales, _Lossy):
    pass


def test_a_loss_that_holds_the_model_is_no_second_model(made: Path, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    model, scales = _attached(made)
    trainer: Any = _ScaledLossy(model, arguments, loss=nn.ModuleList([model]), scales=scales)
    assert trainer.loss[0] is model


@needs("trl", ">=1.16", "a DPOTrainer that multiplies with the weight of the head by itself")
def test_scales_of_an_output_head_that_dpo_reads_by_itself_are_refused(made: Path, tmp_path: Path) -> None:
    surgery.factorize(made / "m", tmp_path / "f", rank=6, include=["lm_head.weight"])
    model = _load(made / "m")
    with pytest.raises(OptionError, match=r"(?s)multiplies with the weight of the output head by itself.*--exclude"):
        _dpo(tmp_path / "dpo", model, surgery.attach(model, tmp_path / "f"))


def test_scales_of_an_output_head_that_trl_reads_by_itself_are_refused(made: Path, tmp_path: Path) -> None:
    import trl

    class ScalesSFTTrainer(SaveScales, trl.SFTTrainer):
        pass

    surgery.factorize(made / "m", tmp_path / "f", rank=6, include=["lm_head.weight"])
    model = _load(made / "m")
    scales = surgery.attach(model, tmp_path / "f")
    data = preferences("prompt", "completion")
    with pytest.raises(OptionError, match="multiplies with the weight of the output head by itself"):
        ScalesSFTTrainer(
            model, settings_of(trl.SFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer(), scales=scales
        )
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)

    class ScalesTrainer(SaveScales, transformers.Trainer):
        pass

    model = _load(made / "m")
    assert ScalesTrainer(model, arguments, scales=surgery.attach(model, tmp_path / "f")) is not None  # it calls the layer
