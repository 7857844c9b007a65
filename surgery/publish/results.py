"""Uploading results to the hub: which files are uploaded when, and with which card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.files.file_records import FileRecord
from surgery.files.json_files import read_json_object
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord, SourceRecord
from surgery.names import CONFIG_FILE, MANIFEST_FILE, SCALES_FILE, Train
from surgery.progress import note
from surgery.publish.told import ExportedUpdate, FoldedChanges

if TYPE_CHECKING:
    from surgery.publish.upload import Upload

# The hub client is slow to import, so it is imported inside the functions: most results are not uploaded.

_CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True)
class ExtractedCard:
    """What the card of an extracted adapter tells, see ``extracted_card``; and the files of the adapter."""

    size: str
    component: str | None
    files: Sequence[str]


@contextmanager
def uploading(repo_id: str | None, *, private: bool) -> Iterator[Upload | None]:
    """Open the repository that a result is uploaded to, before any work is done; None without one.

    Raises:
        OutputError: see ``Upload.open``, and if the upload fails.
    """
    if repo_id is None:
        yield None
        return
    from surgery.publish.upload import Upload

    with Upload.open(repo_id, private=private) as upload:
        if upload.private != private:
            kind = "private" if upload.private else "public"
            note(f"the repository {upload.repo_id} exists already, and stays {kind}")
        yield upload


def submit_shard(upload: Upload | None, out: Path, shard: ShardRecord) -> None:
    """Upload the residual file and the factors file of a shard; nothing without an upload."""
    submit_files(upload, out, shard.written)


def submit_files(upload: Upload | None, out: Path, records: Iterable[FileRecord]) -> None:
    """Upload the files of one shard, in one commit; nothing without an upload."""
    if upload is not None:
        upload.submit_all([(out / record.file, record.file, record.sha256) for record in records])


def publish_factorized(upload: Upload | None, out: Path, manifest: Manifest, train: Train) -> None:
    """Complete the upload of a factorized checkpoint, whose shards have been submitted: all other files and the card."""
    if upload is None:
        return
    from surgery.publish.card import factorized_card, published

    there = published(manifest)
    files: dict[str, Path | bytes] = {record.file: out / record.file for record in there.files}
    files |= {SCALES_FILE: out / SCALES_FILE, MANIFEST_FILE: there.as_bytes()}
    card = factorized_card(manifest, upload.repo_id, train, original=_original_card(out, manifest))
    _complete(upload, files, card)


def publish_folded(upload: Upload | None, out: Path, manifest: Manifest, changes: FoldedChanges) -> None:
    """Complete the upload of a folded model, whose weights have been submitted: all other files and the card."""
    if upload is None:
        return
    from surgery.publish.card import folded_card

    files: dict[str, Path | bytes] = {record.file: out / record.file for record in manifest.files}
    card = folded_card(
        manifest,
        upload.repo_id,
        changes,
        architecture=_architecture(out),
        original=_original_card(out, manifest),
    )
    _complete(upload, files, card)


def publish_merged(
    upload: Upload | None, out: Path, along: Iterable[str], source: SourceRecord, *, adapters: int, changed: int
) -> None:
    """Complete the upload of a merged model, whose weights have been submitted: all other files and the card.

    Args:
        upload: the upload; None for none.
        out: the folder of the model.
        along: the files that go along with its weights.
        source: the model that adapters were merged into.
        adapters: how many.
        changed: how many tensors they changed.
    """
    if upload is None:
        return
    from surgery.publish.card import merged_card

    files: dict[str, Path | bytes] = {name: out / name for name in along}
    original = (out / _CARD_FILE).read_text(errors="replace") if _CARD_FILE in files else None
    names = (source, upload.repo_id)
    card = merged_card(*names, adapters=adapters, changed=changed, architecture=_architecture(out), original=original)
    _complete(upload, files, card)


def publish_adapter(
    upload: Upload | None,
    files: Mapping[str, Path | bytes],
    manifest: Manifest,
    factorized: Path,
    update: ExportedUpdate,
) -> None:
    """Upload an exported adapter: all of its files and the card.

    Args:
        upload: the upload; None for none.
        files: name in the repository -> the file, or its contents.
        manifest, factorized: manifest and folder of the checkpoint whose scales or cores the adapter has.
        update: what it has.
    """
    if upload is None:
        return
    from surgery.publish.adapter_cards import adapter_card

    card = adapter_card(manifest, upload.repo_id, update, architecture=_architecture(factorized))
    _complete(upload, files, card)


def publish_extracted(
    upload: Upload | None, out: Path, base: SourceRecord, folder: Path | None, tuned: SourceRecord, told: ExtractedCard
) -> None:
    """Upload an extracted adapter: all of its files and the card.

    Args:
        upload: the upload; None for none.
        out: the folder of the adapter.
        base: the model.
        folder: with its config; None without one.
        tuned: the fine-tuned model.
        told: what the card tells.
    """
    if upload is None:
        return
    from surgery.publish.adapter_cards import extracted_card

    architecture = None if folder is None else _architecture(folder)
    names = (base, tuned, upload.repo_id)
    card = extracted_card(*names, size=told.size, component=told.component, architecture=architecture)
    _complete(upload, {name: out / name for name in told.files}, card)


def _complete(upload: Upload, files: Mapping[str, Path | bytes], card: str) -> None:
    from surgery.publish.card_parts import without_license

    cards = dict.fromkeys((card, without_license(card)))  # one, where there is no license
    url = upload.finish(files, *cards)
    note(f"uploaded to {url}" + (" (private)" if upload.private else ""))


def _original_card(out: Path, manifest: Manifest) -> str | None:
    """The text of the source's own card; None without one.

    A checkpoint that was downloaded from the hub has a card that surgery wrote; its manifest does not record that one.
    """
    if not any(record.file == _CARD_FILE for record in manifest.files):
        return None
    return (out / _CARD_FILE).read_text(errors="replace")


def _architecture(folder: Path) -> str | None:
    """The class that a model's ``config.json`` names."""
    path = folder / CONFIG_FILE
    named = read_json_object(path, str(path)).get("architectures") if path.is_file() else None
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
