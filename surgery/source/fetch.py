"""Fetching single files of a model on the hub and checking them, here and, through ``HubOrigin``, on other machines."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from surgery.escapes import quoted
from surgery.files.access import read_errors
from surgery.hub import client_cache, patience
from surgery.hub.download import into_cache, into_folder, is_sound
from surgery.hub.hub_errors import hub_errors_midway
from surgery.hub.hub_file import HubFile, RemoteFile
from surgery.hub.patience import Patience, is_transient
from surgery.progress import listening
from surgery.source.origin import damaged_copy


def patience_for(
    what: str,
    dropped: threading.Event | None = None,
    may_pass: Callable[[Exception], bool] = is_transient,
    give_up_after: float | None = None,
) -> Patience:
    """A ``Patience`` for requests about ``what``, a repository or a file of one, which tells the progress of its waits."""
    progress = listening()

    def on_wait(text: str, is_long: bool) -> None:
        progress.item(f"{what}: {text}")
        if is_long:
            minutes = (patience.GIVE_UP_AFTER if give_up_after is None else give_up_after) / 60
            progress.note(
                f"the hub makes surgery wait for {what}: it asks again until requests have failed for {minutes:.0f} min"
            )

    return Patience(on_wait, dropped, may_pass, give_up_after)


def fetch(remote: RemoteFile, folder: Path | None = None, dropped: threading.Event | None = None) -> Path:
    """Fetch a file of a repository, unless it is there already; returns its path. Tells the progress how much has come.

    Args:
        remote: the file.
        folder: a private folder to fetch it into; None: the hub's cache, from which it is taken without checking it.
        dropped: set by another thread when the file is no longer wanted.

    Raises:
        SourceError: it cannot be fetched, also by further attempts, or has other contents than the hub says.
        Dropped: ``dropped`` was set.
    """
    with hub_errors_midway(remote.repo_id, remote.path):
        patient = patience_for(remote.path, dropped)
        if folder is not None:
            return into_folder(remote, folder, patient)
        return client_cache.cached_file(remote.repo_id, remote.commit, remote.path) or into_cache(remote, patient)


def is_cached(repo_id: str, commit: str, file: str) -> bool:
    """Whether a file of a commit is in the hub's cache."""
    return client_cache.cached_file(repo_id, commit, file) is not None


def check_contents(path: Path, hub_file: HubFile, name: str, again: str) -> None:
    """Refuse a file that has another size or hash than the hub says.

    Args:
        path: of the file.
        hub_file: what the hub says of it.
        name: for messages.
        again: the command that fetches it once more.

    Raises:
        ReadError: it cannot be read.
        SourceError: it has other contents.
    """
    with read_errors(path, name):
        sound = path.stat().st_size == hub_file.size and is_sound(path, hub_file)
    if not sound:
        raise damaged_copy(name, again)


def fetch_again(repo_id: str, commit: str, file: str) -> str:
    """The shell command that fetches a file again, even if it is in the cache."""
    return f"hf download {quoted(repo_id)} {quoted(file)} --revision {quoted(commit)} --force-download"


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """An ``Origin`` on the hub: a model at one commit, whose files each machine fetches for itself.

    Attributes:
        repo_id, commit: of the repository.
        prefix: the subfolder of the model with a slash at its end; empty if it is at the top.
        files: the weight files that are wanted, by name, with what the hub says of them.
        passing: whether files that are not in the machine's cache are fetched into a temporary folder, and removed after use.
    """

    repo_id: str
    commit: str
    prefix: str
    files: Mapping[str, HubFile]
    passing: bool

    @property
    def pinned(self) -> bool:
        return True

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        remote = RemoteFile(self.repo_id, self.commit, self.prefix + name, self.files[name])
        if is_cached(self.repo_id, self.commit, remote.path):
            path = fetch(remote)
            check_contents(path, remote.hub_file, f"{self.repo_id}/{remote.path}", self.again(name))
            yield path
        elif not self.passing:
            yield fetch(remote)
        else:
            with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
                yield fetch(remote, Path(folder))

    def sha256(self, name: str) -> str | None:
        return self.files[name].sha256

    def again(self, name: str) -> str:
        return fetch_again(self.repo_id, self.commit, self.prefix + name)
