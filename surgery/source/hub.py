"""Models on the Hugging Face hub, pinned to a commit, through the official client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.errors import FormatError, SourceError, SurgeryError, few
from surgery.escapes import quoted
from surgery.format.files import Watch
from surgery.format.manifest import SourceRecord
from surgery.format.safetensors import Header, ShardReader, header_length, parse_header
from surgery.names import CONFIG_FILE
from surgery.progress import listening
from surgery.source import hub_client as client
from surgery.source.model import FolderSource, Source, Stays, check_subfolder, read_config, read_text
from surgery.source.origin import HubOrigin
from surgery.source.select import listing_of, select_plain_files
from surgery.source.shards import index_entries, is_index

#: Stands for what ``_online`` says.
_ONLINE = "fetch the model while online"

#: What most headers are shorter than; the rest of a longer one is asked for.
_HEADER_BYTES = 100_000

#: From the client's exceptions to what happened and what a user can do; the first that fits counts, so subclasses come first.
Messages = tuple[tuple[type[Exception], str, str], ...]

_MESSAGES: Messages = (
    (client.GatedRepoError, "is gated and your token has no access to it", "accept its terms on its page, then: hf auth login"),
    (client.DisabledRepoError, "has been disabled on the hub", "choose another model"),
    (
        client.RepositoryNotFoundError,
        "does not exist on the hub or is private, nor is there such a folder here",
        "check the name; for a private one: hf auth login",
    ),
    (client.RevisionNotFoundError, "has no such revision", "leave --revision out, or give a branch, tag or commit of it"),
    (client.RemoteEntryNotFoundError, "lacks a file that its listing names", "try again; the repository may be changing"),
    (client.LocalEntryNotFoundError, "cannot be reached, and is not (all) in the local cache", _ONLINE),
    (client.OfflineModeIsEnabled, "is not in the local cache, and the client is offline", _ONLINE),
    (client.HFValidationError, "is neither a local folder nor a valid repo id", "give owner/name or a path"),
    (client.HfHubHTTPError, "cannot be fetched from the hub", "try again later"),
    (client.RequestError, "cannot be reached, and is not (all) in the local cache", _ONLINE),
    (client.InvalidURL, "cannot be reached", "set HF_ENDPOINT to the address of a hub, or unset it"),
    (client.NoHub, "cannot be asked for", "unset HF_ENDPOINT, or log in to the network whose page comes instead"),
)


@contextmanager
def explained(
    repo_id: str,
    messages: Messages = _MESSAGES,
    raised: type[SurgeryError] = SourceError,
    *,
    revision: str | None = None,
) -> Iterator[None]:
    """Turns the client's exceptions into ones that say what to do."""
    try:
        yield
    except tuple(kind for kind, _, _ in messages) as error:
        what, hint = next((what, hint) for kind, what, hint in messages if isinstance(error, kind))
        if hint is _ONLINE:
            hint = _online(repo_id, revision)
        raise raised(f"{repo_id} {what}", got=_first_line(error), hint=hint) from error


def _online(repo_id: str, revision: str | None = None) -> str:
    """How a model gets into the cache."""
    once = f"hf download {quoted(repo_id)}" + ("" if revision is None else f" --revision {quoted(revision)}")
    if client.is_offline():
        return f"unset HF_HUB_OFFLINE, or fetch the model once without it: {once}"
    return f"connect to the network, or fetch the model once while online: {once}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fetch(repo_id: str, commit: str, file: str, folder: Path | None = None) -> Path:
    """A file of a repository, in the hub's cache or in a folder of one's own; the progress is told how much of it is here.

    Raises:
        SourceError: see the tables above.
    """
    try:
        with explained(repo_id):
            return client.download(repo_id, commit, file, folder)
    except (client.XetDownloadError, OSError, RuntimeError) as error:
        if isinstance(error, SurgeryError):
            raise
        raise SourceError(
            f"{repo_id}/{file} cannot be fetched",
            got=_first_line(error),
            hint="run the same command again when that is mended: what has been fetched is not fetched twice",
        ) from error


def is_cached(repo_id: str, commit: str, file: str) -> bool:
    """Whether the hub's cache has it."""
    return client.cached_file(repo_id, commit, file) is not None


def sha256_of(repo_id: str, commit: str, file: str) -> str | None:
    """The hash that the hub has given for a large file; None for a small one.

    Raises:
        SourceError: see the table above.
    """
    with explained(repo_id):
        return client.sha256_of(repo_id, commit, file)


def open_hub(repo_id: str, revision: str | None, subfolder: str | None = None) -> Source:
    """Pin a hub model to a commit and list its files; from the local cache where the hub cannot be reached.

    Raises:
        SourceError: see the table above.
    """
    inside = None if subfolder is None else check_subfolder(subfolder)
    with explained(repo_id, revision=revision):
        try:
            commit = client.resolve(repo_id, revision)
            files = client.list_files(repo_id, commit)
        except Exception as error:
            if not client.is_away(error):
                raise
            if (cached := _cached(repo_id, revision, inside)) is None:
                raise
            return cached
        return HubSource(repo_id, commit, SourceRecord("hub", repo_id, commit, inside), files)


def _named(repo_id: str, record: SourceRecord) -> str:
    return repo_id if record.subfolder is None else f"{repo_id}/{record.subfolder}"


def _cached(repo_id: str, revision: str | None, subfolder: str | None) -> FolderSource | None:
    """The snapshot in the cache, which may hold only the files that a loader once asked for; None if there is none.

    Raises:
        SourceError: what there is of it is no whole model.
    """
    commit = client.cached_commit(repo_id, revision)
    snapshot = None if commit is None else client.cached_snapshot(repo_id, commit)
    if commit is None or snapshot is None:
        return None
    record = SourceRecord("hub", repo_id, commit, subfolder)
    name, root = _named(repo_id, record), snapshot / (subfolder or "")
    try:
        if not root.is_dir():
            raise SourceError(f"{name} is not there")
        source = FolderSource(root, name=name, record=record)
    except (FormatError, SourceError) as error:
        absent = _absent(root)
        raise SourceError(
            f"{repo_id} cannot be reached, and what the local cache has of it is no whole model",
            got=_first_line(error),
            expected=f"also {few(absent)}" if absent else None,
            hint=_online(repo_id, revision),
        ) from error
    lacking = "" if CONFIG_FILE in source.selection.others else f"; {CONFIG_FILE} is not in it"
    source.note(f"taken from the local cache, as the hub cannot be reached: what was never fetched stays out{lacking}")
    return source


def _absent(folder: Path) -> list[str]:
    """What a model that is not all in the cache lacks, as far as it can be told from the rest: files that are links to
    nothing, the config, weight files that an index names, or weights altogether."""
    there = {path.relative_to(folder).as_posix(): path.exists() for path in folder.rglob("*")}
    needed = {CONFIG_FILE, *there}
    for index in filter(is_index, [name for name, exists in there.items() if exists]):
        try:
            named = set(index_entries(read_text(folder / index, index), index).values())
        except FormatError:
            continue
        needed |= {(PurePosixPath(index).parent / name).as_posix() for name in named}
    if not any(name.endswith(".safetensors") for name in needed):
        needed.add("*.safetensors")
    return sorted(name for name in needed if not there.get(name))


class HubSource(Stays):
    """A model on the hub at one commit. Files come through the hub's own cache; their names are relative to the model,
    which may lie in a subfolder of the repository."""

    def __init__(self, repo_id: str, commit: str, record: SourceRecord, files: Mapping[str, client.HubFile]) -> None:
        self.name = _named(repo_id, record)
        self.record = record
        self.watch = Watch()
        self.repo_id = repo_id
        self.commit = commit
        self._prefix = "" if record.subfolder is None else f"{record.subfolder}/"
        self._files = {name.removeprefix(self._prefix): file for name, file in files.items() if name.startswith(self._prefix)}
        if not self._files:
            folders = sorted({name.rpartition("/")[0] for name in files if name.endswith(".safetensors")} - {""})
            raise SourceError(
                f"{repo_id} has no subfolder {record.subfolder!r}", expected=", ".join(folders) or "a model without subfolders"
            )
        self.selection = select_plain_files(listing_of(self._files), self._read_text, where=self.name)

    def _read_text(self, file: str) -> str:
        return read_text(self.fetch(file), f"{self.name}/{file}")

    def size(self, file: str) -> int:
        return self._files[file].size

    def config(self) -> dict[str, Any]:
        return read_config(self)

    def header(self, shard: str) -> Header:
        name, file, size = f"{self.name}/{shard}", self._prefix + shard, self.size(shard)
        if (cached := client.cached_file(self.repo_id, self.commit, file)) is not None:
            with ShardReader(cached, name=name, watch=self.watch) as reader:
                return reader.header
        listening().item(f"header of {shard}")
        with explained(self.repo_id):
            raw = client.first_bytes(self.repo_id, self.commit, file, min(size, _HEADER_BYTES)) if size > 0 else b""
            end = 8 + header_length(raw, file=name, file_bytes=size)
            if end > len(raw):
                raw = client.first_bytes(self.repo_id, self.commit, file, end)
        return parse_header(raw[:end], file=name, file_bytes=size)

    def fetch(self, file: str) -> Path:
        return fetch(self.repo_id, self.commit, self._prefix + file)

    def sha256(self, file: str) -> str | None:
        return self._files[file].sha256

    def origin(self, files: Iterable[str]) -> HubOrigin:
        return HubOrigin(self.repo_id, self.commit, self._prefix, passing=False)

    def folders(self) -> list[Path]:
        return [client.cache_folder()]

    def stamps(self) -> dict[str, list[int]]:
        return {}

    def bytes_to_fetch(self) -> int:
        wanted = (*self.selection.shards, *self.selection.others)
        return sum(self.size(file) for file in wanted if not self._files[file].is_cached)

    def room_to_fetch(self) -> tuple[Path, int] | None:
        return client.cache_folder(), self.bytes_to_fetch()
