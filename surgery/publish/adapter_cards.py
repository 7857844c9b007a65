"""The cards of LoRA adapters on the hub."""

from __future__ import annotations

import re

from surgery.format.manifest import Manifest
from surgery.format.manifest_records import SourceRecord
from surgery.publish.card_parts import (
    card_of,
    facts_of,
    is_repo_name,
    library_of,
    loader_of,
    name_text,
    python_block,
    source_text,
    title_of,
)
from surgery.publish.told import ExportedUpdate

_COMMIT = re.compile(r"[0-9a-f]{40}")


def adapter_card(
    manifest: Manifest,
    repo_id: str | None,
    update: ExportedUpdate,
    *,
    architecture: str | None = None,
    original: str | None = None,
) -> str:
    """The card of scales or cores exported as a LoRA adapter.

    Args:
        manifest: of the factorized checkpoint.
        repo_id: where the adapter is on the hub; None if nowhere yet.
        update: what the adapter has.
        architecture: the class that the model's ``config.json`` names.
        original: the text of the source's own card, from which license and language are kept.
    """
    library = library_of(manifest) or "transformers"
    title = title_of(manifest.source, repo_id)
    lines = [
        f"# {title}, a {'TinyLoRA' if update.kind == 'peft-trainable' else 'LoRA'} adapter",
        "",
        *_of_update(name_text(manifest.source), update),
        "",
        *facts_of(manifest, None if update.kind == "peft-pissa" else update.train),
    ]
    is_diffusion = update.kind in ("diffusers", "kohya")
    if not is_diffusion and update.kind != "peft-pissa":
        lines += ["", "## Use", "", *_use(manifest.source, repo_id, library, architecture)]
    by = "diffusers" if is_diffusion else "peft"
    return card_of(manifest.source, lines, original, relation="adapter", library=by, quoted=False)


def _of_update(name: str, update: ExportedUpdate) -> list[str]:
    """What an adapter holds, as lines."""
    what, factor = (
        ("scales of the top", "U diag(s (g - 1))")
        if update.train == "scales"
        else ("cores between the top", "U diag(√s) (C - I) diag(√s)")
    )
    size = f"of rank {update.rank} for {update.modules:,} modules"
    if update.kind == "peft-trainable":
        return [
            f"The {what} singular directions of {name}, as an adapter of PEFT's TinyLoRA {size}, to be",
            "trained on: `A = diag(√s) Vᵀ`, `B = U diag(√s)`, and what is trained is g - 1 or C - I. Made by surgery.",
        ]
    if update.kind == "peft-pissa":
        return [
            f"The top singular directions of {name} as a LoRA adapter {size}, to be trained on",
            "the residual that lacks them, a factorized checkpoint made by surgery: `A = diag(√s) Vᵀ`, `B = U diag(√s)`.",
        ]
    if update.train is None:
        return [
            f"What a LoRA adapter has learned that began as the top singular directions of {name} and was trained on the",
            f"residual that lacks them: made by surgery to one of the model itself, {size}.",
        ]
    return [
        f"Trained {what} singular directions of {name}, exported by surgery as a LoRA adapter",
        f"{size}: `A = Vᵀ` and `B = {factor}`, padded to one rank, with alpha",
        "equal to it.",
    ]


def extracted_card(
    base: SourceRecord,
    tuned: SourceRecord,
    repo_id: str | None,
    *,
    size: str,
    component: str | None,
    architecture: str | None = None,
) -> str:
    """The card of a LoRA adapter that was extracted from a fine-tuned model.

    Args:
        base, tuned: the model, and the fine-tuned one.
        repo_id: where the adapter is on the hub; None if nowhere yet.
        size: its modules, their rank and what they hold, in words.
        component: of a diffusion pipeline that it is for; None for any other model.
        architecture: the class that the model's ``config.json`` names.
    """
    lines = [
        f"# {title_of(base, repo_id)}, a LoRA adapter",
        "",
        f"The change from {name_text(base)} to {name_text(tuned)}, its fine-tuned version, extracted by surgery as a LoRA",
        f"adapter: {size}. `extraction.json` tells it for each weight, and what else has changed.",
        "",
        f"- Base: {source_text(base)}",
        f"- Fine-tuned: {source_text(tuned)}",
    ]
    if component is None:
        lines += ["", "## Use", "", *_use(base, repo_id, "transformers", architecture)]
    return card_of(base, lines, None, relation="adapter", library="peft" if component is None else "diffusers", quoted=False)


def _use(source: SourceRecord, repo_id: str | None, library: str, architecture: str | None) -> list[str]:
    """How an adapter is loaded onto a model."""
    base = "'path/to/the/original/model'"
    if is_repo_name(source.repo_id):
        base = repr(source.repo_id)
        if source.commit is not None and _COMMIT.fullmatch(source.commit):
            base += f", revision={source.commit!r}"
    if source.subfolder is not None:
        base += f", subfolder={source.subfolder!r}"
    adapter = repr(repo_id) if is_repo_name(repo_id) else "'adapter'"
    loader = loader_of(library, architecture)
    return python_block(
        "from peft import PeftModel",
        f"from {library} import {loader}",
        "",
        f"model = {loader}.from_pretrained({base})",
        f"model = PeftModel.from_pretrained(model, {adapter})",
    )
