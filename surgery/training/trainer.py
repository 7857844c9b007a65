"""``SaveScales``: transformers' Trainer and its subclasses, such as TRL's, with scales.

It saves the scales instead of the model, and the reference model of a preference or reinforcement loss is the same model with
its scales untouched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.arguments import as_path
from surgery.errors import OptionError
from surgery.format.scales.reading import read_scales_alone
from surgery.models.accelerate_api import is_peft_model, save_sharded_optimizer
from surgery.models.transformers_api import check_trainer_class, counted_as_adapted, trainer_file
from surgery.names import CHECKPOINT_FILE
from surgery.training.attached_scales import Scales
from surgery.training.reference import check_arguments, check_callback, check_trainer, no_second_load, own_forward

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the real one comes after the mixin in the bases, and transformers is optional


class SaveScales(_Trainer):
    """Mixin for transformers' Trainer and its subclasses: save and resume the scales, never the frozen model.

        class ScalesTrainer(SaveScales, Trainer): ...

        scales = surgery.attach(model, "factorized")
        trainer = ScalesTrainer(model, args, train_dataset=data, scales=scales)

    In place of the model, a checkpoint holds ``scales.safetensors``, which ``surgery fold`` takes. Otherwise it holds
    what a Trainer's checkpoint holds: tokenizer, arguments, optimizer, scheduler, random states and Trainer state.
    ``save_model`` writes the same, without the last four.

    Resuming and ``load_best_model_at_end`` read the scales back. A resumed run takes the same steps as an uninterrupted
    one. It starts from scales g that were rounded once, by at most 2^-24 of g.

    Cores (``attach(..., train=...)``) are saved in the same way, and so is the choice of directions
    (``ChooseDirections``). Under FSDP2, the scales are gathered when they are saved. If the model also has PEFT's
    adapters, these are saved as PEFT saves them.

    TRL's trainers with a reference model (DPO, KTO, GRPO, RLOO, online DPO) need no second model in memory. Unless you
    pass a reference model, the reference is the same model with its scales untouched, whatever the scales are when
    training begins.

    Args:
        scales: the scales attached to the Trainer's model. All other arguments are the Trainer's own.

    Raises:
        OptionError: the Trainer's model does not train these scales, or trains more than its checkpoints would hold. Or
            the Trainer makes a second model by itself, mixes or merges whole models, sends weights to vLLM, or reads
            the weight of an output head that has scales: all of these would leave the scales out.
    """

    def __init__(self, *args: Any, scales: Scales, **kwargs: Any) -> None:
        if not isinstance(scales, Scales):
            raise OptionError("these are no scales", got=type(scales).__name__, expected="what surgery.attach returns")
        self.scales = scales
        bases = type(self).__mro__
        own_bases = bases[bases.index(SaveScales) + 1 :]
        check_trainer_class(own_bases)
        given = check_arguments(own_bases, scales, args, kwargs)
        before: Any = given.get("model")
        forward = own_forward(before) if isinstance(before, torch.nn.Module) else None
        held = [(parameter.data, parameter.requires_grad) for parameter in scales.parameters()]
        with counted_as_adapted(before), scales.untouched(), no_second_load(type(self), given):
            super().__init__(*args, **kwargs)
        for parameter, (value, trainable) in zip(scales.parameters(), held, strict=True):
            if parameter.dtype != value.dtype:  # TRL makes bfloat16 of all that is trained in a quantized model
                parameter.data = value.to(parameter.device)
            if is_peft_model(before):  # TRL adds a copy of the adapters for a reference, and PEFT freezes all else again
                parameter.requires_grad_(trainable)
        model: Any = self.model
        trained = {id(value): name for name, value in model.named_parameters() if value.requires_grad}
        own = {id(value) for value in scales.parameters()}
        if not own <= trained.keys():
            raise OptionError(
                "the Trainer's model does not train the scales it was given",
                hint="attach to the very model that the Trainer gets; what freezes it later, such as PEFT's get_peft_model, "
                "comes before attach",
            )
        others = [name for key, name in trained.items() if key not in own]
        if others and not self._has_adapters():
            raise OptionError(
                "the model has trainable parameters besides the scales, which no checkpoint would hold",
                got=f"{others[0]!r}, one of {len(others)}",
                hint="freeze them after attach, or save them on your own with the stock Trainer",
            )
        if self.is_fsdp_enabled and self._has_adapters():
            raise OptionError("under FSDP, checkpoints can hold scales or PEFT's adapters, not both", hint="train one of them")
        check_trainer(self, scales, given, forward)
        for callback in self.callback_handler.callbacks:
            self._show_itself(callback)

    def add_callback(self, callback: Any) -> None:
        """The Trainer's method. It refuses callbacks that make or change whole models.

        Args:
            callback: an object or a class, as transformers takes it.

        Raises:
            OptionError: the callback makes or changes whole models.
        """
        check_callback(callback)
        self._show_itself(callback)
        super().add_callback(callback)

    def _show_itself(self, callback: Any) -> None:
        from surgery.training.choose_directions import show_trainer  # which imports transformers

        show_trainer(callback, self)

    def train(self, *args: Any, **options: Any) -> Any:
        """The Trainer's method. It expands ``~`` in the path of a checkpoint to resume from."""
        name = "resume_from_checkpoint"
        if args and isinstance(args[0], str | Path):
            args = (str(as_path(args[0], name)), *args[1:])
        elif isinstance(options.get(name), str | Path):
            options[name] = str(as_path(options[name], name))
        return super().train(*args, **options)

    def _has_adapters(self) -> bool:
        return is_peft_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        if self._has_adapters():
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer: Any = self.processing_class
            if tokenizer is None:
                tokenizer = getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / trainer_file("TRAINING_ARGS_NAME"))
        self.scales.save(folder / CHECKPOINT_FILE)  # by all processes: it gathers what is sharded, and the first one writes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the scales, the tokenizer and the arguments to a folder, by default ``args.output_dir``.

        In a distributed run, all processes must call this.

        Args:
            output_dir: the folder; ``~`` is expanded.

        Raises:
            OptionError, OutputError: see ``Scales.save``.
        """
        if output_dir is not None:
            output_dir = str(as_path(output_dir, "output_dir"))
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # The Trainer gathers the whole model first, or with sharded checkpoints saves nothing here.
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer would write the shards of the model as well.
        scheduler: Any = self.lr_scheduler
        save_sharded_optimizer(self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(scheduler.state_dict(), Path(output_dir) / trainer_file("SCHEDULER_NAME"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._has_adapters():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / CHECKPOINT_FILE
        _check_resumed(self.scales, path)
        self.scales.load(path)

    def _load_best_model(self) -> None:
        if self._has_adapters():
            super()._load_best_model()
        best: Any = self.state.best_model_checkpoint
        self.scales.load(Path(best) / CHECKPOINT_FILE)


def _check_resumed(scales: Scales, path: Path) -> None:
    """Refuse the scales file of a checkpoint whose optimizer has other parameters, which it would apply to these unseen.

    Raises:
        OptionError: it was trained in another way, or in other directions.
        ScalesError, FormatError, ReadError: see ``read_scales_alone``.
    """
    file = read_scales_alone(path)
    way = "orthogonal" if "orthogonal" in file.beside else file.train
    hint = "start again: load its scales, without resume_from_checkpoint"
    if way != scales.train:
        raise OptionError(
            f"the optimizer of the checkpoint {path.parent} knows other parameters than those that are attached",
            got=f"train {way!r}",
            expected=f"train {scales.train!r}",
            hint=f"attach with train={way!r}; or {hint}",
        )
    saved = file.beside.get("chosen", {})
    if any(not torch.equal(mask, saved.get(key, torch.ones_like(mask)).bool()) for key, mask in (scales.chosen or {}).items()):
        raise OptionError(
            f"the optimizer of the checkpoint {path.parent} knows other directions than those that are chosen",
            hint=f"resume before any are chosen: the checkpoint brings its own; or {hint}",
        )
