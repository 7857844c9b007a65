"""The official client of the Hugging Face hub: the one place that knows what it is called and how its versions differ.

Tried with huggingface_hub 1.5.0, 1.17.0, 1.31.0, 2.0.0 and 2.4.0. Older ones are refused. Newer ones are taken as long as they
have all names that are imported here. Of what has come or changed within that range nothing is used: revisions are resolved and
snapshots in the cache found and filled by the calls and the layout that all of them share. One thing is told apart at run time:
whether the client speaks through httpx or httpx2, from which its errors come.

Files and listings are asked for in single requests, through the client's session. ``hf_hub_download`` goes on with a file that
broke off until 1.17, and begins it anew from 1.31 on; listings are asked for once until 2.0, and six times in 2.4; a status of
500 and above ends a download in all of them. It is called for what the hub has in its store of chunks, and for nothing else.

Slow to import. Nothing but ``source/hub.py``, ``publish/upload.py`` and ``publish/card.py`` needs it, and they are imported
where a model is on the hub.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from surgery.errors import MissingExtra, SourceError
from surgery.files.file_writer import write_file
from surgery.files.json_files import MAX_JSON_BYTES, decode_json
from surgery.files.paths import is_plain_path
from surgery.progress import Progress, listening

_OLDEST = (1, 5)
_TRIED = "1.5.0 to 2.4.0"


def _unusable(what: str, got: object) -> MissingExtra:
    return MissingExtra(
        f"{what}: models on the hub and uploads need it",
        got=got,
        expected=f"huggingface_hub {'.'.join(map(str, _OLDEST))} or newer; tried with {_TRIED}",
        hint="pip install 'huggingface-hub>=1.5,<3'; or download the model in another way and give its folder",
    )


try:
    import huggingface_hub
except ImportError as error:
    raise _unusable("the hub's client, huggingface_hub, cannot be imported", error) from error

_version = re.match(r"(\d+)\.(\d+)", huggingface_hub.__version__)
if _version is not None and (int(_version[1]), int(_version[2])) < _OLDEST:
    raise _unusable("the installed huggingface_hub is too old", huggingface_hub.__version__)

try:
    from huggingface_hub import (
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        ModelCardData,
        constants,
        get_token,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        XetDownloadError,
    )
    from huggingface_hub.hf_api import ModelInfo, RepoFile, RepoUrl
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but hidden from type checkers
        are_progress_bars_disabled,
        build_hf_headers,
        disable_progress_bars,
        enable_progress_bars,
        get_session,
        hf_raise_for_status,
        validate_repo_id,
    )

    for _name in (
        "auth_check", "create_commit", "create_repo", "get_paths_info", "list_repo_tree", "model_info", "preupload_lfs_files",
    ):  # fmt: skip
        getattr(HfApi, _name)
    # httpx or httpx2, whichever the client's own errors are derived from.
    http = importlib.import_module(
        next(kind.__module__ for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError").partition(".")[0]
    )
    #: What goes wrong on the way to the hub and back; ``TransportError`` is the part of it that another attempt may mend.
    RequestError: type[Exception] = http.RequestError
    TransportError: type[Exception] = http.TransportError
    InvalidURL: type[Exception] = http.InvalidURL
except ValueError as error:
    raise SourceError(
        "the hub's client takes a setting of this environment for none",
        got=error,
        hint="set HF_ENDPOINT to the address of a hub",
    ) from error
except (AttributeError, ImportError, StopIteration) as error:
    raise _unusable(
        f"huggingface_hub {huggingface_hub.__version__} lacks a name that surgery uses", str(error) or type(error).__name__
    ) from error

__all__ = [
    "CommitOperationAdd",
    "CommitOperationDelete",
    "DisabledRepoError",
    "GatedRepoError",
    "HFValidationError",
    "HfApi",
    "HfHubHTTPError",
    "HubFile",
    "Incomplete",
    "InvalidURL",
    "LocalEntryNotFoundError",
    "LocalTokenNotFoundError",
    "ModelCardData",
    "ModelInfo",
    "NoHub",
    "OfflineModeIsEnabled",
    "RemoteEntryNotFoundError",
    "RepoFile",
    "RepoUrl",
    "RepositoryNotFoundError",
    "RequestError",
    "RevisionNotFoundError",
    "TransportError",
    "XetDownloadError",
    "blob_path",
    "cache_folder",
    "cached_commit",
    "cached_file",
    "cached_hash",
    "cached_snapshot",
    "content_hash",
    "download_by_xet",
    "get_token",
    "has_xet",
    "http",
    "is_away",
    "is_elsewhere",
    "is_offline",
    "link_into_cache",
    "list_files",
    "lock_path",
    "parts",
    "resolve",
    "validate_repo_id",
    "without_bars",
]

_COMMIT = re.compile("[0-9a-f]{40}")
_SHA1 = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


#: Files of a page, and the address of the next one.
_Page = tuple[list[RepoFile], str | None]

#: Of a listing, whose pages have a thousand files each; and of a file in it.
_MOST_PAGES = 1000
_MOST_BYTES = 1 << 63


class NoHub(Exception):
    """Something answers, but not as the hub does."""


class Incomplete(Exception):
    """An answer has come to its end before all that was asked for."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit.

    Attributes:
        size: in bytes.
        sha256: that the hub has given for a large file; None for a small one.
        git_sha1: what git calls a small file by its contents; of a large one, its pointer's.
        is_cached: whether the hub's cache had it when the files were listed.
        by_xet: whether the hub has it in its store of chunks, from which the client fetches in its own way.
    """

    size: int
    sha256: str | None
    git_sha1: str
    is_cached: bool
    by_xet: bool

    @property
    def hash(self) -> str:
        """Of its contents: sha256 (64 digits), or as git hashes files (40 digits). The cache calls its blobs so."""
        return self.sha256 or self.git_sha1


def is_offline() -> bool:
    """Whether the client has been told to ask for nothing (``HF_HUB_OFFLINE``)."""
    return bool(constants.HF_HUB_OFFLINE)


def is_away(error: Exception) -> bool:
    """Whether an error says that the hub cannot be asked now, so that what is in the cache has to do."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 425, 429)
    return isinstance(error, (RequestError, InvalidURL, OfflineModeIsEnabled, NoHub))


def is_elsewhere(error: Exception) -> bool:
    """Whether an answer is that of another host, to which the hub has sent us for the contents of a file: its addresses are
    good for a while, and know no token. A hub that stands behind another one says more of an error than its status."""
    if not isinstance(error, HfHubHTTPError) or not error.response.history:
        return False
    here = error.response.history[0].request.url.netloc
    named = any(error.response.headers.get(name) for name in ("X-Error-Code", "X-Error-Message"))
    return error.response.request.url.netloc != here and not named


def resolve(repo_id: str, revision: str | None) -> str:
    """The commit that a branch, a tag or None (the default branch) stands for, kept in the cache for when the hub is away.

    A commit is taken as it is, without a request. Raises the client's errors, and ``NoHub``.
    """
    validate_repo_id(repo_id)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    with _answering():
        commit = HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise NoHub(f"the commit is {commit!r}")
    if (kept := _ref(repo_id, revision)) is not None and cached_commit(repo_id, revision) != commit:
        with suppress(OSError):  # the cache may be read-only
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, commit.encode())
    return commit


def list_files(
    repo_id: str, commit: str, further: Callable[[Callable[[], _Page]], _Page] = lambda ask: ask()
) -> dict[str, HubFile]:
    """The files of a repository by name, from its listing alone. Raises the client's errors, and ``NoHub``.

    Their names are as the listing has them, and may be no names of files: the client is asked for none of these. Nor is it
    asked to page: it would follow links anywhere, and for ever; and some versions ask for the first page six times, others
    without a time limit.

    Args:
        repo_id, commit: of the repository.
        further: asks for each page but the first, which is asked for once.
    """
    files: dict[str, HubFile] = {}
    address = f"{HfApi().endpoint}/api/models/{repo_id}/tree/{quote(commit, safe='')}"
    query = "recursive=true&expand=false"
    for number in range(_MOST_PAGES):
        page = partial(_page, f"{address}?{query}")
        entries, following = further(page) if number else page()
        for file in entries:
            found = _described(repo_id, commit, file)
            if files.setdefault(file.path, found) != found:
                raise NoHub(f"it lists {file.path!r} twice"[:300])
        if following is None:
            return files
        with _answering():
            query = urlsplit(following).query  # the token is for the hub alone, whatever host a link names
    raise NoHub(f"its listing has more than {_MOST_PAGES} pages")


def _page(url: str) -> _Page:
    """One page of a listing: its files, and the link to the next page."""
    data = bytearray()
    with get_session().stream("GET", url, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            data += part
            if len(data) > MAX_JSON_BYTES:
                raise NoHub(f"a page of its listing has more than {MAX_JSON_BYTES} bytes")
        with _answering():
            if data.startswith(b"[") and not data.rstrip().endswith(b"]"):
                raise Incomplete("a page of the listing breaks off")
            entries = [RepoFile(**entry) for entry in decode_json(bytes(data).decode()) if entry["type"] == "file"]  # type: ignore[no-untyped-call]
            return entries, response.links.get("next", {}).get("url")


def _described(repo_id: str, commit: str, file: RepoFile) -> HubFile:
    """What a listing says of a file, if it makes sense."""
    name, size = file.path, file.size
    if not isinstance(name, str) or type(size) is not int or not 0 <= size < _MOST_BYTES:
        raise NoHub(f"it lists a file {name!r} of {size!r} bytes"[:300])
    if file.lfs is not None and file.lfs.size != size:
        raise NoHub(f"its entry of {name!r} contradicts itself"[:300])
    return HubFile(
        size=size,
        sha256=None if file.lfs is None else _matching(_SHA256, file.lfs.sha256),
        git_sha1=_matching(_SHA1, file.blob_id),
        is_cached=is_plain_path(name) and cached_file(repo_id, commit, name) is not None,
        by_xet=file.xet_hash is not None,
    )


def _matching(pattern: re.Pattern[str], text: object) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise NoHub(f"a file has the hash {text!r}"[:300])
    return text


@contextmanager
def _answering() -> Iterator[None]:
    """The client takes what it is sent for the hub's; a portal's page is not."""
    try:
        yield
    except (HFValidationError, HfHubHTTPError):
        raise
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise NoHub(f"{constants.ENDPOINT} answers something else ({type(error).__name__}: {error})"[:300]) from error


def parts(repo_id: str, commit: str, file: str, start: int, end: int, size: int) -> Iterator[bytes]:
    """The bytes ``start`` to ``end`` (without it) of a file of ``size`` bytes, as they come, in one request.

    No more of the file is read, also from a server that sends all of it. Raises the client's errors; ``Incomplete`` where
    the answer is shorter, ``NoHub`` where it is of a file of another size.
    """
    headers = {**build_hf_headers(), "accept-encoding": "identity"}  # or ranges would be those of a compressed file
    if (start, end) != (0, size):
        headers["range"] = f"bytes={start}-{end - 1}"
    url = hf_hub_url(repo_id, file, revision=commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        position = _begins_at(response, start, size)
        for part in response.iter_bytes():
            wanted = part[max(0, start - position) : max(0, end - position)]
            position += len(part)
            if wanted:
                yield wanted
            if position >= end:
                return
    raise Incomplete(f"the answer ends after {position} of {end} bytes")


def _begins_at(response: Any, start: int, size: int) -> int:
    """Which byte of the file an answer begins with."""
    if response.status_code != 206:
        told = response.headers.get("Content-Length")
        if told is not None and "Content-Encoding" not in response.headers and told != str(size):
            raise NoHub(f"{told} bytes come for a file of {size}")
        return 0
    told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if told is None or int(told[1]) > start or told[2] not in ("*", str(size)):
        raise NoHub(f"the answer to a range is {response.headers.get('Content-Range')!r}"[:300])
    return int(told[1])


def has_xet() -> bool:
    """Whether the client fetches what the hub has in its store of chunks from there."""
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def download_by_xet(repo_id: str, commit: str, file: str, folder: Path | None = None) -> Path:
    """A file, in the cache or in a folder of one's own. Raises the client's errors; OSError, RuntimeError or
    ``XetDownloadError`` for what fails on the way or on the disk. Whoever listens is told how much of it is here."""
    bar = type("Download", (_Download,), {"progress": listening(), "file": file})
    return Path(hf_hub_download(repo_id, file, revision=commit, local_dir=folder, tqdm_class=bar))


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


def content_hash(of: HubFile) -> hashlib._Hash:
    """To be given the contents of a file, for what ``HubFile.hash`` must be."""
    if of.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % of.size, usedforsecurity=False)


def cache_folder() -> Path:
    """The hub's cache."""
    return Path(constants.HF_HUB_CACHE)


def cached_file(repo_id: str, commit: str, file: str) -> Path | None:
    """Where the cache has a file of a commit, as a link or as it is; None if it does not, or only a link to nothing."""
    found = try_to_load_from_cache(repo_id, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


def cached_hash(pointer: Path) -> str | None:
    """What the cache says that the hash of a file in a snapshot is, see ``HubFile.hash``; None where it does not say."""
    try:
        blob = pointer.readlink()  # of this link alone: blobs may be links into a store with names of another kind
    except OSError:
        return None
    is_hash = _SHA1.fullmatch(blob.name) or _SHA256.fullmatch(blob.name)
    return blob.name if is_hash and blob.parent.name == "blobs" else None


def blob_path(repo_id: str, of: HubFile) -> Path:
    """Where the cache keeps the contents of a file, whatever commits it is in."""
    return _repository(repo_id) / "blobs" / of.hash


def lock_path(repo_id: str, of: HubFile) -> Path:
    """A file by which processes keep each other from fetching the same."""
    return cache_folder() / ".locks" / _repository(repo_id).name / f"{of.hash}.surgery.lock"


def link_into_cache(repo_id: str, commit: str, file: str, blob: Path) -> Path:
    """Put a file that the cache has the contents of into the snapshot of a commit, as the client does."""
    pointer = _repository(repo_id) / "snapshots" / commit / file
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
        blob.replace(pointer)
        return pointer
    fresh = pointer.with_name(f".{pointer.name}.{uuid.uuid4().hex[:8]}.surgery")
    try:
        fresh.symlink_to(os.path.relpath(blob, pointer.parent))
    except (NotImplementedError, OSError):  # a system or a disk without links
        blob.replace(pointer)
    else:
        fresh.replace(pointer)
    return pointer


def cached_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit that the cache knows a revision by; None if it knows none."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    kept = _ref(repo_id, revision)
    try:
        commit = "" if kept is None else kept.read_bytes().decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def cached_snapshot(repo_id: str, commit: str) -> Path | None:
    """The folder with the files of a commit that the cache has, all or some; None if it has none."""
    folder = _repository(repo_id) / "snapshots" / commit
    return folder if folder.is_dir() else None


def _repository(repo_id: str) -> Path:
    return cache_folder() / "--".join(["models", *repo_id.split("/")])


def _ref(repo_id: str, revision: str | None) -> Path | None:
    """The file of the cache that says what commit a revision is; None for what is no name of one."""
    name = PurePosixPath(revision or constants.DEFAULT_REVISION)
    if name.is_absolute() or ".." in name.parts or "\0" in str(name):
        return None
    return _repository(repo_id) / "refs" / name


@contextmanager
def without_bars() -> Iterator[None]:
    """The client's own progress bars are off meanwhile."""
    shown = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
