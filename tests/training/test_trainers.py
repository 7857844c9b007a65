"""Scales in the trainers people use: what they train is what a plain loop trains, and what they save is what fold takes."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import MissingExtra, OptionError, ScalesError
from surgery.names import CHECKPOINT_FILE
from surgery.training.trainer import SaveScales
from surgery.training.ways import Way
from tests.models import save_llama, tensors_of
from tests.releases import checkpoint_activations, needs

DEMO = Path(surgery.__file__).parent / "demo" / "model"
IDS = (torch.arange(8 * 24).reshape(8, 24) * 7 + torch.arange(8)[:, None]) % 97
pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: list[Way] = ["scales", "core", "orthogonal"]
EXAMPLES = [{"input_ids": row, "labels": row} for row in IDS]


class ScalesTrainer(SaveScales, transformers.Trainer):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 Llama (``m``), factorized (``f``), and as an overlay (``overlay``). Read-only."""
    folder = tmp_path_factory.mktemp("trainers")
    save_llama(folder / "m", torch.float32, vocab_size=256, hidden_size=64, intermediate_size=128)
    surgery.factorize(folder / "m", folder / "f", rank=6)
    surgery.factorize(folder / "m", folder / "overlay", rank=6, layout="overlay")
    return folder


def _load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def _attached(made: Path, train: Way = "scales") -> tuple[Any, surgery.Scales]:
    model = _load(made / "f")
    return model, surgery.attach(model, made / "f", train=train)


def _loop(
    model: Any,
    scales: surgery.Scales,
    ids: torch.Tensor = IDS,
    steps: int = 3,
    context: Callable[[], Any] = nullcontext,
) -> dict[str, torch.Tensor]:
    """The plain loop that all else is compared with."""
    optimizer = torch.optim.Adam(scales.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        with context():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
    return scales.values()


def _gradients(model: Any, scales: surgery.Scales, context: Callable[[], Any] = nullcontext) -> list[torch.Tensor | None]:
    with context():
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return [parameter.grad for parameter in scales.parameters()]


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def truth(made: Path) -> dict[str, torch.Tensor]:
    """What three steps of the plain loop on one process give; far from where it started."""
    values = _loop(*_attached(made))
    assert all((value - 1).abs().max() > 0.05 for value in values.values())
    return values


# transformers' Trainer


def _arguments(out: Path, **options: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return transformers.TrainingArguments(str(out), **{**settings, **options})


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


TRAINER_STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


@pytest.mark.parametrize(("train", "size"), [("scales", 3000), ("core", 5000), ("orthogonal", 8000)])
def test_checkpoints_hold_the_scales_and_resume_where_they_were(train: Way, size: int, made: Path, tmp_path: Path) -> None:
    def trained(out: str, resume: str | None = None) -> tuple[Any, ScalesTrainer]:
        model, scales = _attached(made, train)
        trainer = ScalesTrainer(model, _arguments(tmp_path / out), train_dataset=EXAMPLES, scales=scales)
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    model, trainer = trained("whole")
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        folder = tmp_path / "whole" / checkpoint
        assert _names(folder) == TRAINER_STATE | {CHECKPOINT_FILE}
        assert (folder / CHECKPOINT_FILE).stat().st_size < size

    trainer.save_model(str(tmp_path / "saved"))
    assert _names(tmp_path / "saved") == {CHECKPOINT_FILE, "training_args.bin"}
    surgery.fold(made / "f", tmp_path / "saved" / CHECKPOINT_FILE, tmp_path / "folded")
    model.eval()
    assert torch.allclose(_load(tmp_path / "folded")(IDS).logits, model(IDS).logits, atol=1e-4)

    _, resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert _apart(resumed.scales.values(), trainer.scales.values()) < 1e-6
    half = _attached(made, train)[1]
    half.load(tmp_path / "whole" / "checkpoint-2" / CHECKPOINT_FILE)
    assert _apart(half.values(), trainer.scales.values()) > 0.01
    states = [
        torch.load(tmp_path / out / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"] for out in ("whole", "resumed")
    ]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.allclose(value, states[1][key][name], rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore:weights of the model are residuals")
@pytest.mark.parametrize("train", ["scales", "orthogonal"])
def test_directions_are_chosen_before_the_first_step(train: Way, made: Path, tmp_path: Path) -> None:
    """A resumed run takes the same steps, and so does one to which the choice was given: no random state has changed."""

    def trained(out: str, resume: str | None = None, chosen: Path | None = None) -> ScalesTrainer:
        model, scales = _attached(made, train)
        if chosen is not None:
            scales.load(chosen)
            for parameter in scales.parameters():
                nn.init.zeros_(parameter)
        callbacks = [] if chosen is not None else [surgery.ChooseDirections(scales, keep=2, batches=3)]
        arguments = _arguments(tmp_path / out)
        trainer = ScalesTrainer(model, arguments, train_dataset=EXAMPLES, scales=scales, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = trained("whole")
    chosen = trainer.scales.chosen
    assert chosen is not None
    assert all(mask.sum() == 2 for mask in chosen.values())
    assert trainer.state.global_step == 4
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for other in (trained("resumed", str(checkpoint)), trained("given", chosen=checkpoint / CHECKPOINT_FILE)):
        assert _apart(other.scales.values(), trainer.scales.values()) < 1e-6
        assert other.scales.chosen is not None
        assert all(torch.equal(mask, other.scales.chosen[key]) for key, mask in chosen.items())
    assert all((value - _attached(made, train)[1].values()[key]).any() for key, value in trainer.scales.values().items())


def test_choices_that_come_too_late_or_from_elsewhere(made: Path, tmp_path: Path) -> None:
    model, scales = _attached(made)
    other = _attached(made)[1]
    with pytest.raises(OptionError, match="other scales than the Trainer"):
        ScalesTrainer(model, _arguments(tmp_path), scales=scales, callbacks=[surgery.ChooseDirections(other)])
    with pytest.raises(OptionError, match="batches must be 1 or more"):
        surgery.ChooseDirections(scales, batches=0)
    with pytest.raises(OptionError, match=r"(?s)several processes.*choose in one process"):
        surgery.ChooseDirections(scales).on_train_begin(SimpleNamespace(world_size=2), None, None)
    stock = transformers.Trainer(
        model, _arguments(tmp_path / "stock"), train_dataset=EXAMPLES, callbacks=[surgery.ChooseDirections(scales)]
    )
    with pytest.raises(OptionError, match=r"needs a Trainer with surgery\.SaveScales"):
        stock.train()
    ScalesTrainer(model, _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales).train()
    trainer = ScalesTrainer(model, _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales)
    trainer.add_callback(surgery.ChooseDirections(scales))
    with pytest.raises(OptionError, match="saved before any directions were chosen"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.filterwarnings("ignore:weights of the model are residuals")
def test_an_optimizer_is_not_resumed_with_other_parameters(made: Path, tmp_path: Path) -> None:
    """Its state has the size of others, and steps with it would be anything."""

    def trainer(train: Way, keep: int | None = None) -> ScalesTrainer:
        model, scales = _attached(made, train)
        if keep is not None:
            model(input_ids=IDS, labels=IDS).loss.backward()
            scales.choose(keep)
        return ScalesTrainer(model, _arguments(tmp_path / train), train_dataset=EXAMPLES, scales=scales)

    for train in WAYS:
        trainer(train).train()
    untouched = tmp_path / "untouched/checkpoint-2"
    shutil.copytree(tmp_path / "core/checkpoint-2", untouched)
    surgery.new_scales(made / "f", untouched / CHECKPOINT_FILE, train="core", overwrite=True)
    for way, train in itertools.permutations(WAYS, 2):
        resumed = trainer(train)
        with pytest.raises(OptionError, match=rf"(?s)knows other parameters.*train '{way}'.*train '{train}'"):
            resumed.train(resume_from_checkpoint=str(tmp_path / way / "checkpoint-2"))
        assert "untouched" in repr(resumed.scales)
    with pytest.raises(OptionError, match=r"(?s)knows other directions.*resume before any are chosen"):
        trainer("core", keep=2).train(resume_from_checkpoint=str(untouched))


def test_a_callback_without_transformers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, scales = _attached(made)
    monkeypatch.delitem(sys.modules, "surgery.training.choose_directions", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    kind = surgery.ChooseDirections
    with pytest.raises(MissingExtra, match="transformers, which is"):
        kind(scales)


def test_home_folders(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is expanded where checkpoints are written, and where they are read."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    for resume in ({}, {"resume_from_checkpoint": "~/run/checkpoint-1"}):
        model, scales = _attached(made)
        steps = 2 if resume else 1
        arguments = _arguments(Path("~/run"), max_steps=steps, save_steps=1)
        trainer = ScalesTrainer(model, arguments, train_dataset=EXAMPLES, scales=scales)
        trainer.train(**resume)
        assert trainer.state.global_step == steps
    trainer.save_model("~/saved")
    assert _names(tmp_path / "saved") == {CHECKPOINT_FILE, "training_args.bin"}
    assert _names(tmp_path / "run/checkpoint-2") == TRAINER_STATE | {CHECKPOINT_FILE}
    assert not list(Path().iterdir())


def test_the_best_checkpoint_is_loaded_at_the_end(made: Path, tmp_path: Path) -> None:
    model, scales = _attached(made)
    # Training lowers the loss, so that by this measure the first checkpoint is the best.
    arguments = _arguments(
        tmp_path,
        max_steps=3,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    ScalesTrainer(model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, scales=scales).train()
    first, last = _attached(made)[1], _attached(made)[1]
    first.load(tmp_path / "checkpoint-1" / CHECKPOINT_FILE)
    last.load(tmp_path / "checkpoint-3" / CHECKPOINT_FILE)
    assert _apart(scales.values(), first.values()) == 0
    assert _apart(scales.values(), last.values()) > 0.01


def test_a_trainer_that_would_not_save_what_it_trains_is_refused(made: Path, tmp_path: Path) -> None:
    model, scales = _attached(made)
    with pytest.raises(OptionError, match="does not train the scales"):
        ScalesTrainer(_load(made / "f"), _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales)
    model.get_parameter("model.norm.weight").requires_grad_(True)
    with pytest.raises(OptionError, match=r"(?s)trainable parameters besides the scales.*'model\.norm\.weight'"):
        ScalesTrainer(model, _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("transformers.Trainer._load_best_model", rf"_load_best_model(.|\n)*transformers {transformers.__version__}(.|\n)*>=5"),
        ("transformers.trainer.SCHEDULER_NAME", r"SCHEDULER_NAME(.|\n)*transformers>=5"),
        ("accelerate.utils.is_peft_model", r"accelerate has no is_peft_model(.|\n)*accelerate>=1"),
    ],
)
def test_a_release_that_has_not_what_is_used_of_it(
    gone: str, said: str, monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    """Told before training, not by a checkpoint of the whole model or a failure in the middle."""
    model, scales = _attached(made)
    monkeypatch.delattr(gone)
    with pytest.raises(MissingExtra, match=said):
        ScalesTrainer(model, _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales)


def test_a_checkpoint_of_the_stock_trainer_is_refused(made: Path, tmp_path: Path) -> None:
    model, scales = _attached(made)
    transformers.Trainer(model, _arguments(tmp_path, max_steps=2), train_dataset=EXAMPLES).train()
    trainer = ScalesTrainer(model, _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales)
    with pytest.raises(ScalesError, match="there is no scales file"):
        trainer.train(resume_from_checkpoint=True)


# TRL


TRL_SETS_AN_OLD_NAME = "ignore:`gradient_checkpointing` is deprecated:FutureWarning"


def _sft(out: Path, model: Any, scales: surgery.Scales) -> Any:
    """TRL's trainer with the demo's tokenizer and four sentences."""
    import datasets
    import trl

    class ScalesSFTTrainer(SaveScales, trl.SFTTrainer):
        pass

    config = trl.SFTConfig(
        str(out),
        max_steps=4,
        save_steps=2,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        logging_steps=1,
        bf16=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    sentences = ["The raise statement re-raises the exception.", "A list is a mutable sequence of objects."]
    data = datasets.Dataset.from_dict({"text": [" ".join([sentence] * n) for n in (2, 1) for sentence in sentences]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO, eos_token="<0x00>", pad_token="<0x00>")
    return ScalesSFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, scales=scales)


@pytest.mark.filterwarnings("ignore:weights of the model are residuals", TRL_SETS_AN_OLD_NAME)
@pytest.mark.parametrize(("train", "keep"), [("scales", None), ("core", 3)])
def test_trl_trains_on_text_and_resumes(train: Way, keep: int | None, made: Path, tmp_path: Path) -> None:
    def trained(out: str, resume: str | None = None) -> Any:
        model, scales = _attached(made, train)
        trainer = _sft(tmp_path / out, model, scales)
        if keep is not None:
            trainer.add_callback(surgery.ChooseDirections(scales, keep=keep, batches=1))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = trained("whole")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert _names(checkpoint) == TRAINER_STATE | {CHECKPOINT_FILE, "tokenizer.json", "tokenizer_config.json"}
    assert _apart(trained("resumed", str(checkpoint)).scales.values(), trainer.scales.values()) < 1e-6
    report = surgery.fold(made / "f", tmp_path / "whole" / "checkpoint-4" / CHECKPOINT_FILE, tmp_path / "folded")
    assert report.changed == report.targets
    assert sum(parameter.numel() for parameter in trainer.scales.parameters()) == report.targets * (keep or 6) ** (
        1 + bool(keep)
    )


# Gradient checkpointing, autocast, torch.compile


@pytest.mark.parametrize(
    ("use_reentrant", "train"), [(False, "scales"), (True, "scales"), (False, "orthogonal"), (True, "core")]
)
def test_gradient_checkpointing(use_reentrant: bool, train: Way, made: Path) -> None:
    expected = _gradients(*_attached(made, train))
    model, scales = _attached(made, train)
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.train()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    for gradient, right in zip(_gradients(model, scales), expected, strict=True):
        assert gradient is not None
        assert torch.allclose(gradient, right, rtol=1e-4, atol=1e-8)
    assert len(runs) == 2  # once more in the backward pass


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_needs_an_input_that_requires_a_gradient(made: Path) -> None:
    model, scales = _attached(made)
    model.train()
    checkpoint_activations(model, use_reentrant=True)
    model.disable_input_require_grads()  # what a model without token embeddings, or an older transformers, starts from
    with pytest.raises(RuntimeError, match="does not require grad"):
        _gradients(model, scales)
    model.enable_input_require_grads()
    assert all(gradient is not None for gradient in _gradients(model, scales))


@pytest.mark.parametrize("train", ["scales", "core", "orthogonal"])
def test_autocast_to_bfloat16_keeps_scales_in_float32(train: Way, made: Path) -> None:
    expected = _gradients(*_attached(made, train))
    model, scales = _attached(made, train)
    gradients = _gradients(model, scales, lambda: torch.autocast("cpu", torch.bfloat16))
    for gradient, right in zip(gradients, expected, strict=True):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient, right, dim=0) > 0.99
    assert all(parameter.dtype == torch.float32 for parameter in scales.parameters())


@pytest.mark.parametrize("train", ["scales", "core"])
def test_scales_stay_in_float32_whatever_the_model_is_cast_to(train: Way, made: Path, tmp_path: Path) -> None:
    model, scales = _attached(made, train)
    for parameter in scales.parameters():
        nn.init.normal_(parameter)
    values = scales.values()
    model.to(torch.float16)
    assert _apart(scales.values(), values) == 0
    # The Trainer does the same when it evaluates.
    arguments = _arguments(tmp_path, bf16_full_eval=True)
    ScalesTrainer(model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, scales=scales).evaluate()
    assert _apart(scales.values(), values) == 0


def test_compile_without_graph_breaks(made: Path, truth: dict[str, torch.Tensor]) -> None:
    model, scales = _attached(made)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert _apart(_loop(compiled, scales), truth) < 1e-5


# Two processes


def _chosen_cores(made: Path, ids: torch.Tensor) -> tuple[Any, surgery.Scales]:
    """Cores of the directions that a loss on some rows chooses."""
    model = _load(made / "m")
    scales = surgery.attach(model, made / "f", train="core")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    scales.choose(keep=3)
    return model, scales


def _chosen(rank: int, made: Path, out: Path) -> None:
    """Chosen by the rows of both processes, and trained in DistributedDataParallel and in FSDP2; there nothing is chosen."""
    from torch.distributed.fsdp import fully_shard

    ids = IDS[rank * 4 : rank * 4 + 4]
    model, scales = _chosen_cores(made, ids)
    scales.save(out / "chosen.safetensors")
    torch.distributed.barrier()
    fresh = surgery.attach(bare := _load(made / "m"), made / "f", train="core")
    wrapped, other = nn.parallel.DistributedDataParallel(model), nn.parallel.DistributedDataParallel(bare)
    torch.save(_loop(wrapped, scales, ids), out / f"chosen-ddp-{rank}.pt")
    scales.load(out / "chosen.safetensors")
    other(input_ids=ids, labels=ids).loss.backward()
    for refused in (lambda: scales.choose(1), lambda: fresh.choose(1), lambda: fresh.load(out / "chosen.safetensors")):
        with pytest.raises(OptionError, match="distributed over processes already"):
            refused()
    assert fresh.chosen is None

    model = _load(made / "m")
    scales = surgery.attach(model, made / "f", train="core")
    scales.load(out / "chosen.safetensors")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    values = _loop(model, scales, ids)
    torch.save(values, out / f"chosen-fsdp2-{rank}.pt")
    with pytest.raises(OptionError, match="distributed over processes already"):
        scales.choose(1)
    scales.save(out / "chosen-fsdp2.safetensors")
    torch.distributed.barrier()
    scales.load(out / "chosen.safetensors")
    assert not any(bool((value - torch.eye(6)).any()) for value in scales.values().values())
    scales.load(out / "chosen-fsdp2.safetensors")
    assert _apart(scales.values(), values) < 1e-6


def _ddp(rank: int, made: Path, out: Path) -> None:
    model, scales = _attached(made)
    wrapped = nn.parallel.DistributedDataParallel(model)
    _loop(wrapped, scales, IDS[rank * 4 : rank * 4 + 4])
    scales.save(out / "ddp.safetensors")
    torch.save(scales.values(), out / f"ddp-{rank}.pt")


def _fsdp2(rank: int, made: Path, out: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, scales = _attached(made)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in scales.parameters())
    values = _loop(model, scales, IDS[rank * 4 : rank * 4 + 4])
    torch.save(values, out / f"fsdp2-{rank}.pt")
    scales.save(out / "fsdp2.safetensors")
    torch.distributed.barrier()
    for parameter in scales.parameters():
        nn.init.zeros_(parameter)
    scales.load(out / "fsdp2.safetensors")
    assert _apart(scales.values(), values) == 0
    with scales.untouched():
        assert torch.allclose(model(IDS).logits, _load(made / "m")(IDS).logits, atol=1e-4)


#: Before, the Trainer reads the optimizer's state to a device "cpu:0", which torch does not know.
resuming_in_two_processes = needs("transformers", ">=5.19", "resuming in two processes on CPUs")


def _arguments_for_two(out: Path, sharded: bool) -> transformers.TrainingArguments:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    options: dict[str, Any] = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    if sharded:
        options["fsdp"] = True
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
            "cpu_ram_efficient_loading": False,
        }
    arguments = _arguments(out, **options)
    assert arguments.world_size == 2
    if sharded:
        # accelerate shards on GPUs only, and decides by this; all that follows is the real thing.
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def _trainer(rank: int, made: Path, out: Path, sharded: bool) -> None:
    def trained(name: str, resume: str | None = None) -> ScalesTrainer:
        model, scales = _attached(made)
        trainer = ScalesTrainer(model, _arguments_for_two(out / name, sharded), train_dataset=EXAMPLES, scales=scales)
        assert trainer.is_fsdp_enabled is sharded
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    kind = "sharded" if sharded else "replicated"
    trainer = trained(kind)
    trainer.save_model(str(out / f"{kind}-saved"))
    torch.save(trainer.scales.values(), out / f"{kind}-{rank}.pt")
    torch.distributed.barrier()
    if not resuming_in_two_processes.args[0]:
        resumed = trained(f"{kind}-resumed", str(out / kind / "checkpoint-2"))
        torch.save(resumed.scales.values(), out / f"{kind}-resumed-{rank}.pt")
    if sharded:
        model, scales = _adapted(made)
        with pytest.raises(OptionError, match="scales or PEFT's adapters, not both"):
            ScalesTrainer(model, _arguments_for_two(out / "both", sharded), train_dataset=EXAMPLES, scales=scales)


def _process(rank: int, made: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    _ddp(rank, made, out)
    _fsdp2(rank, made, out)
    _chosen(rank, made, out)
    _trainer(rank, made, out, sharded=False)
    _trainer(rank, made, out, sharded=True)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What two processes wrote. One start for all tests: it takes longer than what they do."""
    out = tmp_path_factory.mktemp("two-processes")
    context = torch.multiprocessing.spawn(_process, (made, out), nprocs=2, join=False)
    assert context is not None
    try:
        while not context.join(timeout=120):
            assert any(process.exitcode == 0 for process in context.processes), "the processes hang"
        yield out
    finally:
        for process in context.processes:
            process.kill()


def _written(out: Path, name: str) -> dict[str, torch.Tensor]:
    """Scales as two processes had them: the same."""
    one, other = (torch.load(out / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert _apart(one, other) == 0
    return one


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(
    kind: str, made: Path, truth: dict[str, torch.Tensor], two_processes: Path, tmp_path: Path
) -> None:
    values = _written(two_processes, kind)
    assert _apart(values, truth) < 1e-5
    scales = _attached(made)[1]
    scales.load(two_processes / f"{kind}.safetensors")
    assert _apart(scales.values(), values) == 0
    surgery.fold(made / "f", two_processes / f"{kind}.safetensors", tmp_path / "folded")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_choose_what_one_does(kind: str, made: Path, two_processes: Path) -> None:
    model, scales = _chosen_cores(made, IDS)
    values = _loop(model, scales)
    assert _apart(_written(two_processes, f"chosen-{kind}"), values) < 1e-5
    given = surgery.attach(_load(made / "m"), made / "f", train="core")
    given.load(two_processes / "chosen.safetensors")
    assert scales.chosen is not None
    assert given.chosen is not None
    assert all(torch.equal(mask, given.chosen[key]) for key, mask in scales.chosen.items())


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_the_trainer_on_two_processes(kind: str, made: Path, two_processes: Path, tmp_path: Path) -> None:
    values = _written(two_processes, kind)
    model, scales = _attached(made)
    alone = ScalesTrainer(model, _arguments(tmp_path, per_device_train_batch_size=4), train_dataset=EXAMPLES, scales=scales)
    alone.train()
    assert _apart(values, scales.values()) < 1e-5
    for folder in (two_processes / kind / "checkpoint-2", two_processes / f"{kind}-saved"):
        names = {name for name in _names(folder) if "optimizer" not in name and "rng_state" not in name}
        assert names <= {CHECKPOINT_FILE, "training_args.bin", "trainer_state.json", "scheduler.pt"}
        scales.load(folder / CHECKPOINT_FILE)
    assert _apart(scales.values(), values) == 0


@resuming_in_two_processes
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_resumed_on_two_processes(kind: str, two_processes: Path) -> None:
    assert _apart(_written(two_processes, f"{kind}-resumed"), _written(two_processes, kind)) < 1e-6


# accelerate's device hooks


def test_weights_offloaded_to_memory(made: Path, truth: dict[str, torch.Tensor]) -> None:
    import accelerate

    model = _load(made / "f")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert _apart(_loop(model, surgery.attach(model, made / "f")), truth) < 1e-6


def test_scales_that_were_offloaded_are_refused(made: Path) -> None:
    import accelerate

    model, scales = _attached(made)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(OptionError, match=r"(?s)offload.*attach"):
        list(scales.parameters())


def test_weights_offloaded_to_disk(made: Path, tmp_path: Path, truth: dict[str, torch.Tensor]) -> None:
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = {name: "disk" if name == "model.layers.1" else "cpu" for name in names}
    model = _load(made / "f", device_map=places, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    scales = surgery.attach(model, made / "f")
    assert all(not parameter.is_meta for parameter in scales.parameters())
    assert _apart(_loop(model, scales), truth) < 1e-6


# Quantized weights


def _quantized(folder: Path, bits: int) -> Any:
    return _load(folder, quantization_config=transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))


quantizes = needs("bitsandbytes", ">=0.50.2", "a quantized base")


@quantizes
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_through_a_quantized_base(bits: int, made: Path) -> None:
    model = _quantized(made / "m", bits)
    scales = surgery.attach(model, made / "overlay")
    model.train()
    gradients = dict(zip(scales.values(), _gradients(model, scales), strict=True))
    dense = _quantized(made / "m", bits).dequantize().float().requires_grad_(True)
    dense(input_ids=IDS, labels=IDS).loss.backward()
    factors = tensors_of(made / "overlay" / "surgery")
    for name, gradient in gradients.items():
        U, s, V = (factors[f"{name}.{part}"] for part in "UsV")
        right = s * torch.einsum("ik,ij,jk->k", U, dense.get_parameter(name).grad, V)
        assert gradient is not None
        assert torch.cosine_similarity(gradient, right, dim=0) > 0.9999


@quantizes
@pytest.mark.filterwarnings(TRL_SETS_AN_OLD_NAME)
def test_trl_on_a_quantized_base(made: Path, tmp_path: Path) -> None:
    model = _quantized(made / "m", 4)
    scales = surgery.attach(model, made / "overlay")
    trainer = _sft(tmp_path / "out", model, scales)
    assert all(parameter.dtype == torch.float32 for parameter in scales.parameters())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert TRAINER_STATE | {CHECKPOINT_FILE} <= _names(checkpoint)
    report = surgery.fold(made / "overlay", checkpoint / CHECKPOINT_FILE, tmp_path / "folded", base=made / "m")
    assert report.changed == report.targets


# PEFT

PEFT_ASKS_BY_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def _adapted(made: Path, train: Way = "scales") -> tuple[Any, surgery.Scales]:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(_load(made / "f"), config)
    return model, surgery.attach(model, made / "f", train=train)


@pytest.mark.filterwarnings(PEFT_ASKS_BY_AN_OLD_NAME)
@pytest.mark.parametrize("train", ["scales", "core"])
def test_adapters_beside_scales(train: Way, made: Path, tmp_path: Path) -> None:
    import peft

    def trained(out: str, resume: str | None = None) -> tuple[Any, ScalesTrainer]:
        model, scales = _adapted(made, train)
        trainer = ScalesTrainer(model, _arguments(tmp_path / out), train_dataset=EXAMPLES, scales=scales)
        trainer.train(resume_from_checkpoint=resume)
        return model.eval(), trainer

    model, trainer = trained("whole")
    untouched, _ = _adapted(made, train)
    for name, parameter in model.named_parameters():
        learned = not torch.equal(parameter, untouched.get_parameter(name))
        assert learned is (".lora_" in name or ".surgery_scale." in name), name
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert _names(checkpoint) == TRAINER_STATE | {
        CHECKPOINT_FILE,
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    surgery.fold(made / "f", checkpoint / CHECKPOINT_FILE, tmp_path / "folded")
    folded = peft.PeftModel.from_pretrained(_load(tmp_path / "folded"), checkpoint).eval()
    assert torch.allclose(folded(IDS).logits, model(IDS).logits, atol=1e-4)

    again, resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert _apart(resumed.scales.values(), trainer.scales.values()) < 1e-6
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.filterwarnings(PEFT_ASKS_BY_AN_OLD_NAME)
def test_scales_that_peft_froze_are_refused(made: Path, tmp_path: Path) -> None:
    import peft

    model, scales = _attached(made)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(OptionError, match=r"(?s)does not train the scales.*get_peft_model, comes before attach"):
        ScalesTrainer(adapted, _arguments(tmp_path), train_dataset=EXAMPLES, scales=scales)
