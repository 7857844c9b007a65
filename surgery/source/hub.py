"""Models on the Hugging Face hub, pinned to a commit, through the official client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from surgery.errors import FormatError, ReadError, SourceError, SurgeryError, few
from surgery.escapes import quoted
from surgery.files.access import read_errors
from surgery.files.watch import Stamp, Watch
from surgery.format.header import Header, header_length, parse_header
from surgery.format.manifest_records import SourceRecord
from surgery.format.safetensors import ShardReader
from surgery.hub import hub_client as client
from surgery.hub import patience
from surgery.hub.download import bytes_in_cache, first_bytes, into_cache, into_folder, is_sound
from surgery.hub.hub_client import HubFile
from surgery.hub.patience import Patience, is_busy, is_transient
from surgery.names import CONFIG_FILE
from surgery.progress import listening
from surgery.source.model import FolderSource, Source, Stays, check_subfolder, read_config, read_text
from surgery.source.origin import Damaged, FolderOrigin, HubOrigin, damaged
from surgery.source.select import listing_of, select_plain_files
from surgery.source.shards import index_entries, is_index

#: Stands for what ``_online`` says.
_ONLINE = "fetch the model while online"

_GO_ON = "run the same command again: it goes on where it stopped, and what has been fetched is not fetched twice"
_TOKEN = "hf auth login, or set HF_TOKEN, with a token that may read it"

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
    (client.Incomplete, "cannot be fetched from the hub: its answers break off", "try again later"),
    (client.RequestError, "cannot be reached, and is not (all) in the local cache", _ONLINE),
    (client.InvalidURL, "cannot be reached", "set HF_ENDPOINT to the address of a hub, or unset it"),
    (client.NoHub, "cannot be asked for", "unset HF_ENDPOINT, or log in to the network whose page comes instead"),
)


#: For the status of an answer to the first question, which an old token may also get of a public model.
_FIRST_STATUSES = {
    401: ("may not be read with your token, which has expired or been revoked", f"{_TOKEN}; of a public model: unset HF_TOKEN"),
    403: ("may not be read with your token", _TOKEN),
}

#: The same in the midst of a run, when the hub has answered before: for the status of an answer, else for an exception.
_MIDWAY_STATUSES = {
    401: ("may not be read with your token any more: it has expired or been revoked, or the repository is private now", _TOKEN),
    403: ("may not be read with your token any more", _TOKEN),
    404: ("is not there any more, or your token may not see it any more", _TOKEN),
}
_MIDWAY: Messages = (
    (
        client.GatedRepoError,
        "has become gated, and your token has no access to it",
        "accept its terms on its page, hf auth login",
    ),
    (client.DisabledRepoError, "has been disabled on the hub meanwhile", "choose another model"),
    (client.RemoteEntryNotFoundError, "lacks a file that its listing named", "see its page on the hub for what has changed"),
    (client.OfflineModeIsEnabled, "has files that are not in the local cache any more, and the client is offline", _ONLINE),
    (client.HfHubHTTPError, "cannot be fetched from the hub", "wait until the hub is well again"),
    (client.Incomplete, "cannot be fetched from the hub: its answers break off", "try another network"),
    (client.RequestError, "cannot be reached any more", "connect to the network"),
    (client.NoHub, "cannot be asked for any more", "log in to the network whose page comes instead"),
)


@contextmanager
def explained(
    repo_id: str,
    messages: Messages = _MESSAGES,
    raised: type[SurgeryError] = SourceError,
    *,
    revision: str | None = None,
    statuses: Mapping[int, tuple[str, str]] = MappingProxyType({}),
) -> Iterator[None]:
    """Turns the client's exceptions into ones that say what to do; ``statuses`` are answers that mean more than a class."""
    try:
        yield
    except tuple(kind for kind, _, _ in messages) as error:
        what, hint = next((what, hint) for kind, what, hint in messages if isinstance(error, kind))
        if type(error) is client.HfHubHTTPError:  # those derived from it are told apart
            what, hint = statuses.get(error.response.status_code, (what, hint))
        if hint is _ONLINE:
            hint = _online(repo_id, revision)
        raise raised(f"{repo_id} {what}", got=_first_line(error), hint=hint) from error


@contextmanager
def explained_midway(repo_id: str, file: str) -> Iterator[None]:
    """The same in the midst of a run, of a file of a repository that the hub has listed before."""
    try:
        yield
    except tuple(kind for kind, _, _ in _MIDWAY) as error:
        status = error.response.status_code if isinstance(error, client.HfHubHTTPError) else None
        what, hint = next((what, hint) for kind, what, hint in _MIDWAY if isinstance(error, kind))
        is_told_apart = isinstance(error, (client.GatedRepoError, client.DisabledRepoError, client.RemoteEntryNotFoundError))
        if patience.is_refused_elsewhere(error):
            what, hint = "is refused where the hub sends us for its files", "try another network"
        elif status in _MIDWAY_STATUSES and not is_told_apart:
            what, hint = _MIDWAY_STATUSES[status]
        if hint is _ONLINE:
            hint = _online(repo_id)
        raise SourceError(f"{repo_id} {what}: {file}", got=_first_line(error), hint=f"{hint}; then {_GO_ON}") from error
    except (client.XetDownloadError, OSError, RuntimeError) as error:
        if isinstance(error, SurgeryError):
            raise
        raise SourceError(
            f"{repo_id}/{file} cannot be fetched", got=_first_line(error), hint=f"when that is mended, {_GO_ON}"
        ) from error


def _online(repo_id: str, revision: str | None = None) -> str:
    """How a model gets into the cache."""
    once = f"hf download {quoted(repo_id)}" + ("" if revision is None else f" --revision {quoted(revision)}")
    if client.is_offline():
        return f"unset HF_HUB_OFFLINE, or fetch the model once without it: {once}"
    return f"connect to the network, or fetch the model once while online: {once}"


def _first_line(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "; ".join([first, *getattr(error, "__notes__", ())])


def patience_for(
    what: str,
    dropped: threading.Event | None = None,
    may_pass: Callable[[Exception], bool] = is_transient,
    give_up_after: float | None = None,
) -> Patience:
    """With requests about ``what``, a repository or a file of one; whoever listens is told of it. See ``Patience``."""
    progress = listening()

    def tell(text: str, is_long: bool) -> None:
        progress.item(f"{what}: {text}")
        if is_long:
            minutes = (patience.GIVE_UP_AFTER if give_up_after is None else give_up_after) / 60
            progress.note(f"the hub keeps us waiting for {what}: it is asked again until it has failed for {minutes:.0f} min")

    return Patience(tell, dropped, may_pass, give_up_after)


def fetch(
    repo_id: str,
    commit: str,
    file: str,
    of: HubFile,
    folder: Path | None = None,
    dropped: threading.Event | None = None,
) -> Path:
    """A file of a repository, in the hub's cache or in a folder of one's own; the progress is told how much of it is here.

    Tried again where that may help, see ``surgery.hub.patience``, until ``dropped`` is set.

    Raises:
        SourceError: it cannot be had, or what comes is not what the hub says.
        Dropped: nobody wants it any more.
    """
    with explained_midway(repo_id, file):
        patient = patience_for(file, dropped)
        if folder is not None:
            return into_folder(repo_id, commit, file, of, folder, patient)
        return client.cached_file(repo_id, commit, file) or into_cache(repo_id, commit, file, of, patient)


def is_cached(repo_id: str, commit: str, file: str) -> bool:
    """Whether the hub's cache has it."""
    return client.cached_file(repo_id, commit, file) is not None


def check_contents(path: Path, of: HubFile, name: str, again: str) -> None:
    """Refuse a file that has other contents than the hub says.

    Args:
        path, of: where it is, and what the hub says of it.
        name: for messages.
        again: the command that fetches it once more.

    Raises:
        ReadError: it cannot be read.
        SourceError: it has other contents.
    """
    with read_errors(path, name):
        sound = path.stat().st_size == of.size and is_sound(path, of)
    if not sound:
        raise damaged(name, again)


def fetch_again(repo_id: str, commit: str, file: str) -> str:
    """The command that fetches a file once more, whatever the cache has of it."""
    return f"hf download {quoted(repo_id)} {quoted(file)} --revision {quoted(commit)} --force-download"


def open_hub(repo_id: str, revision: str | None, subfolder: str | None = None) -> Source:
    """Pin a hub model to a commit and list its files; from the local cache where the hub cannot be reached.

    Raises:
        SourceError: see the table above.
    """
    inside = None if subfolder is None else check_subfolder(subfolder)
    # Whether there is a hub at all is asked once where nothing answers, or the cache can do without: laptops are offline.
    first = patience_for(repo_id, may_pass=is_busy, give_up_after=patience.GIVE_UP_FIRST_AFTER)
    with explained(repo_id, revision=revision, statuses=_FIRST_STATUSES):
        while True:
            try:
                commit = client.resolve(repo_id, revision)
                files = client.list_files(repo_id, commit, patience_for(repo_id).run)
                return HubSource(repo_id, commit, SourceRecord("hub", repo_id, commit, inside), files)
            except SurgeryError:
                raise
            except Exception as error:
                lacking = None
                if client.is_away(error):
                    try:
                        if (cached := _cached(repo_id, revision, inside)) is not None:
                            return cached
                    except SourceError as found:
                        lacking = found
                try:
                    first.failed(error)
                except Exception:
                    if lacking is not None:
                        raise lacking from error
                    raise


def _named(repo_id: str, record: SourceRecord) -> str:
    return repo_id if record.subfolder is None else f"{repo_id}/{record.subfolder}"


def _cached(repo_id: str, revision: str | None, subfolder: str | None) -> CachedSource | None:
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
        source = CachedSource(root, name, record)
    except Damaged:
        raise
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


@contextmanager
def _perhaps_removed() -> Iterator[None]:
    """Of a file in the cache, which anybody may empty at any time: that it is gone is no error yet."""
    try:
        yield
    except ReadError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise


class CachedSource(FolderSource):
    """The snapshot of a commit in the hub's cache, of whose files the cache tells the hashes by the names of its blobs."""

    def __init__(self, root: Path, name: str, record: SourceRecord) -> None:
        self._sound: dict[Path, Stamp] = {}
        super().__init__(root, name=name, record=record)

    def _hub_file(self, file: str) -> HubFile | None:
        path = self._root / file
        known = client.cached_hash(path)
        if known is None or not path.exists():
            return None
        return HubFile(path.stat().st_size, known if len(known) == 64 else None, known, is_cached=True, by_xet=False)

    def fetch(self, file: str) -> Path:
        path = super().fetch(file)
        stamp = Stamp.at(path, f"{self.name}/{file}")
        if self._sound.get(path) != stamp and (of := self._hub_file(file)) is not None:
            check_contents(path, of, f"{self.name}/{file}", self.again(file))
            self._sound[path] = stamp
        return path

    def unchecked(self, file: str) -> Path:
        return super().fetch(file)

    def sha256(self, file: str) -> str | None:
        of = self._hub_file(file)
        return None if of is None else of.sha256

    def again(self, file: str) -> str:
        subfolder = "" if self.record.subfolder is None else f"{self.record.subfolder}/"
        return fetch_again(str(self.record.repo_id), str(self.record.commit), subfolder + file)

    def origin(self, files: Iterable[str]) -> FolderOrigin:
        hashes = {file: known for file in files if (known := self.sha256(file)) is not None}
        return FolderOrigin(self._root.resolve(), {}, hashes, {file: self.again(file) for file in hashes})


class HubSource(Stays):
    """A model on the hub at one commit. Files come through the hub's own cache; their names are relative to the model,
    which may lie in a subfolder of the repository."""

    def __init__(self, repo_id: str, commit: str, record: SourceRecord, files: Mapping[str, client.HubFile]) -> None:
        self.name = _named(repo_id, record)
        self.record = record
        self.watch = Watch(pinned=True)
        self.repo_id = repo_id
        self.commit = commit
        self._sound: dict[Path, Stamp] = {}
        self._dropped = threading.Event()
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
        name, file, of = f"{self.name}/{shard}", self._prefix + shard, self._files[shard]
        if client.cached_file(self.repo_id, self.commit, file) is not None:
            with ShardReader(self.unchecked(shard), name=name, watch=self.watch) as reader:
                return reader.header
        listening().item(f"header of {shard}")
        with explained_midway(self.repo_id, file):
            patient = patience_for(file)
            raw = first_bytes(self.repo_id, self.commit, file, of, _HEADER_BYTES, patient)
            end = 8 + header_length(raw, file=name, file_bytes=of.size)
            if end > len(raw):
                raw = first_bytes(self.repo_id, self.commit, file, of, end, patient)
        return parse_header(raw[:end], file=name, file_bytes=of.size)

    def fetch(self, file: str) -> Path:
        while True:
            path = self.unchecked(file)
            with _perhaps_removed():
                stamp = Stamp.at(path, f"{self.name}/{file}")
                if self._sound.get(path) != stamp:
                    check_contents(path, self._files[file], f"{self.name}/{file}", self.again(file))
                    self._sound[path] = stamp
                return path

    def unchecked(self, file: str) -> Path:
        return self._here(file, None)

    def acquire(self, file: str) -> Path:
        return self._here(file, self._dropped)

    def close(self) -> None:
        # Only what is waited for now: what goes along with the weights is fetched later.
        self._dropped.set()
        self._dropped = threading.Event()

    def _here(self, file: str, dropped: threading.Event | None, folder: Path | None = None) -> Path:
        """Where a file is, in the cache or in a folder; fetched if need be, also for another time, and then sound."""
        path = client.cached_file(self.repo_id, self.commit, self._prefix + file) if folder is None else None
        if path is not None:
            with _perhaps_removed():
                return self._still(path, file)
        path = fetch(self.repo_id, self.commit, self._prefix + file, self._files[file], folder, dropped)
        self.watch.forget(path)
        self._sound[path] = Stamp.at(path, f"{self.name}/{file}")
        return path

    def _still(self, path: Path, file: str) -> Path:
        """A file of the cache that is here; if it is another than the last time, it has been removed and fetched again."""
        stamp = Stamp.at(path, f"{self.name}/{file}")
        if self.watch.seen(path) not in (None, stamp):
            check_contents(path, self._files[file], f"{self.name}/{file}", self.again(file))
            self.watch.forget(path)
            self._sound[path] = stamp
        return path

    def sha256(self, file: str) -> str | None:
        return self._files[file].sha256

    def again(self, file: str) -> str:
        return fetch_again(self.repo_id, self.commit, self._prefix + file)

    def origin(self, files: Iterable[str]) -> HubOrigin:
        return HubOrigin(self.repo_id, self.commit, self._prefix, {file: self._files[file] for file in files}, passing=False)

    def folders(self) -> list[Path]:
        return [client.cache_folder()]

    def stamps(self) -> dict[str, list[int]]:
        return {}

    def bytes_to_fetch(self) -> int:
        wanted = (*self.selection.shards, *self.selection.others)
        return sum(self._to_fetch(file) for file in wanted)

    def _to_fetch(self, file: str) -> int:
        """Bytes of a file that are still to come into the cache."""
        of = self._files[file]
        return 0 if of.is_cached else of.size - bytes_in_cache(self.repo_id, of)

    def room_to_fetch(self) -> dict[Path, int]:
        return {client.cache_folder(): self.bytes_to_fetch()}
