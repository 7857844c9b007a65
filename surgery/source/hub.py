"""Models on the Hugging Face hub, pinned to a commit, through the official client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import DryRunFileInfo, errors
from tqdm import tqdm

from surgery.errors import FormatError, SourceError, SurgeryError
from surgery.format.files import Watch, check_relative_path
from surgery.format.manifest import SourceRecord
from surgery.format.safetensors import Header, ShardReader, header_from_json
from surgery.progress import Progress, Silent
from surgery.source.model import FolderSource, Source, Stays, check_subfolder, read_config, read_text
from surgery.source.origin import HubOrigin
from surgery.source.select import listing_of, select_files

_SHA256 = re.compile("[0-9a-f]{64}")
_OFFLINE_HINT = "connect to the network, or fetch the model once while online: hf download"

#: From the client's exceptions to what happened and what a user can do; the first that fits counts, so subclasses come first.
Messages = tuple[tuple[type[Exception], str, str], ...]

_MESSAGES: Messages = (
    (errors.GatedRepoError, "is gated and your token has no access to it", "accept its terms on its page, then: hf auth login"),
    (errors.DisabledRepoError, "has been disabled on the hub", "choose another model"),
    (
        errors.RepositoryNotFoundError,
        "does not exist on the hub or is private, nor is there such a folder here",
        "check the name; for a private one: hf auth login",
    ),
    (errors.RevisionNotFoundError, "has no such revision", "leave --revision out, or give a branch, tag or commit of it"),
    (errors.RevisionResolutionError, "cannot be reached, and is not in the local cache", _OFFLINE_HINT),
    (errors.RemoteEntryNotFoundError, "lacks a file that its listing names", "try again; the repository may be changing"),
    (errors.LocalEntryNotFoundError, "cannot be reached, and is not (all) in the local cache", _OFFLINE_HINT),
    (errors.OfflineModeIsEnabled, "is not (all) in the local cache, and the client is offline", "unset HF_HUB_OFFLINE"),
    (errors.HFValidationError, "is neither a local folder nor a valid repo id", "give owner/name or a path"),
    (errors.NotASafetensorsRepoError, "has no safetensors weights", "choose a repository that has them"),
    (errors.SafetensorsParsingError, "has a weight file with a damaged header", "choose another revision"),
    (errors.HfHubHTTPError, "cannot be fetched from the hub", "try again later"),
    (httpx2.TransportError, "cannot be reached", _OFFLINE_HINT),
)


@contextmanager
def explained(repo_id: str, messages: Messages = _MESSAGES, raised: type[SurgeryError] = SourceError) -> Iterator[None]:
    """Turns the client's exceptions into ones that say what to do."""
    try:
        yield
    except tuple(kind for kind, _, _ in messages) as error:
        what, hint = next((what, hint) for kind, what, hint in messages if isinstance(error, kind))
        if huggingface_hub.constants.HF_HUB_OFFLINE and hint is _OFFLINE_HINT:
            hint = "unset HF_HUB_OFFLINE, or fetch the model once without it: hf download"
        raise raised(f"{repo_id} {what}", got=_first_line(error), hint=hint) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fetch(repo_id: str, commit: str, file: str, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """A file of a repository, in the hub's cache or in a folder of one's own; the progress is told how much of it is here.

    Raises:
        SourceError: see the table above.
    """
    with explained(repo_id):
        bar = type("Download", (_Download,), {"progress": progress or Silent(), "file": file})
        return Path(huggingface_hub.hf_hub_download(repo_id, file, revision=commit, local_dir=folder, tqdm_class=bar))


class _Download(tqdm):  # type: ignore[type-arg]
    """What the client takes for its bar. It shows nothing, and says how far the download of a file is."""

    progress: Progress
    file: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("name", None)  # which some versions of the client give to any class
        super().__init__(*args, **{**kwargs, "disable": True})
        self.done = self.n

    def update(self, n: float | None = 1) -> None:
        self.done += n or 0
        share = f"{self.done / self.total:.0%} of " if self.total else ""
        self.progress.item(f"fetching {share}{self.file}")


def is_cached(repo_id: str, commit: str, file: str) -> bool:
    """Whether the hub's cache has it."""
    return isinstance(huggingface_hub.try_to_load_from_cache(repo_id, file, revision=commit), str)


def sha256_of(repo_id: str, commit: str, file: str) -> str | None:
    """The hash that the hub has given for a large file; None for a small one.

    Raises:
        SourceError: see the table above.
    """
    cached = huggingface_hub.try_to_load_from_cache(repo_id, file, revision=commit)
    if isinstance(cached, str):
        name = Path(cached).resolve().name  # the cache names what it holds by that
    else:
        with explained(repo_id):
            name = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo_id, file, revision=commit)).etag or ""
    return name if _SHA256.fullmatch(name) else None


def open_hub(repo_id: str, revision: str | None, subfolder: str | None = None) -> Source:
    """Pin a hub model to a commit and list its files; from the local cache where the hub cannot be reached.

    Raises:
        SourceError: see the table above.
    """
    with explained(repo_id):
        commit = huggingface_hub.HfApi().resolve_revision(repo_id, revision=revision).resolved
        inside = None if subfolder is None else check_subfolder(subfolder)
        record = SourceRecord("hub", repo_id, commit, inside)
        try:
            files = huggingface_hub.snapshot_download(repo_id, revision=commit, dry_run=True)
        except errors.DryRunError as error:
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                raise error.__cause__ from None
            return _cached(repo_id, commit, record)
        return HubSource(repo_id, commit, record, files)


def _named(repo_id: str, record: SourceRecord) -> str:
    return repo_id if record.subfolder is None else f"{repo_id}/{record.subfolder}"


def _cached(repo_id: str, commit: str, record: SourceRecord) -> FolderSource:
    """The snapshot in the cache, which may hold only the files that a loader once asked for."""
    try:
        path = huggingface_hub.snapshot_download(repo_id, revision=commit, local_files_only=True)
    except errors.IncompleteSnapshotError as error:
        path = error.snapshot_path
    root = Path(path) / (record.subfolder or "")
    if not root.is_dir():
        raise SourceError(f"{repo_id} has no subfolder {record.subfolder!r} in the local cache", hint=_OFFLINE_HINT)
    return FolderSource(root, name=_named(repo_id, record), record=record)


class HubSource(Stays):
    """A model on the hub at one commit. Files come through the hub's own cache; their names are relative to the model,
    which may lie in a subfolder of the repository."""

    def __init__(self, repo_id: str, commit: str, record: SourceRecord, files: list[DryRunFileInfo]) -> None:
        self.name = _named(repo_id, record)
        self.record = record
        self.watch = Watch()
        self._progress: Progress = Silent()
        self.repo_id = repo_id
        self.commit = commit
        self._prefix = "" if record.subfolder is None else f"{record.subfolder}/"
        self._files = {
            file.filename.removeprefix(self._prefix): file for file in files if file.filename.startswith(self._prefix)
        }
        if not self._files:
            folders = sorted(
                {file.filename.rpartition("/")[0] for file in files if file.filename.endswith(".safetensors")} - {""}
            )
            raise SourceError(
                f"{repo_id} has no subfolder {record.subfolder!r}", expected=", ".join(folders) or "a model without subfolders"
            )
        for file in self._files:
            check_relative_path(file, self.name)
        self.selection = select_files(listing_of(self._files), self._read_text, where=self.name)

    def report_to(self, progress: Progress) -> None:
        self._progress = progress

    def _read_text(self, file: str) -> str:
        return read_text(self.fetch(file), f"{self.name}/{file}")

    def size(self, file: str) -> int:
        return self._files[file].file_size or 0

    def config(self) -> dict[str, Any]:
        return read_config(self)

    def header(self, shard: str) -> Header:
        name, file = f"{self.name}/{shard}", self._prefix + shard
        cached = huggingface_hub.try_to_load_from_cache(self.repo_id, file, revision=self.commit)
        if isinstance(cached, str):
            with ShardReader(Path(cached), name=name, watch=self.watch) as reader:
                return reader.header
        self._progress.item(f"header of {shard}")
        try:
            with explained(self.repo_id):
                parsed = huggingface_hub.HfApi().parse_safetensors_file_metadata(self.repo_id, file, revision=self.commit)
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, SurgeryError):
                raise
            raise FormatError(f"{name}: the header is damaged", got=f"{type(error).__name__}: {error}"[:200]) from error
        tensors = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in parsed.tensors.items()
        }
        # The client hands out no raw bytes; the header is checked again, byte for byte, once the file is here.
        text = json.dumps({"__metadata__": parsed.metadata, **tensors}).encode()
        header = header_from_json(json.loads(text), raw=len(text).to_bytes(8, "little") + text, file=name)
        if header.data_bytes > self.size(shard):
            raise FormatError(
                f"{name}: the file is smaller than its header says", got=self.size(shard), expected=header.data_bytes
            )
        return header

    def fetch(self, file: str) -> Path:
        return fetch(self.repo_id, self.commit, self._prefix + file, progress=self._progress)

    def sha256(self, file: str) -> str | None:
        return sha256_of(self.repo_id, self.commit, self._prefix + file)

    def origin(self, files: Iterable[str]) -> HubOrigin:
        return HubOrigin(self.repo_id, self.commit, self._prefix, passing=False)

    def folders(self) -> list[Path]:
        return [Path(huggingface_hub.constants.HF_HUB_CACHE)]

    def stamps(self) -> dict[str, list[int]]:
        return {}

    def bytes_to_fetch(self) -> int:
        wanted = (*self.selection.shards, *self.selection.others)
        return sum(self.size(file) for file in wanted if not self._files[file].is_cached)

    def room_to_fetch(self) -> tuple[Path, int] | None:
        return Path(huggingface_hub.constants.HF_HUB_CACHE), self.bytes_to_fetch()
