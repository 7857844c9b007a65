"""Upload of a result to the Hugging Face hub, file by file, while the run that makes it goes on.

A repository never looks whole before it is. The files that loaders and ``surgery fold`` look for first (``_MARKERS``) are
deleted in the commit that brings the first new weights, and come back in the last one, which also deletes what is left of an
earlier result. Until then the card of the repository says that it is unfinished.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from surgery.errors import OutputError, SurgeryError, few
from surgery.files.access import read_errors
from surgery.hub import hub_client as client
from surgery.hub.hub_client import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, RepoFile, RepoUrl
from surgery.hub.hub_errors import Messages, hub_errors
from surgery.hub.patience import Dropped, Patience, is_transient
from surgery.hub.repository import takes_card
from surgery.names import ADAPTER_CONFIG, CONFIG_FILE, MANIFEST_FILE, SURGERY_DIR
from surgery.progress import listening, phase
from surgery.source.file_names import OTHER_WEIGHTS
from surgery.source.weight_files import is_index

_T = TypeVar("_T")

CARD_FILE = "README.md"

#: The tag in the card of every repository that surgery writes to. What is in a repository with it may be replaced.
TAG = "surgery"

#: Files by which a folder is recognized as a model, a factorized checkpoint or an adapter.
_MARKERS = (CONFIG_FILE, MANIFEST_FILE, ADAPTER_CONFIG)

_UNFINISHED = f"""---
tags:
- {TAG}
---

# Unfinished

surgery is uploading to this repository, or has been interrupted while it did. The files are complete once this note is gone.
""".encode()

#: Sent in the place of the repository's .gitignore, with which the client would leave out files without a word.
_NOTHING_IGNORED = "# nothing"

#: The hub takes 128 commits an hour for a repository. Files that are submitted in between go into one commit.
_SECONDS_BETWEEN_COMMITS = 30.0

#: Seconds to wait for a repository to show what has been committed to it.
_SECONDS_TO_SETTLE = 80.0

_TOKEN_HINT = "hf auth login, or set HF_TOKEN, with a token that may write to it"
_AGAIN = "run the same command again: what has been uploaded is not uploaded twice"

_MESSAGES: Messages = (
    (client.LocalTokenNotFoundError, "cannot be uploaded to without a token", _TOKEN_HINT),
    (client.OfflineModeIsEnabled, "cannot be uploaded to: the client is offline", "unset HF_HUB_OFFLINE"),
    (client.HFValidationError, "is no valid repo id", "give owner/name"),
    (client.TransportError, "cannot be reached", f"once connected, {_AGAIN}"),
)
_STATUSES = {
    401: ("cannot be uploaded to: the hub does not know your token, or the repository", _TOKEN_HINT),
    402: ("may not be uploaded to", "see the account's plan on the hub"),
    403: ("may not be written to with your token", f"check the name; {_TOKEN_HINT}"),
    404: ("is not on the hub, or your token may not see it", f"check the name; {_TOKEN_HINT}"),
    429: ("has been written to too often", f"wait for an hour, then {_AGAIN}"),
}


class _Changed(OutputError):
    """The repository does not hold what has been uploaded to it: not yet, or because somebody has changed it."""


class Upload:
    """A repository on the hub to which the files of a result are uploaded, in one thread, in the order they come.

    A context manager. Leaving it normally waits for all that was submitted; the first error is raised at the next
    ``submit``, by ``finish`` or when leaving. Leaving it on an error drops what is waiting and what is under way. Files
    are only read, and MUST stay as they are until ``finish`` has returned. The client's own progress bars are off
    meanwhile.

    A file that the repository has already is not uploaded again, so that the same run goes on where it was stopped.
    """

    def __init__(self, api: HfApi, url: RepoUrl, *, private: bool) -> None:
        self.repo_id = url.repo_id
        self.url = str(url)
        self.private = private
        self._api = api
        self._queue: queue.SimpleQueue[list[CommitOperationAdd] | None] = queue.SimpleQueue()
        self._uploaded: dict[str, CommitOperationAdd] = {}
        self._bytes_submitted = self._bytes_done = 0
        self._name = self._waiting = ""  # the file that is being uploaded, and what the upload waits for
        self._error: BaseException | None = None
        #: Whether files have been submitted, and the repository is not whole yet.
        self.unfinished = False
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="surgery-upload", daemon=True)
        self._bars = ExitStack()

    @classmethod
    def open(cls, repo_id: str, *, private: bool = True) -> Self:
        """Create the repository if it is not there, and make sure that it can be written to.

        Args:
            repo_id: ``owner/name``; a name alone is one of the token's owner.
            private: whether nobody else may see it; one that is there already stays as it is.

        Raises:
            OutputError: no token, or none that may write to it; the hub cannot be reached; the repository holds a model
                that surgery has not put there.
        """
        with _upload_errors(repo_id):
            if client.get_token() is None:
                raise client.LocalTokenNotFoundError("no HF_TOKEN, and nobody is logged in")
            api = HfApi()
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.auth_check(url.repo_id, write=True)
            info = api.model_info(url.repo_id)
        _check_ours(info)
        return cls(api, url, private=bool(info.private))

    def __enter__(self) -> Self:
        self._thread.start()
        self._bars.enter_context(client.without_bars())  # bars of several threads would write over each other
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._dropped.set()
        self._queue.put(None)
        # On an error the thread may go on with the file that it is uploading, but commits nothing.
        self._thread.join(timeout=None if error is None else 1.0)
        self._bars.close()
        if error is None and self._error is not None:
            raise self._error

    def submit(self, path: Path, name: str, sha256: str | None = None) -> None:
        """Upload a file after all those before it; see ``submit_all``."""
        self.submit_all([(path, name, sha256)])

    def submit_all(self, files: Iterable[tuple[Path, str, str | None]]) -> None:
        """Upload files that belong together, in one commit; it may be one with files before and after.

        Args:
            files: of each where it is, its path in the repository, and its sha256, computed if it is None.

        Raises:
            ReadError: a file cannot be read.
            OutputError: something submitted earlier could not be uploaded.
        """
        if self._error is not None:
            raise self._error
        group = [_addition(name, path, sha256) for path, name, sha256 in files]
        self.unfinished = True
        self._bytes_submitted += sum(addition.upload_info.size for addition in group)
        self._queue.put(group)

    def finish(self, files: Mapping[str, Path | bytes], *cards: str) -> str:
        """Wait for all that was submitted, then make the repository whole in one commit. Nothing can be submitted after it.

        That commit brings the files that are left and the card, and deletes what an earlier result has left: weights and
        their indexes, all in ``surgery/``, and configs of a model or an adapter. Other files stay.

        Args:
            files: by their paths in the repository: config, manifest, tokenizer ...
            cards: texts for its ``README.md``, with the tag ``surgery``; the first that the hub takes, or the last.

        Returns:
            The address of the repository.

        Raises:
            ReadError: a file cannot be read.
            OutputError: something could not be uploaded, or somebody else has changed what was.
        """
        self.unfinished = True
        self._wait()
        if self._error is not None:
            raise self._error
        last = [_addition(name, content) for name, content in files.items() if name != CARD_FILE]
        settling = Patience(self._tell, None, lambda error: isinstance(error, _Changed), _SECONDS_TO_SETTLE)
        with _upload_errors(self.repo_id):
            card = next(filter(self._is_taken, cards[:-1]), cards[-1])
            last.append(_addition(CARD_FILE, card.encode()))
            settling.run(lambda: self._patiently(lambda: self._complete(last)))
        self.unfinished = False
        return self.url

    def _is_taken(self, card: str) -> bool:
        """Whether the hub takes a card, which it refuses for a license that it does not know. Nothing is written."""
        return self._patiently(lambda: takes_card(card))

    def _wait(self) -> None:
        """Wait until the thread has uploaded all that was submitted, and tell the progress meanwhile."""
        self._queue.put(None)
        progress, done = listening(), self._bytes_done
        with phase(progress, "uploading", self._bytes_submitted - done):
            while self._thread.is_alive():
                self._thread.join(timeout=0.2)
                progress.item(self._name + self._waiting)
                progress.advance(self._bytes_done - done)
                done = self._bytes_done

    def _run(self) -> None:
        try:
            with _upload_errors(self.repo_id):
                self._work()
        except Dropped:
            pass
        except BaseException as error:  # raised in the thread that submits
            self._error = error

    def _work(self) -> None:
        waiting: list[CommitOperationAdd] = []
        due, last = 0.0, False
        while not last:
            try:
                group = self._queue.get(timeout=max(0.0, due - time.monotonic()) if waiting else None)
            except queue.Empty:
                group = []
            last = group is None
            for addition in group or []:
                waiting += self._transferred(addition)
            if waiting and (last or time.monotonic() >= due):
                self._commit(waiting)
                waiting = []
                due = time.monotonic() + _SECONDS_BETWEEN_COMMITS

    def _transferred(self, addition: CommitOperationAdd) -> list[CommitOperationAdd]:
        """Upload the contents of a file. Returns what has to be committed: nothing if the repository has the file already."""
        self._name, self._waiting = (name := addition.path_in_repo), ""
        there = self._patiently(lambda: self._described([name]))
        missing = not _is_there(there, addition)
        if missing:
            # One at a time: for several, the client starts threads, and the interpreter waits for these when it exits.
            self._patiently(lambda: self._preupload([addition]))
        self._uploaded[name] = addition
        self._bytes_done += addition.upload_info.size
        return [addition] if missing else []

    def _commit(self, additions: list[CommitOperationAdd]) -> None:
        """Commit files to the repository; from the first such commit on it does not look whole."""
        names = [addition.path_in_repo for addition in additions]
        message = f"Add {', '.join(names[:2])}" + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        note = _addition(CARD_FILE, _UNFINISHED)

        def attempt() -> None:
            # Looked up for each attempt: the commit of an earlier one may have been made although it seemed to fail.
            there = self._described([*names, CARD_FILE, *_MARKERS])
            missing = [addition for addition in additions if not _is_there(there, addition)]
            if not missing:
                return
            if not _is_there(there, note):
                self._preupload([note])
                missing.append(note)
            stale = [CommitOperationDelete(name) for name in _MARKERS if name in there]
            self._api.create_commit(self.repo_id, [*missing, *stale], commit_message=message)

        self._patiently(attempt)

    def _complete(self, last: list[CommitOperationAdd]) -> None:
        """Make the last commit, unless the repository is already as it should be.

        Raises:
            _Changed: the repository does not hold what has been uploaded before.
        """
        head = self._api.model_info(self.repo_id).sha
        tree = self._api.list_repo_tree(self.repo_id, recursive=True, revision=head)
        there = {file.path: file for file in tree if isinstance(file, RepoFile)}
        changed = [name for name, addition in self._uploaded.items() if not _is_there(there, addition)]
        if changed:
            raise _Changed(f"{self.repo_id} has been changed by somebody else meanwhile", got=few(changed), hint=_AGAIN)
        missing = [addition for addition in last if not _is_there(there, addition)]
        kept = self._uploaded.keys() | {addition.path_in_repo for addition in last}
        stale = [CommitOperationDelete(name) for name in sorted(there.keys() - kept) if _would_mix(name)]
        if missing or stale:
            self._preupload(missing)
            self._api.create_commit(self.repo_id, [*missing, *stale], commit_message="Complete the upload", parent_commit=head)

    def _described(self, names: list[str]) -> dict[str, RepoFile]:
        """Name -> what the hub says of the file, for those of the names that the repository has."""
        found = self._api.get_paths_info(self.repo_id, names)
        return {file.path: file for file in found if isinstance(file, RepoFile)}

    def _preupload(self, additions: list[CommitOperationAdd]) -> None:
        """Upload contents before the commit; small ones are left to the commit itself."""
        self._api.preupload_lfs_files(self.repo_id, additions, free_memory=False, gitignore_content=_NOTHING_IGNORED)

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """The result of a call, which is tried again after errors that may pass."""
        return Patience(self._tell, self._dropped, _may_pass).run(call)

    def _tell(self, text: str, is_long: bool) -> None:
        self._waiting = f": {text}"
        listening().item(self._name + self._waiting)  # in the thread that uploads nobody listens: there ``_wait`` tells it


def _addition(name: str, content: Path | bytes, sha256: str | None = None) -> CommitOperationAdd:
    try:
        with read_errors(content if isinstance(content, Path) else Path(name)):
            if isinstance(content, Path):
                content.stat()
            addition = CommitOperationAdd(name, content)
    except ValueError as error:
        hint = "see that it is an ordinary file that may be read (ls -l), then run the same command again"
        raise OutputError(f"{name}: the hub does not accept this file", got=error, hint=hint) from error
    if sha256 is not None:
        addition.upload_info.sha256 = bytes.fromhex(sha256)  # saves the client from reading the file once more
    return addition


def _is_there(there: Mapping[str, RepoFile], addition: CommitOperationAdd) -> bool:
    """Whether a repository has a file with these contents under this name."""
    file = there.get(addition.path_in_repo)
    if file is None or file.size != addition.upload_info.size:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as content:  # a small file: the hub keeps others as LFS
        return file.blob_id == _blob_id(content.read())


def _blob_id(content: bytes) -> str:
    """The id of a git blob with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _would_mix(name: str) -> bool:
    """Whether a file of an earlier result, if it stayed, would be taken for part of the new one."""
    is_weights = name.endswith(".safetensors") or is_index(name.rpartition("/")[2])
    return name in _MARKERS or name.startswith(f"{SURGERY_DIR}/") or is_weights


def _check_ours(info: ModelInfo) -> None:
    """Refuse a repository with a model that surgery has not put there: a mistyped name must not overwrite its weights."""
    names = [file.rfilename for file in info.siblings or []]
    model = [name for name in names if name in _MARKERS or name.endswith((".safetensors", *OTHER_WEIGHTS))]
    if model and MANIFEST_FILE not in names and TAG not in (info.tags or []):
        raise OutputError(
            f"{info.id} holds a model that surgery has not uploaded",
            got=few(model),
            hint=f"choose a new name; or, if it may be replaced, add the tag {TAG} to the card of that repository",
        )


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    if isinstance(cause, client.HfHubHTTPError) and cause.response.status_code in (409, 412):
        return True  # another commit came first
    return is_transient(error)


@contextmanager
def _upload_errors(repo_id: str) -> Iterator[None]:
    """Turns the client's exceptions into OutputErrors that say what to do."""
    with hub_errors(repo_id, _MESSAGES, OutputError):
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, (SurgeryError, *(kind for kind, _, _ in _MESSAGES))):
                raise
            cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
            what, hint, got = "cannot be uploaded to", _AGAIN, str(cause)
            if isinstance(cause, client.HfHubHTTPError):
                what, hint = _STATUSES.get(cause.response.status_code, (what, hint))
                got = f"{cause.response.status_code} {cause.server_message or cause}"
            got = "; ".join([" ".join(got.split())[:300] or type(cause).__name__, *getattr(error, "__notes__", ())])
            raise OutputError(f"{repo_id} {what}", got=got, hint=hint) from error
