"""Results on the hub: which files go there when, and with which card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.files.file_records import FileRecord
from surgery.files.json_files import read_json_object
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord
from surgery.names import CONFIG_FILE, MANIFEST_FILE, SCALES_FILE
from surgery.progress import note

if TYPE_CHECKING:
    from surgery.publish.upload import Upload

# The hub client, which is slow to import, is imported inside the functions: most results stay here.

_CARD_FILE = "README.md"


@contextmanager
def uploading(repo_id: str | None, *, private: bool) -> Iterator[Upload | None]:
    """The repository that a result goes to, made sure of before any work is done; None for none."""
    if repo_id is None:
        yield None
        return
    from surgery.publish.upload import Upload

    with Upload.open(repo_id, private=private) as upload:
        if upload.private != private:
            kind = "private" if upload.private else "public"
            note(f"the repository {upload.repo_id} is there already, and stays as it is: {kind}")
        yield upload


def submit_shard(upload: Upload | None, out: Path, shard: ShardRecord) -> None:
    """What a shard has become, residual and factors."""
    submit_files(upload, out, [record for record in (shard.residual, shard.factors) if record is not None])


def submit_files(upload: Upload | None, out: Path, records: Iterable[FileRecord]) -> None:
    """Files of one shard."""
    if upload is not None:
        upload.submit_all([(out / record.file, record.file, record.sha256) for record in records])


def publish_factorized(upload: Upload | None, out: Path, manifest: Manifest) -> None:
    """All that is left of a factorized checkpoint, when its shards have been submitted."""
    if upload is None:
        return
    from surgery.publish.card import factorized_card, published

    there = published(manifest)
    files: dict[str, Path | bytes] = {record.file: out / record.file for record in there.files}
    files |= {SCALES_FILE: out / SCALES_FILE, MANIFEST_FILE: there.as_bytes()}
    card = factorized_card(manifest, upload.repo_id, original=_original_card(out, manifest))
    _complete(upload, files, card)


def publish_folded(
    upload: Upload | None, out: Path, manifest: Manifest, *, changed: int, adapted: int, dequantized: bool
) -> None:
    """All that goes along with the weights of a folded model, when those have been submitted."""
    if upload is None:
        return
    from surgery.publish.card import FoldedChanges, folded_card

    files: dict[str, Path | bytes] = {record.file: out / record.file for record in manifest.files}
    card = folded_card(
        manifest,
        upload.repo_id,
        FoldedChanges(changed, adapted, dequantized),
        architecture=_architecture(out),
        original=_original_card(out, manifest),
    )
    _complete(upload, files, card)


def publish_adapter(
    upload: Upload | None,
    files: Mapping[str, Path | bytes],
    manifest: Manifest,
    factorized: Path,
    *,
    modules: int,
    rank: int,
) -> None:
    """An exported adapter.

    Args:
        upload: where it goes; None for nowhere.
        files: where its files are, by their names in the repository.
        manifest, factorized: of the checkpoint whose scales it has, and that folder.
        modules: how many it changes.
        rank: of all of them.
    """
    if upload is None:
        return
    from surgery.publish.card import adapter_card

    card = adapter_card(manifest, upload.repo_id, modules=modules, rank=rank, architecture=_architecture(factorized))
    _complete(upload, files, card)


def _complete(upload: Upload, files: Mapping[str, Path | bytes], card: str) -> None:
    from surgery.publish.card import without_license

    cards = dict.fromkeys((card, without_license(card)))  # one, where there is no license
    url = upload.finish(files, *cards)
    note(f"uploaded to {url}" + (" (private)" if upload.private else ""))


def _original_card(out: Path, manifest: Manifest) -> str | None:
    """The card that the source came with. Of what was downloaded again, the file of that name is one of ours."""
    if not any(record.file == _CARD_FILE for record in manifest.files):
        return None
    return (out / _CARD_FILE).read_text(errors="replace")


def _architecture(folder: Path) -> str | None:
    """The class that a model's ``config.json`` names."""
    path = folder / CONFIG_FILE
    named = read_json_object(path, str(path)).get("architectures") if path.is_file() else None
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
