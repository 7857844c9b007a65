"""Trainers as they are, with a ``SpectralConfig``: what they train, resume, compare with, and which directions they choose."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import surgery
import surgery.peft
from surgery.errors import OptionError, ScalesError, SurgeryWarning
from surgery.peft import SpectralConfig, scales_of
from surgery.trained.spectral import read_spectral
from surgery.training.ways import Way
from tests.models import save_llama
from tests.releases import needs
from tests.trl_runs import tokenizer

IDS = (torch.arange(8 * 24).reshape(8, 24) * 7 + torch.arange(8)[:, None]) % 97
EXAMPLES = [{"input_ids": row, "labels": row} for row in IDS]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # names that PEFT and TRL use
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 Llama (``m``), and factorized (``f``). Read-only."""
    folder = tmp_path_factory.mktemp("trainers")
    save_llama(folder / "m", torch.float32, vocab_size=257, hidden_size=64, intermediate_size=128)
    surgery.factorize(folder / "m", folder / "f", rank=6)
    return folder


def _load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def _config(made: Path, **options: Any) -> SpectralConfig:
    return SpectralConfig(**{"factorized": str(made / "f"), "task_type": "CAUSAL_LM", **options})


def _settings(**options: Any) -> dict[str, Any]:
    return {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **options,
    }


def _trainer(made: Path, out: Path, source: str = "m", steps: int = 4, **options: Any) -> Any:
    model = peft.get_peft_model(_load(made / source), _config(made, **options))
    arguments = transformers.TrainingArguments(str(out), **_settings(max_steps=steps))
    return transformers.Trainer(model, arguments, train_dataset=EXAMPLES)


def _equal(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def _logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Killed(Exception):
    pass


class Killing(transformers.TrainerCallback):
    """Ends a training in the middle of its third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise Killed


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("m", {"train": "scales"}),
        ("f", {"train": "core"}),
        ("m", {"train": "orthogonal", "choose": 2, "choose_steps": 1}),
    ],
)
def test_a_run_that_was_killed_and_resumed_is_the_same_to_the_last_bit(
    source: str, options: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    whole = _trainer(made, tmp_path / "whole", source, **options)
    whole.train()
    killed = _trainer(made, tmp_path / "killed", source, **options)
    killed.add_callback(Killing())
    with pytest.raises(Killed):
        killed.train()
    resumed = _trainer(made, tmp_path / "killed", source, **options)
    resumed.train(resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert _equal(tmp_path / "whole" / "checkpoint-4" / name, tmp_path / "killed" / "checkpoint-4" / name), name
    assert not _equal(*(tmp_path / "whole" / f"checkpoint-{n}" / "adapter_model.safetensors" for n in (2, 4)))
    assert _logged(resumed, "loss") == _logged(whole, "loss")
    assert sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-4").glob("adapter*")) < 100_000


def test_the_stock_trainer_trains_what_attach_does(made: Path, tmp_path: Path) -> None:
    class ScalesTrainer(surgery.SaveScales, transformers.Trainer):
        pass

    trainer = _trainer(made, tmp_path / "peft", steps=2)
    trainer.train()
    model = _load(made / "m")
    scales = surgery.attach(model, made / "f")
    arguments = transformers.TrainingArguments(str(tmp_path / "attach"), **_settings(max_steps=2))
    ScalesTrainer(model, arguments, train_dataset=EXAMPLES, scales=scales).train()
    found, right = scales_of(trainer.model).values(), scales.values()
    assert all(torch.equal(found[key], value) for key, value in right.items())


# TRL


def _data(*columns: str) -> Any:
    import datasets

    pairs = [("The raise statement", " re-raises it.", " eats"), ("A list is", " a sequence.", " no, no and no")] * 2
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    rows = [{**row, "completion": row["chosen"]} for row in rows]
    return datasets.Dataset.from_list(rows).select_columns(list(columns))


def _trl(name: str, out: Path, made: Path, source: str = "m", columns: tuple[str, ...] = (), **options: Any) -> Any:
    import trl

    own = {key: options.pop(key) for key in ("reward_funcs", "peft_config", "model") if key in options}
    settings = _settings(**{"per_device_train_batch_size": 4, "max_steps": 3, "bf16": False, **options})
    return getattr(trl, f"{name}Trainer")(
        **{"model": _load(made / source), "peft_config": _config(made), **own},
        args=getattr(trl, f"{name}Config")(str(out), **settings),
        train_dataset=_data(*columns),
        processing_class=tokenizer(),
    )


def test_sft_with_a_peft_config(made: Path, tmp_path: Path) -> None:
    trainer = _trl("SFT", tmp_path / "out", made, "f", ("prompt", "completion"))
    trainer.train()
    losses = _logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(_load(made / "f"), tmp_path / "saved")
    trained = scales_of(trainer.model).values()
    assert all(torch.equal(value, trained[key]) for key, value in scales_of(again).values().items())
    read = read_spectral(tmp_path / "saved")
    surgery.write_scales(tmp_path / "scales.safetensors", read.values, read.fingerprint)
    scales_of(trainer.model).save(tmp_path / "own.safetensors")
    assert _equal(tmp_path / "scales.safetensors", tmp_path / "own.safetensors")


def test_scales_of_an_output_head_that_trl_reads_by_itself_are_refused(made: Path, tmp_path: Path) -> None:
    surgery.factorize(made / "m", tmp_path / "f", rank=6, include=["lm_head.weight"])
    config = _config(made, factorized=str(tmp_path / "f"))
    with pytest.raises(OptionError, match="output head has scales and was not run"):
        _trl("SFT", tmp_path / "out", made, columns=("prompt", "completion"), peft_config=config).train()


@pytest.mark.parametrize("source", ["m", "f"])
def test_dpo_starts_at_ln_2_with_the_original_model_as_its_reference(source: str, made: Path, tmp_path: Path) -> None:
    trainer = _trl("DPO", tmp_path, made, source, ("prompt", "chosen", "rejected"), beta=0.5)
    original = _load(made / "m")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    losses = _logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.68
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    with torch.no_grad():
        logits = original(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    each = logits[:, :-1].double().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    right = (each * batch["completion_mask"][:, 1:]).sum(1)
    assert torch.allclose(reference.double(), right, atol=1e-3)
    assert not torch.allclose(trainer.model(input_ids=IDS).logits, original(input_ids=IDS).logits, atol=1e-2)


def test_dpo_of_a_trained_adapter_has_a_copy_of_it_as_its_reference(made: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(_load(made / "m"), _config(made, choose=2, choose_steps=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "a")
    before = scales_of(model).values()
    again = peft.PeftModel.from_pretrained(_load(made / "m"), tmp_path / "a", is_trainable=True)
    trainer = _trl("DPO", tmp_path / "out", made, columns=("prompt", "chosen", "rejected"), model=again, peft_config=None)
    trainer.train()
    assert _logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    reference = scales_of(trainer.model, "ref").values()
    assert all(torch.equal(value, before[key]) for key, value in reference.items())
    assert not any(torch.equal(value, before[key]) for key, value in scales_of(trainer.model).values().items())


@pytest.mark.parametrize("source", ["m", "f"])
def test_grpo_starts_with_a_kl_of_0(source: str, made: Path, tmp_path: Path) -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    options = {"beta": 0.1, "num_generations": 4, "max_completion_length": 6, "reward_funcs": length}
    trainer = _trl("GRPO", tmp_path, made, source, ("prompt",), **options)
    trainer.train()
    kl = _logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-6


@needs("bitsandbytes", ">=0.50.2", "a quantized base")
def test_trl_leaves_what_is_trained_in_float32_on_a_quantized_base(made: Path, tmp_path: Path) -> None:
    surgery.factorize(made / "m", tmp_path / "f", rank=6, layout="overlay")

    def trainer(out: str) -> Any:
        quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)
        model = _load(made / "m", quantization_config=quantization, device_map="cpu")
        config = _config(made, factorized=str(tmp_path / "f"))
        columns = ("prompt", "completion")
        return _trl("SFT", tmp_path / out, made, columns=columns, model=model, peft_config=config, max_steps=4)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    assert all(parameter.dtype == torch.float32 for parameter in scales_of(whole.model).parameters())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        assert _equal(tmp_path / "whole" / "checkpoint-4" / name, tmp_path / "resumed" / "checkpoint-4" / name), name
    # TRL rounds what an adapter has learned as well, when it is trained further.
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = _load(made / "m", quantization_config=quantization, device_map="cpu")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "whole" / "checkpoint-4", is_trainable=True)
    before = scales_of(model).values()
    for delta in scales_of(model).parameters():
        delta.data = delta.data.to(torch.bfloat16)
    model(input_ids=IDS)
    assert all(torch.equal(value, before[key]) for key, value in scales_of(model).values().items())


# The choice of directions


@pytest.mark.parametrize(("source", "train"), [("m", "scales"), ("f", "core"), ("m", "orthogonal")])
@pytest.mark.filterwarnings("ignore:weights of the model are residuals:surgery.SurgeryWarning")
def test_directions_are_those_that_choose_takes(source: str, train: Way, made: Path, tmp_path: Path) -> None:
    batches = [IDS[i : i + 2] for i in range(0, 8, 2)]
    attached = _load(made / source)
    scales = surgery.attach(attached, made / "f", train=train)
    for ids in batches[:2]:
        attached(input_ids=ids, labels=ids).loss.backward()
    scales.choose(2)
    model = peft.get_peft_model(_load(made / source), _config(made, train=train, choose=2, choose_steps=2))
    for one, parameters, used in (
        (attached, list(scales.parameters()), batches[2:]),
        (model, [p for p in model.parameters() if p.requires_grad], batches),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0)
        for ids in used:
            one(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    chosen, right = scales_of(model).chosen, scales.chosen
    assert chosen is not None
    assert right is not None
    assert all(torch.equal(mask, right[key]) and int(mask.sum()) == 2 for key, mask in chosen.items())
    values = scales_of(model).values()
    assert all(torch.equal(values[key], value) for key, value in scales.values().items())

    model.save_pretrained(tmp_path / "a")
    scales.save(tmp_path / "scales.safetensors")
    outputs = model(input_ids=IDS).logits
    again = peft.PeftModel.from_pretrained(_load(made / source), tmp_path / "a", is_trainable=True)
    bare = _load(made / source)
    bare.load_adapter(str(tmp_path / "a"))
    fresh = peft.get_peft_model(_load(made / source), _config(made, train=train))
    fresh.load_adapter(tmp_path / "a", "default", is_trainable=True)  # as a Trainer does it that resumes
    config = _config(made, train=train)
    passed = peft.PeftModel.from_pretrained(_load(made / source), tmp_path / "a", config=config, low_cpu_mem_usage=True)
    for loaded in (again, bare, fresh, passed):
        assert torch.equal(loaded(input_ids=IDS).logits, outputs)
        found = scales_of(loaded).chosen
        assert found is not None
        assert all(torch.equal(mask, right[key]) for key, mask in found.items())
    assert all(delta.numel() < 30 for delta in scales_of(fresh).parameters())
    other = peft.get_peft_model(_load(made / source), _config(made, train=train))
    for delta in scales_of(other).parameters():
        delta.grad = torch.ones_like(delta)
    scales_of(other).choose(2)
    with pytest.raises(ScalesError, match="trained in other directions"):
        other.load_adapter(tmp_path / "a", "default", is_trainable=True)

    read = read_spectral(tmp_path / "a")
    kept = surgery.read_scales(tmp_path / "scales.safetensors")
    assert all(torch.equal(read.values[key], value) for key, value in kept.values.items())
    assert read.values.keys() == kept.values.keys()
    assert (read.fingerprint, read.train, read.beside.keys()) == (kept.fingerprint, kept.train, kept.beside.keys())
    for kind, some in kept.beside.items():
        assert all(torch.equal(read.beside[kind][key], value) for key, value in some.items())
    merged = again.merge_and_unload()
    assert torch.allclose(merged(input_ids=IDS).logits, outputs, atol=1e-4)


def test_what_is_saved_before_a_choice_says_so(made: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(_load(made / "m"), _config(made, choose=2, choose_steps=2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.step()  # without gradients, as what wraps an optimizer may do: nothing to look at
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not any(bool(delta.any()) for delta in parameters)
    with pytest.warns(SurgeryWarning, match="no directions have been chosen"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["chosen"] is None
    assert "chosen" not in read_spectral(tmp_path).beside


def test_directions_that_cannot_be_chosen(made: Path) -> None:
    model = peft.get_peft_model(_load(made / "m"), _config(made, choose=2, choose_steps=1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for delta in parameters:
        delta.grad = torch.zeros_like(delta)
    with pytest.raises(OptionError, match="no gradients to choose directions by"):
        optimizer.step()
    model = peft.get_peft_model(_load(made / "m"), _config(made, choose=2, choose_steps=1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for delta in parameters:
        optimizer.state[delta] = {"step": torch.tensor(1.0)}
        delta.grad = torch.ones_like(delta)
    with pytest.raises(OptionError, match="has already made steps"):
        optimizer.step()


# Several processes

_TWO = """
import os, sys, torch, transformers, peft, surgery.peft
from surgery.errors import OptionError
rank, made, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
ids = (torch.arange(8 * 24).reshape(8, 24) * 7 + torch.arange(8)[:, None]) % 97
def wrapped(**options):
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{made}/m", dtype=torch.float32)
    model = peft.get_peft_model(model, surgery.peft.SpectralConfig(factorized=f"{made}/f", **options))
    return model, torch.nn.parallel.DistributedDataParallel(model)
model, parallel = wrapped()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
mine = ids[4 * rank : 4 * rank + 4]
for _ in range(2):
    optimizer.zero_grad()
    parallel(input_ids=mine, labels=mine).loss.backward()
    optimizer.step()
if rank == 0:
    model.save_pretrained(f"{out}/a")
model, parallel = wrapped(choose=2, choose_steps=1)
parallel(input_ids=mine, labels=mine).loss.backward()
try:
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
except OptionError as error:
    assert "distributed over processes" in str(error)
else:
    raise AssertionError("chosen in DistributedDataParallel")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow  # attach trains in two processes in the suite, and the layers are the same
def test_two_processes(made: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _TWO]
    processes = [subprocess.Popen([*command, str(rank), str(made), str(tmp_path)], env=environment) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=280) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    model = peft.get_peft_model(_load(made / "m"), _config(made))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    read = read_spectral(tmp_path / "a").values
    assert all(torch.allclose(read[key], value, atol=1e-5) for key, value in scales_of(model).values().items())
