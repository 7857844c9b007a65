"""One file of a model on the hub: fetched, held to what the hub says of it, and where other machines take it from."""

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
from surgery.hub.hub_file import HubFile, RemoteFile
from surgery.hub.patience import Patience, is_transient
from surgery.progress import listening
from surgery.source.hub_errors import hub_errors_midway
from surgery.source.origin import damaged_copy


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


def fetch(remote: RemoteFile, folder: Path | None = None, dropped: threading.Event | None = None) -> Path:
    """A file of a repository, in the hub's cache or in a folder of one's own; the progress is told how much of it is here.

    Tried again where that may help, see ``surgery.hub.patience``, until ``dropped`` is set.

    Raises:
        SourceError: it cannot be had, or what comes is not what the hub says.
        Dropped: nobody wants it any more.
    """
    with hub_errors_midway(remote.repo_id, remote.path):
        patient = patience_for(remote.path, dropped)
        if folder is not None:
            return into_folder(remote, folder, patient)
        return client_cache.cached_file(remote.repo_id, remote.commit, remote.path) or into_cache(remote, patient)


def is_cached(repo_id: str, commit: str, file: str) -> bool:
    """Whether the hub's cache has it."""
    return client_cache.cached_file(repo_id, commit, file) is not None


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
        raise damaged_copy(name, again)


def fetch_again(repo_id: str, commit: str, file: str) -> str:
    """The command that fetches a file once more, whatever the cache has of it."""
    return f"hf download {quoted(repo_id)} {quoted(file)} --revision {quoted(commit)} --force-download"


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """A repository on the hub at one commit, or the subfolder of it that ``prefix`` (ending in a slash) names.

    Files go through the hub's cache of the machine; with ``passing`` those that it does not have are dropped after use.

    Attributes:
        files: what the hub says of those that are wanted.
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
            check_contents(path, remote.of, f"{self.repo_id}/{remote.path}", self.again(name))
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
