"""The cards (``README.md``) of results on the hub: what a result is, how it was made, how to use it.

Their contents come from files that anybody may have written. So metadata is taken over only if the hub can know it, names are
shown as code whatever they hold, and a name stands in a command only if it is nothing but a name.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]  # the hub client's own

from surgery.escapes import escaped
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import LeftOutRecord, SourceRecord
from surgery.hub import hub_client as client
from surgery.names import CONFIG_FILE
from surgery.publish.upload import CARD_FILE, TAG

_FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|$)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}")
_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]{0,95}")
_LINK = re.compile(r"[!-~]{1,500}")


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
        f"# {_title(manifest.source, repo_id)}, factorized",
        "",
        f"{_name(manifest.source)}, taken apart by surgery: of each target, a weight matrix or a stack of them, the top",
        f"singular directions are kept (truncated SVD), and one scale for each of them, {scales:,} in all, is what can be",
        f"trained. Folding puts trained scales back into dense weights. {_losslessness(manifest)}",
        "",
        *_facts(manifest),
        f"- Layout: {'overlay (factors only)' if overlay else 'residual (self-contained)'}",
        f"- Lossless: {'yes' if manifest.lossless else 'no'}",
        "",
        "## Use",
        "",
        "```sh",
        *([f"hf download {repo_id} --local-dir factorized"] if _is_name(repo_id) else []),
        "surgery verify factorized",
        "# train the scales, factorized/surgery/scales.safetensors, then:",
        "surgery fold factorized scales.safetensors",
        "```",
        "",
        'In PyTorch, `surgery.attach(model, "factorized")` makes the scales the only trainable parameters of the original',
        "model, loaded as usual.",
    ]
    if overlay:
        known = _is_name(manifest.source.repo_id)
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
    return _card(manifest.source, lines, original, relation="adapter" if overlay else None)


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
    library = _library(manifest)
    changed, adapted = changes.changed, changes.adapted
    lines = [f"# {_title(manifest.source, repo_id)}, folded", ""]
    if changed:
        lines += [
            f"{_name(manifest.source)} with trained scales folded into its weights by surgery: {changed:,} of",
            f"{len(manifest.targets):,} targets have become `W + U diag(s (g - 1)) Vᵀ`, rounded once, where U, s and V are the",
            "top singular directions of W and g has one scale for each.",
        ]
    else:
        lines.append(f"{_name(manifest.source)}, taken apart and put together again by surgery, with scales that are all 1.")
    if adapted:
        lines.append(f"A LoRA adapter was added to {adapted:,} tensors.")
    if changes.dequantized:
        lines.append("FP8 weights have become bfloat16.")
    elif manifest.lossless:
        lines.append("All other weights are those of the original model." if changed or adapted else _losslessness(manifest))
    else:
        lines.append(_losslessness(manifest))
    lines += ["", *_facts(manifest)]
    if library is not None:
        loader = _loader(library, architecture)
        where = repr(repo_id) if _is_name(repo_id) else "'folded'"
        lines += [
            "",
            "## Use",
            "",
            *_python(f"from {library} import {loader}", "", f"model = {loader}.from_pretrained({where})"),
        ]
    relation = "finetune" if changed or adapted else None
    return _card(manifest.source, lines, original, relation=relation, library=library)


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
        f"# {_title(source, repo_id)}, merged",
        "",
        f"{_name(source)} with {'an adapter' if adapters == 1 else f'{adapters} adapters'} merged by surgery into",
        f"{changed:,} of its tensors. All others are those of the original model.",
        "",
        f"- Source: {_source(source)}",
    ]
    if library is not None:
        loader, where = _loader(library, architecture), repr(repo_id) if _is_name(repo_id) else "'merged'"
        use = _python(f"from {library} import {loader}", "", f"model = {loader}.from_pretrained({where})")
        lines += ["", "## Use", "", *use]
    return _card(source, lines, original, relation="finetune", library=library)


def adapter_card(
    manifest: Manifest,
    repo_id: str | None,
    *,
    modules: int,
    rank: int,
    architecture: str | None = None,
    original: str | None = None,
) -> str:
    """The card of scales exported as a LoRA adapter.

    Args:
        manifest: of the factorized checkpoint.
        repo_id: where the adapter is on the hub; None if nowhere yet.
        modules: how many it changes.
        rank: of all of them.
        architecture: the class that the model's ``config.json`` names.
        original: the text of the source's own card, from which license and language are kept.
    """
    source = manifest.source
    base = "'path/to/the/original/model'"
    if _is_name(source.repo_id):
        base = repr(source.repo_id)
        if source.commit is not None and _COMMIT.fullmatch(source.commit):
            base += f", revision={source.commit!r}"
    if source.subfolder is not None:
        base += f", subfolder={source.subfolder!r}"
    adapter = repr(repo_id) if _is_name(repo_id) else "'adapter'"
    library = _library(manifest) or "transformers"
    loader = _loader(library, architecture)
    lines = [
        f"# {_title(manifest.source, repo_id)}, a LoRA adapter",
        "",
        f"Trained scales of the top singular directions of {_name(manifest.source)}, exported by surgery as a LoRA adapter",
        f"of rank {rank} for {modules:,} modules: `A = Vᵀ` and `B = U diag(s (g - 1))`, padded to one rank, with alpha",
        "equal to it.",
        "",
        *_facts(manifest),
        "",
        "## Use",
        "",
        *_python(
            "from peft import PeftModel",
            f"from {library} import {loader}",
            "",
            f"model = {loader}.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(model, {adapter})",
        ),
    ]
    return _card(manifest.source, lines, original, relation="adapter", library="peft", quoted=False)


def _card(
    source: SourceRecord,
    lines: list[str],
    original: str | None,
    *,
    relation: str | None,
    library: str | None = None,
    quoted: bool = True,
) -> str:
    base = source.repo_id if _is_name(source.repo_id) else None
    metadata, text = _parts_of(original or "")
    data = client.ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        tags=[TAG],
        **_kept(metadata),
    )
    if quoted and text.strip():
        lines = [*lines, "", "## Card of the original model", "", text.strip()]
    card = _with_metadata(data, "\n".join(["", *lines]) + "\n")
    return card.encode(errors="replace").decode()


def without_license(card: str) -> str:
    """A card without the license that was kept from the source: the hub refuses a card with a license it does not know."""
    metadata, text = _parts_of(card)
    kept = {key: value for key, value in metadata.items() if not key.startswith("license")}
    return _with_metadata(client.ModelCardData(**kept), text)


def _with_metadata(data: client.ModelCardData, text: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _parts_of(card: str) -> tuple[dict[str, Any], str]:
    """The metadata (YAML front matter) and the text of a card; what is between the marks but no YAML object is dropped."""
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, card[found.end() :]


def _kept(metadata: dict[str, Any]) -> dict[str, Any]:
    """License and language of the source's metadata, if they look like ones that the hub takes."""
    kept: dict[str, Any] = {}
    license_, language = metadata.get("license"), metadata.get("language")
    if isinstance(license_, str) and _LICENSE.fullmatch(license_.lower()):
        kept["license"] = license_.lower()
        for key, pattern in (("license_name", _SLUG), ("license_link", _LINK)):
            value = metadata.get(key)
            if license_.lower() == "other" and isinstance(value, str) and pattern.fullmatch(value):
                kept[key] = value
    languages = [language] if isinstance(language, str) else language if isinstance(language, list) else []
    languages = [code for code in languages if isinstance(code, str) and _LANGUAGE.fullmatch(code)]
    return {**kept, "language": languages or None}


def _facts(manifest: Manifest) -> list[str]:
    targets, options = manifest.targets, manifest.options
    ranks = [target.rank for target in targets]
    matrices = sum(target.matrices[0] for target in targets)
    certificates = [certificate for target in targets for certificate in target.certificates]
    worst = max((value for certificate in certificates for value in certificate.residual), default=0.0)
    missed = sum(not certificate.converged for certificate in certificates)
    rank = f"{min(ranks, default=0)}" if len(set(ranks)) < 2 else f"{min(ranks)} to {max(ranks)}"
    if options.energy is not None:
        rank += f", as it takes to hold {options.energy:g} of the energy of each"
    accuracy = f"residuals of the singular triplets are at most {worst:.1e} of the largest singular value"
    if missed:
        accuracy += f"; the SVD of {missed:,} matrices did not reach the tolerance"
    return [
        f"- Source: {_source(manifest.source)}",
        f"- Targets: {len(targets):,} ({matrices:,} matrices), rank {rank}",
        f"- Trainable scales: {sum(target.trainable for target in targets):,}",
        f"- Accuracy: {accuracy}",
        f"- Factorized with: {_code(manifest.tool)}, torch {_code(manifest.torch)}, on {_code(manifest.device)}",
    ]


def _losslessness(manifest: Manifest) -> str:
    if manifest.lossless:
        return "Scales that are all 1 give the original weights back, bit for bit."
    return "It was made without a correction: weights that come back differ from the original ones in their last bits."


def _source(source: SourceRecord) -> str:
    if source.repo_id is None:
        return "a local folder"
    text = _code(source.repo_id)
    if source.subfolder is not None:
        text += f", folder {_code(source.subfolder)}"
    return text if source.commit is None else f"{text} at commit {_code(source.commit)}"


def _name(source: SourceRecord) -> str:
    return "A model" if source.repo_id is None else _code(source.repo_id)


def _title(source: SourceRecord, repo_id: str | None) -> str:
    known = [name for name in (source.repo_id, repo_id) if name is not None and _is_name(name)]
    return known[0].rpartition("/")[2] if known else "A model"


def _library(manifest: Manifest) -> str | None:
    """The library that loads the model, by the names of its files; None if they do not tell."""
    if any(shard.source.file.startswith("diffusion_pytorch_model") for shard in manifest.shards):
        return "diffusers"
    return "transformers" if any(record.file == CONFIG_FILE for record in manifest.files) else None


def _loader(library: str, architecture: str | None) -> str:
    """The class to load the model with: for transformers the config's architecture if that is a plain name, else AutoModel."""
    named = library == "transformers" and architecture is not None and architecture.isascii() and architecture.isidentifier()
    return architecture if named and architecture else "AutoModel"


def _is_name(repo_id: str | None) -> bool:
    try:
        client.validate_repo_id(repo_id)
    except client.HFValidationError:
        return False
    return repo_id is not None


def _code(text: str) -> str:
    """Any text as inline code in Markdown, on one line."""
    text = escaped(text)[:200]
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}"


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]
