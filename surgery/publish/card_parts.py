"""Parts of the cards of results on the hub: metadata, names and commands that hold whatever strangers wrote."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]  # the hub client's own

from surgery.escapes import escaped
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import SourceRecord, summary_of
from surgery.hub import hub_client as client
from surgery.names import CONFIG_FILE, Train
from surgery.publish.upload import TAG

#: What a core C makes of a weight.
CORE_FORMULA = "W + U diag(√s) (C - I) diag(√s) Vᵀ"

_FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|$)")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}")
_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]{0,95}")
_LINK = re.compile(r"[!-~]{1,500}")


def card_of(
    source: SourceRecord,
    lines: list[str],
    original: str | None,
    *,
    relation: str | None,
    library: str | None = None,
    quoted: bool = True,
) -> str:
    """A card: metadata, these lines, and the source's own card.

    Args:
        source: the model that the result comes from.
        lines: of the text.
        original: the text of the source's own card, from which license and language are kept; None without one.
        relation: of the result to the source, as the hub names it; None for none.
        library: that loads the result; None if that is not known.
        quoted: whether the source's own text follows.
    """
    base = source.repo_id if is_repo_name(source.repo_id) else None
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


def name_in_card(card: str) -> str | None:
    """The hub's id that a model's card gives to the model itself, as ``owner/name``; None if it does not.

    Not ``base_model``, which is the model that it was made from.
    """
    metadata, _ = _parts_of(card)
    index = metadata.get("model-index")
    names = [metadata.get("model_id"), metadata.get("model_name")]
    names += [one.get("name") for one in index if isinstance(one, dict)] if isinstance(index, list) else []
    return next((name for name in names if isinstance(name, str) and "/" in name and is_repo_name(name)), None)


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


def source_text(source: SourceRecord) -> str:
    """Where a model is from, as code."""
    if source.repo_id is None:
        return "a local folder"
    text = as_code(source.repo_id)
    if source.subfolder is not None:
        text += f", folder {as_code(source.subfolder)}"
    return text if source.commit is None else f"{text} at commit {as_code(source.commit)}"


def name_text(source: SourceRecord) -> str:
    """A model at the beginning of a sentence."""
    return "A model" if source.repo_id is None else as_code(source.repo_id)


def title_of(source: SourceRecord, repo_id: str | None) -> str:
    """The title of a card: the name of the source or of the repository, whichever can be told."""
    known = [name for name in (source.repo_id, repo_id) if name is not None and is_repo_name(name)]
    return known[0].rpartition("/")[2] if known else "A model"


def loader_of(library: str, architecture: str | None) -> str:
    """The class to load the model with: for transformers the config's architecture if that is a plain name, else AutoModel."""
    named = library == "transformers" and architecture is not None and architecture.isascii() and architecture.isidentifier()
    return architecture if named and architecture else "AutoModel"


def is_repo_name(repo_id: str | None) -> bool:
    """Whether a repo id is nothing but a name, and so may stand in a command."""
    try:
        client.validate_repo_id(repo_id)
    except client.HFValidationError:
        return False
    return repo_id is not None


def as_code(text: str) -> str:
    """Any text as inline code in Markdown, on one line."""
    text = escaped(text)[:200]
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}"


def python_block(*lines: str) -> list[str]:
    """Lines of Python as a block of code."""
    return ["```python", *lines, "```"]


def facts_of(manifest: Manifest, train: Train | None) -> list[str]:
    """What a manifest says of a factorization, and how many scales or numbers in cores are trained, as items of a list."""
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
    if proven := summary_of(targets).proven:
        accuracy += f"; that no larger singular value was missed is proven of {proven:,} matrices"
    trainable = []
    if train is not None:
        count = sum(target.numbers_of(train) for target in targets)
        trainable.append(f"- Trainable {'scales' if train == 'scales' else 'numbers in cores'}: {count:,}")
    return [
        f"- Source: {source_text(manifest.source)}",
        f"- Targets: {len(targets):,} ({matrices:,} matrices), rank {rank}",
        *trainable,
        f"- Accuracy: {accuracy}",
        f"- Factorized with: {as_code(manifest.tool)}, torch {as_code(manifest.torch)}, on {as_code(manifest.device)}",
    ]


def library_of(manifest: Manifest) -> str | None:
    """The library that loads the model, by the names of its files; None if they do not tell."""
    if any(shard.source.file.startswith("diffusion_pytorch_model") for shard in manifest.shards):
        return "diffusers"
    return "transformers" if any(record.file == CONFIG_FILE for record in manifest.files) else None
