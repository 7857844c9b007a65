"""The built-in demonstration: the whole job on a small real language model, in under a minute.

The model (``model/``, written by tools/train_demo_model.py) has learned the source code of the Python standard
library. The demo adapts it to English reference prose, the topics of ``help()``, by training nothing but scales.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.commands.factorize import factorize
from surgery.commands.fold import fold
from surgery.device import on_its_own_terms
from surgery.errors import OutputError
from surgery.models.transformers_api import imported
from surgery.names import CONFIG_FILE
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.training.attach import attach

MODEL = Path(__file__).with_name("model")
CONTEXT = 256
_BATCH = 16
_LEARNING_RATE = 2e-2


@dataclass(frozen=True, slots=True)
class DemoReport(Report):
    """What the demo measured.

    Attributes:
        out: the folder that keeps its results; None where nothing is kept.
        weights: how many the model has.
        targets: how many matrices have been factorized.
        trainable: how many scales there are.
        source_bytes, factorized_bytes, scales_bytes: of the model, the factorized folder and the scales file.
        untouched_fold_identical: whether folding untouched scales gives the original files back, byte for byte.
        steps: of the training.
        loss_before, loss_attached, loss_folded: in nats per byte of text that was held out: of the model, with trained scales,
            and of the folded model.
        seconds_factorize, seconds_train, seconds_fold: how long each took.
    """

    out: Path | None
    weights: int
    targets: int
    trainable: int
    source_bytes: int
    factorized_bytes: int
    scales_bytes: int
    untouched_fold_identical: bool
    steps: int
    loss_before: float
    loss_attached: float
    loss_folded: float
    seconds_factorize: float
    seconds_train: float
    seconds_fold: float


@on_its_own_terms
def run_demo(
    out: str | Path | None = None,
    *,
    rank: int = 16,
    steps: int = 60,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoReport:
    """Factorize the built-in model, train its scales on text of another kind, fold, and compare.

    Args:
        out: folder that keeps ``factorized/``, ``scales.safetensors`` and ``folded/``; None keeps nothing. A demo that was
            stopped is gone on with.
        rank: directions per target.
        steps: optimizer steps.
        device: where the linear algebra of factorize and fold runs; training is on the CPU.
        overwrite: replace an earlier demo in ``out``.
        progress: told how far it is, and what the user should know; without it that is a ``SurgeryWarning``.

    Returns:
        Sizes, losses and times, and whether untouched scales fold to the original files.

    Raises:
        MissingExtra: transformers is not installed.
        SurgeryError: as for ``factorize`` and ``fold``.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="surgery-demo-") as folder:
            report = _run(Path(folder), rank, steps, str(device), overwrite, listening())
        return replace(report, out=None)
    there = [path for name in ("factorized", "scales.safetensors", "folded") if (path := Path(out) / name).exists()]
    # The folded model comes last, and its config last of all: without it an earlier start was stopped, and this one goes on.
    is_begun = (Path(out) / "factorized").is_dir() and not (Path(out) / "folded" / CONFIG_FILE).exists()
    if there and not is_begun and not overwrite:
        raise OutputError(f"{there[0]} is there already", hint="--overwrite replaces an earlier demo")
    return _run(Path(out), rank, steps, str(device), overwrite, listening())


def _run(out: Path, rank: int, steps: int, device: str, overwrite: bool, progress: Progress) -> DemoReport:
    """Run the demo in a folder that exists already."""
    train, held_out = prose()
    with phase(progress, "loading transformers"):
        model = load(MODEL)
    with phase(progress, "measuring"):
        loss_before = mean_loss(model, held_out)
    factorized, scales_file = out / "factorized", out / "scales.safetensors"

    clock = time.perf_counter()
    factorized_report = factorize(MODEL, factorized, rank=rank, device=device, overwrite=overwrite)
    seconds_factorize = time.perf_counter() - clock

    with tempfile.TemporaryDirectory(prefix="surgery-demo-") as untouched:
        untouched_scales, folded = factorized / "surgery/scales.safetensors", Path(untouched) / "folded"
        report = fold(factorized, untouched_scales, folded, device=device, progress=progress)
    identical = report.restored == len(report.files)

    clock = time.perf_counter()
    model = load(MODEL)
    scales = attach(model, factorized)
    _train(model, list(scales.parameters()), train, steps, progress)
    scales.save(scales_file)
    seconds_train = time.perf_counter() - clock
    loss_attached = mean_loss(model, held_out)

    clock = time.perf_counter()
    fold(factorized, scales_file, out / "folded", device=device, overwrite=overwrite)
    seconds_fold = time.perf_counter() - clock

    return DemoReport(
        out=out,
        weights=sum(parameter.numel() for parameter in load(MODEL).parameters()),
        targets=factorized_report.targets,
        trainable=factorized_report.trainable,
        source_bytes=_size(MODEL),
        factorized_bytes=_size(factorized),
        scales_bytes=scales_file.stat().st_size,
        untouched_fold_identical=identical,
        steps=steps,
        loss_before=loss_before,
        loss_attached=loss_attached,
        loss_folded=mean_loss(load(out / "folded"), held_out),
        seconds_factorize=seconds_factorize,
        seconds_train=seconds_train,
        seconds_fold=seconds_fold,
    )


def load(folder: Path) -> Any:
    """The causal language model of a folder, by transformers, float32 on the CPU. Raises MissingExtra without these."""
    transformers = imported("the demo trains with")
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def prose() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out text as bytes, int64: the topics of ``help()``, every fifth held out."""
    from pydoc_data.topics import topics

    texts = [topics[name].encode() for name in sorted(topics)]
    split = [b"\n".join(texts[i] for i in range(len(texts)) if (i % 5 == 0) is held) for held in (False, True)]
    train, held_out = (torch.frombuffer(bytearray(data), dtype=torch.uint8).long() for data in split)
    return train, held_out


def _train(model: Any, parameters: list[torch.nn.Parameter], text: torch.Tensor, steps: int, progress: Progress) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with phase(progress, "training", steps * _BATCH * CONTEXT):
        for _ in range(steps):
            starts = torch.randint(len(text) - CONTEXT, (_BATCH, 1), generator=generator)
            ids = text[starts + torch.arange(CONTEXT)]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.item(f"loss {loss.item():.3f}")
            progress.advance(ids.numel())


@torch.no_grad()
def mean_loss(model: Any, text: torch.Tensor) -> float:
    """Mean cross-entropy in nats per byte, over 64 windows spread evenly over text, int64 (bytes,)."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, 64, dtype=torch.float32).long()[:, None]
    ids = text[starts + torch.arange(CONTEXT)]
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in torch.split(ids, 16)]
    return sum(losses) / len(losses)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
