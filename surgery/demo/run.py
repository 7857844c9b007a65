"""The built-in demonstration: the whole job on a small language model, in under a minute on two cores.

The model (``model/``, written by tools/train_demo_model.py) has learned the source code of the Python standard
library. The demo adapts it to English reference prose, the topics of ``help()``, by training nothing but scales.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.commands.factorize import factorize
from surgery.commands.fold import fold
from surgery.demo.folder import FACTORIZED, FOLDED, ORIGINAL, REPORT, SCALES, check_folder, copy_original, write_readme
from surgery.demo.sentence import SentenceLoss, in_one_line, measure_sentences
from surgery.device import on_its_own_terms
from surgery.models.transformers_api import imported
from surgery.progress import Progress, listening, phase
from surgery.reports import Report
from surgery.study.spectra import spectra
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
        steps: how many steps the training took.
        loss_before, loss_attached, loss_folded: in nats per byte of text that was held out: of the model, with trained scales,
            and of the folded model.
        seconds_factorize, seconds_train, seconds_fold: how long each took.
        seconds_report: how long the report of the spectra took; None where nothing is kept.
        sentences_measured: how many held-out sentences the original and the folded model were compared on. They are not in
            the training text.
        sentences_gained: how many of these are more probable for the folded model.
        sentences: two of these sentences: the one whose probability grew most, and the one of median growth.
        changed_by_projection, changed_by_layer: how far the scales g are from 1 after the training, as the mean of abs(g - 1):
            of each kind of projection, and of each layer.
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
    seconds_report: float | None
    sentences_measured: int
    sentences_gained: int
    sentences: tuple[SentenceLoss, ...]
    changed_by_projection: Mapping[str, float]
    changed_by_layer: Mapping[str, float]


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
        out: folder that keeps the results: ``original/``, ``factorized/``, ``scales.safetensors``, ``folded/``, the report of
            ``spectra`` on both models in ``report/``, and a ``README.md`` that says what to do with them. None keeps nothing.
            After a demo that was stopped, the same call continues.
        rank: directions per target.
        steps: optimizer steps.
        device: where the linear algebra of factorize and fold runs; training is on the CPU.
        overwrite: replace an earlier demo in ``out``.
        progress: receives the progress and the notes. Without it, each note is a ``SurgeryWarning``.

    Returns:
        Sizes, losses and times, some sentences before and after, which scales changed, and whether untouched scales fold to
        the original files.

    Raises:
        MissingExtra: transformers is not installed.
        OutputError: ``out`` holds an earlier demo, or other files under the demo's names.
        SurgeryError: as for ``factorize``, ``fold`` and ``spectra``.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="surgery-demo-") as folder:
            report = _run(Path(folder), rank, steps, str(device), overwrite=False, replaces=False)
        return replace(report, out=None)
    out = Path(out)
    replaces = check_folder(out, MODEL, overwrite=overwrite)
    report = _run(out, rank, steps, str(device), overwrite=overwrite, replaces=replaces)
    copy_original(out, MODEL)
    clock = time.perf_counter()
    spectra(out / ORIGINAL, out / FOLDED, out=out / REPORT, device=device, overwrite=replaces)
    report = replace(report, seconds_report=time.perf_counter() - clock)
    write_readme(out, rank)
    return report


def _run(out: Path, rank: int, steps: int, device: str, *, overwrite: bool, replaces: bool) -> DemoReport:
    """Factorize, train, fold and compare, in a folder.

    Args:
        out, rank, steps, device: as for ``run_demo``.
        overwrite: whether a finished factorized checkpoint may be replaced. Without it one of another run is refused, and the
            one of an equal run is taken.
        replaces: whether a finished folded model may be replaced.
    """
    progress = listening()
    train, held_out = prose()
    with phase(progress, "loading transformers"):
        model = load(MODEL)
    with phase(progress, "measuring"):
        loss_before = mean_loss(model, held_out)
    factorized, scales_file, folded = out / FACTORIZED, out / SCALES, out / FOLDED

    clock = time.perf_counter()
    factorized_report = factorize(MODEL, factorized, rank=rank, device=device, overwrite=overwrite)
    seconds_factorize = time.perf_counter() - clock
    identical = _untouched_fold_is_identical(factorized, device)

    clock = time.perf_counter()
    attached = load(MODEL)
    scales = attach(attached, factorized)
    _train(attached, list(scales.parameters()), train, steps, progress)
    scales.save(scales_file)
    seconds_train = time.perf_counter() - clock
    loss_attached = mean_loss(attached, held_out)

    clock = time.perf_counter()
    fold(factorized, scales_file, folded, device=device, overwrite=replaces)
    seconds_fold = time.perf_counter() - clock
    with phase(progress, "measuring"):
        folded_model = load(folded)
        sentences = measure_sentences(model, folded_model, held_out, train)
        loss_folded = mean_loss(folded_model, held_out)

    by_projection, by_layer = _changes(scales.values())
    return DemoReport(
        out=out,
        weights=sum(parameter.numel() for parameter in model.parameters()),
        targets=factorized_report.targets,
        trainable=factorized_report.trainable,
        source_bytes=_size(MODEL),
        factorized_bytes=_size(factorized),
        scales_bytes=scales_file.stat().st_size,
        untouched_fold_identical=identical,
        steps=steps,
        loss_before=loss_before,
        loss_attached=loss_attached,
        loss_folded=loss_folded,
        seconds_factorize=seconds_factorize,
        seconds_train=seconds_train,
        seconds_fold=seconds_fold,
        seconds_report=None,
        sentences_measured=len(sentences),
        sentences_gained=sum(sentence.gain > 0 for sentence in sentences),
        sentences=(sentences[0], sentences[len(sentences) // 2]),
        changed_by_projection=by_projection,
        changed_by_layer=by_layer,
    )


def _untouched_fold_is_identical(factorized: Path, device: str) -> bool:
    """Whether folding the scales that factorize has written gives the original files back."""
    with tempfile.TemporaryDirectory(prefix="surgery-demo-") as untouched:
        report = fold(factorized, factorized / "surgery/scales.safetensors", Path(untouched) / "folded", device=device)
    return report.restored == len(report.files)


def _changes(scales: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of abs(g - 1) over all scales of each kind of projection, and over those of each layer, by target's name."""
    groups: tuple[dict[str, list[torch.Tensor]], ...] = ({}, {})
    for name, g in scales.items():
        _, layer, projection = re.findall(r"^(.*)\.(\d+)\..*?(\w+)\.weight$", name)[0]
        for group, key in zip(groups, (projection, layer), strict=True):
            group.setdefault(key, []).append((g - 1).abs())
    by_projection, by_layer = ({key: float(torch.cat(some).mean()) for key, some in group.items()} for group in groups)
    return by_projection, by_layer


def load(folder: Path) -> Any:
    """The causal language model of a folder, by transformers, float32 on the CPU. Raises MissingExtra without these."""
    transformers = imported("the demo trains with")
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def prose() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out text as bytes, int64: the topics of ``help()``, every fifth held out.

    Half of what is held out stands in other topics as well, paragraph by paragraph: this is left out.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    train = "\n".join(text for i, text in enumerate(texts) if i % 5)
    seen = in_one_line(train)
    paragraphs = (one for text in texts[::5] for one in re.split(r"\n\s*\n", text))
    held_out = "\n\n".join(one for one in paragraphs if in_one_line(one) not in seen)
    return _as_bytes(train), _as_bytes(held_out)


def _as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


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
