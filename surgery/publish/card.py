"""The cards (``README.md``) of results on the hub: what a result is, how it was made, how to use it.

Their contents come from files that anybody may have written. So metadata is taken over only if the hub can know it, names are
shown as code whatever they hold, and a name stands in a command only if it is nothing but a name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from surgery.format.manifest import Manifest
from surgery.format.manifest_records import LeftOutRecord, SourceRecord
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


def factorized_card(manifest: Manifest, repo_id: str | None, *, original: str | None = None) -> str:
    """The card of a factorized checkpoint.

    Args:
        manifest: of the checkpoint.
        repo_id: where it is on the hub; None if nowhere yet.
        original: the text of the source's own card, which is quoted, and from which license and language are kept.
    """
    overlay = manifest.layout == "overlay"
    scales = sum(target.trainable for target in manifest.targets)
    lines = [
        f"# {title_of(manifest.source, repo_id)}, factorized",
        "",
        f"{name_text(manifest.source)}, taken apart by surgery: of each target, a weight matrix or a stack of them, the top",
        f"singular directions are kept (truncated SVD), and one scale for each of them, {scales:,} in all, is what can be",
        f"trained. Folding puts trained scales back into dense weights. {_losslessness(manifest)}",
        "",
        *facts_of(manifest),
        f"- Layout: {'overlay (factors only)' if overlay else 'residual (self-contained)'}",
        f"- Lossless: {'yes' if manifest.lossless else 'no'}",
        "",
        "## Use",
        "",
        "```sh",
        *([f"hf download {repo_id} --local-dir factorized"] if is_repo_name(repo_id) else []),
        "surgery verify factorized",
        "# train the scales, factorized/surgery/scales.safetensors, then:",
        "surgery fold factorized scales.safetensors",
        "```",
        "",
        'In PyTorch, `surgery.attach(model, "factorized")` makes the scales the only trainable parameters of the original',
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


@dataclass(frozen=True, slots=True)
class FoldedChanges:
    """How the weights of a folded model differ from those of the source.

    Attributes:
        changed: how many targets had scales other than 1.
        adapted: how many tensors a LoRA adapter changed.
        dequantized: whether FP8 weights have become bfloat16.
    """

    changed: int
    adapted: int = 0
    dequantized: bool = False


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
    changed, adapted = changes.changed, changes.adapted
    lines = [f"# {title_of(manifest.source, repo_id)}, folded", ""]
    if changed:
        lines += [
            f"{name_text(manifest.source)} with trained scales folded into its weights by surgery: {changed:,} of",
            f"{len(manifest.targets):,} targets have become `W + U diag(s (g - 1)) Vᵀ`, rounded once, where U, s and V are the",
            "top singular directions of W and g has one scale for each.",
        ]
    else:
        lines.append(
            f"{name_text(manifest.source)}, taken apart and put together again by surgery, with scales that are all 1."
        )
    if adapted:
        lines.append(f"A LoRA adapter was added to {adapted:,} tensors.")
    if changes.dequantized:
        lines.append("FP8 weights have become bfloat16.")
    elif manifest.lossless:
        lines.append("All other weights are those of the original model." if changed or adapted else _losslessness(manifest))
    else:
        lines.append(_losslessness(manifest))
    lines += ["", *facts_of(manifest)]
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


def _losslessness(manifest: Manifest) -> str:
    if manifest.lossless:
        return "Scales that are all 1 give the original weights back, bit for bit."
    return "It was made without a correction: weights that come back differ from the original ones in their last bits."
