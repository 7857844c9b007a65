"""What tests give to TRL's trainers: a tokenizer, data, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

import surgery

_DEMO = Path(surgery.__file__).parent / "demo" / "model"


def tokenizer() -> Any:
    """Of bytes, with an end-of-text token."""
    return transformers.AutoTokenizer.from_pretrained(_DEMO, eos_token="<0x00>", pad_token="<0x00>")


def preferences(*columns: str) -> Any:
    """A few rows, with some of the columns that trainers ask for."""
    import datasets

    pairs = [("The raise statement", " re-raises it.", " eats"), ("A list is", " a sequence.", " no, no and no")] * 2
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    rows = [{**row, "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows).select_columns(list(columns))


def settings_of(kind: type, out: Path, **options: Any) -> Any:
    """A config of a trainer for three steps on a CPU."""
    settings: dict[str, Any] = {
        "max_steps": 3,
        "save_steps": 2,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(str(out), **{**settings, **options})
