"""The cards (``README.md``) of results on the hub: what a result is, how it was made, how to use it.

Their contents come from files that anybody may have written. So metadata is taken over only if the hub can know it, names are
shown as code whatever they hold, and a name stands in a command only if it is nothing but a name.
"""

from __future__ import annotations

import dataclasses

from surgery.format.manifest import Manifest
from surgery.format.manifest_records import LeftOutRecord, SourceRecord
from surgery.names import TRAINED, Train
from surgery.publish.card_parts import (
    CORE_FORMULA,
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
from surgery.publish.told import FoldedChanges
from surgery.publish.upload import CARD_FILE


def published(manifest: Manifest) -> Manifest:
    """The manifest that goes to the hub, in which the source's ``README.md`` is left out.

    On the hub the card has its place. With the source's file recorded, a downloaded checkpoint would be taken for damaged.
    """
    kept = [record for record in manifest.files if record.file != CARD_FILE]
    if len(kept) == len(manifest.files):
        return manifest
    left_out = [*manifest.left_out, LeftOutRecord(CARD_FILE, "the card of the factorized checkpoint is in its place")]
    return dataclasses.replace(manifest, files=kept, left_out=sorted(left_out, key=lambda record: record.file))


def factorized_card(manifest: Manifest, repo_id: str | None, train: Train = "scales", *, original: str | None = None) -> str:
    """The card of a factorized checkpoint.

    Args:
        manifest: of the checkpoint.
        repo_id: where it is on the hub; None if nowhere yet.
        train: what its scales file holds.
        original: the text of the source's own card, which is quoted, and from which license and language are kept.
    """
    overlay = manifest.layout == "overlay"
    numbers = f"{sum(target.numbers_of(train) for target in manifest.targets):,}"
    attach = '`surgery.attach(model, "factorized")`'
    trained = [f"and one scale for each of them, {numbers} in all, is what can be", "trained."]
    if train == "core":
        attach = '`surgery.attach(model, "factorized", train="core")`'
        trained = [
            f"and the core C, a small matrix between them, {numbers} numbers in all, is what",
            f"can be trained: `{CORE_FORMULA}`.",
        ]
    lines = [
        f"# {title_of(manifest.source, repo_id)}, factorized",
        "",
        f"{name_text(manifest.source)}, taken apart by surgery: of each target, a weight matrix or a stack of them, the top",
        f"singular directions are kept (truncated SVD), {trained[0]}",
        f"{trained[1]} Folding puts trained {TRAINED[train]} back into dense weights. {_losslessness(manifest, train)}",
        "",
        *facts_of(manifest, train),
        f"- Layout: {'overlay (factors only)' if overlay else 'residual (self-contained)'}",
        f"- Lossless: {'yes' if manifest.lossless else 'no'}",
        "",
        "## Use",
        "",
        "```sh",
        *([f"hf download {repo_id} --local-dir factorized"] if is_repo_name(repo_id) else []),
        "surgery verify factorized",
        f"# train the {TRAINED[train]}, factorized/surgery/scales.safetensors, then:",
        "surgery fold factorized scales.safetensors",
        "```",
        "",
        f"In PyTorch, {attach} makes the {TRAINED[train]} the only trainable parameters of the original",
        "model, loaded as usual.",
    ]
    if overlay:
        known = is_repo_name(manifest.source.repo_id)
        lines += [
            "These are the factors alone; the original weights stay where they are, and the commands "
            + ("fetch them at the commit above." if known else "want them with `--base FOLDER`."),
        ]
    else:
        lines += [
            "",
            "**By themselves the weights here are another model**: they are what is left without those directions. Any loader",
            "takes them and says nothing of it. `surgery.attach` and `surgery fold` put the directions back.",
        ]
    return card_of(manifest.source, lines, original, relation="adapter" if overlay else None)


def folded_card(
    manifest: Manifest,
    repo_id: str | None,
    changes: FoldedChanges,
    *,
    architecture: str | None = None,
    original: str | None = None,
) -> str:
    """The card of a model that scales were folded into.

    Args:
        manifest: of the factorized checkpoint.
        repo_id: where the model is on the hub; None if nowhere yet.
        changes: what the fold has changed.
        architecture: the class that ``config.json`` names.
        original: the text of the source's own card, which is quoted, and from which license and language are kept.
    """
    library = library_of(manifest)
    changed, adapted, train = changes.changed, changes.adapted, changes.train
    lines = [f"# {title_of(manifest.source, repo_id)}, folded", ""]
    if changed:
        formula, numbers = (
            ("W + U diag(s (g - 1)) Vᵀ", "g has one scale for each")
            if train == "scales"
            else (CORE_FORMULA, "C, the core, is a trained matrix between them")
        )
        lines += [
            f"{name_text(manifest.source)} with trained {TRAINED[train]} folded into its weights by surgery: {changed:,} of",
            f"{len(manifest.targets):,} targets have become `{formula}`, rounded once, where U, s and V are the",
            f"top singular directions of W and {numbers}.",
        ]
    else:
        lines.append(f"{name_text(manifest.source)}, taken apart and put together again by surgery, with {_untouched(train)}.")
    if adapted:
        lines.append(f"A LoRA adapter was added to {adapted:,} tensors.")
    if changes.dequantized:
        lines.append("FP8 weights have become bfloat16.")
    elif manifest.lossless:
        lines.append(
            "All other weights are those of the original model." if changed or adapted else _losslessness(manifest, train)
        )
    else:
        lines.append(_losslessness(manifest, train))
    lines += ["", *facts_of(manifest, train)]
    if library is not None:
        loader = loader_of(library, architecture)
        where = repr(repo_id) if is_repo_name(repo_id) else "'folded'"
        lines += [
            "",
            "## Use",
            "",
            *python_block(f"from {library} import {loader}", "", f"model = {loader}.from_pretrained({where})"),
        ]
    relation = "finetune" if changed or adapted else None
    return card_of(manifest.source, lines, original, relation=relation, library=library)


def merged_card(
    source: SourceRecord,
    repo_id: str | None,
    *,
    adapters: int,
    changed: int,
    architecture: str | None = None,
    original: str | None = None,
) -> str:
    """The card of a model that adapters were merged into.

    Args:
        source: the model.
        repo_id: where the result is on the hub; None if nowhere yet.
        adapters: how many.
        changed: how many tensors they changed.
        architecture: the class that ``config.json`` names.
        original: the text of the model's own card, which is quoted, and from which license and language are kept.
    """
    library = "transformers" if architecture is not None else None
    lines = [
        f"# {title_of(source, repo_id)}, merged",
        "",
        f"{name_text(source)} with {'an adapter' if adapters == 1 else f'{adapters} adapters'} merged by surgery into",
        f"{changed:,} of its tensors. All others are those of the original model.",
        "",
        f"- Source: {source_text(source)}",
    ]
    if library is not None:
        loader, where = loader_of(library, architecture), repr(repo_id) if is_repo_name(repo_id) else "'merged'"
        use = python_block(f"from {library} import {loader}", "", f"model = {loader}.from_pretrained({where})")
        lines += ["", "## Use", "", *use]
    return card_of(source, lines, original, relation="finetune", library=library)


def _untouched(train: Train) -> str:
    return "scales that are all 1" if train == "scales" else "cores that are all the identity"


def _losslessness(manifest: Manifest, train: Train) -> str:
    if manifest.lossless:
        return f"{_untouched(train).capitalize()} give the original weights back, bit for bit."
    return "It was made without a correction: weights that come back differ from the original ones in their last bits."
