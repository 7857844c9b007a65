"""The official client of the Hugging Face hub: the one place that knows what it is called and how its versions differ.

Tried with huggingface_hub 1.5.0, 1.17.0, 1.31.0, 2.0.0 and 2.4.0. Older ones are refused. Newer ones are taken as long as they
have all names that are imported here. Of what has come or changed within that range nothing is used: revisions are resolved,
headers read and snapshots in the cache found by the calls and the layout that all of them share. One thing is told apart at
run time: whether the client speaks through httpx or httpx2, from which its errors come.

Slow to import. Nothing but ``source/hub.py``, ``source/upload.py`` and ``operations/card.py`` needs it, and they are imported
where a model is on the hub.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from surgery.errors import MissingExtra, SourceError
from surgery.format.files import MAX_JSON_BYTES, is_plain_path, write_file
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
        get_hf_file_metadata,
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
    "cache_folder",
    "cached_commit",
    "cached_file",
    "cached_snapshot",
    "download",
    "first_bytes",
    "get_token",
    "http",
    "is_away",
    "is_offline",
    "list_files",
    "resolve",
    "sha256_of",
    "validate_repo_id",
    "without_bars",
]

_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")

#: Of a listing, whose pages have a thousand files each; and of a file in it.
_MOST_PAGES = 1000
_MOST_BYTES = 1 << 63


class NoHub(Exception):
    """Something answers, but not as the hub does."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit.

    Attributes:
        size: in bytes.
        sha256: that the hub has given for a large file; None for a small one.
        is_cached: whether the hub's cache had it when the files were listed.
    """

    size: int
    sha256: str | None
    is_cached: bool


def is_offline() -> bool:
    """Whether the client has been told to ask for nothing (``HF_HUB_OFFLINE``)."""
    return bool(constants.HF_HUB_OFFLINE)


def is_away(error: Exception) -> bool:
    """Whether an error says that the hub cannot be asked now, so that what is in the cache has to do."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (RequestError, InvalidURL, OfflineModeIsEnabled, NoHub))


def resolve(repo_id: str, revision: str | None) -> str:
    """The commit that a branch, a tag or None (the default branch) stands for, kept in the cache for when the hub is away.

    A commit is taken as it is, without a request. Raises the client's errors, and ``NoHub``.
    """
    validate_repo_id(repo_id)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    with _answering():
        commit = HfApi().model_info(repo_id, revision=revision).sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise NoHub(f"the commit is {commit!r}")
    if (kept := _ref(repo_id, revision)) is not None and cached_commit(repo_id, revision) != commit:
        with suppress(OSError):  # the cache may be read-only
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, commit.encode())
    return commit


def list_files(repo_id: str, commit: str) -> dict[str, HubFile]:
    """The files of a repository by name, from its listing alone. Raises the client's errors, and ``NoHub``.

    Their names are as the listing has them, and may be no names of files: the client is asked for none of these.
    """
    files: dict[str, HubFile] = {}
    with _answering():
        for file in _tree(repo_id, commit):
            name, size, sha256 = file.path, file.size, None if file.lfs is None else _sha256(file.lfs.sha256)
            if not isinstance(name, str) or type(size) is not int or not 0 <= size < _MOST_BYTES:
                raise NoHub(f"it lists a file {name!r} of {size!r} bytes"[:300])
            if file.lfs is not None and (sha256 is None or file.lfs.size != size):
                raise NoHub(f"its entry of {name!r} contradicts itself"[:300])
            is_cached = is_plain_path(name) and cached_file(repo_id, commit, name) is not None
            found = HubFile(size, sha256, is_cached)
            if files.setdefault(name, found) != found:
                raise NoHub(f"it lists {name!r} twice"[:300])
    return files


def _tree(repo_id: str, commit: str) -> Iterator[RepoFile]:
    """The files in a listing, page by page. The client itself would follow its links anywhere, and for ever."""
    address = f"{constants.ENDPOINT}/api/models/{repo_id}/tree/{commit}"
    query = "recursive=true&expand=false"
    for _ in range(_MOST_PAGES):
        data, following = _page(f"{address}?{query}")
        yield from (RepoFile(**entry) for entry in json.loads(data) if entry["type"] == "file")  # type: ignore[no-untyped-call]
        if following is None:
            return
        query = urlsplit(following).query  # the token is for the hub alone, whatever host a link names
    raise NoHub(f"its listing has more than {_MOST_PAGES} pages")


def _page(url: str) -> tuple[bytes, str | None]:
    """A page of a listing, and the link to the next one."""
    data = bytearray()
    with get_session().stream("GET", url, headers=build_hf_headers()) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            data += part
            if len(data) > MAX_JSON_BYTES:
                raise NoHub(f"a page of its listing has more than {MAX_JSON_BYTES} bytes")
        return bytes(data), response.links.get("next", {}).get("url")


@contextmanager
def _answering() -> Iterator[None]:
    """The client takes what it is sent for the hub's; a portal's page is not."""
    try:
        yield
    except HFValidationError:
        raise
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise NoHub(f"{constants.ENDPOINT} answers something else ({type(error).__name__}: {error})"[:300]) from error


def download(repo_id: str, commit: str, file: str, folder: Path | None = None) -> Path:
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


def sha256_of(repo_id: str, commit: str, file: str) -> str | None:
    """The hash that the hub has given for a large file; None for a small one. Raises the client's errors."""
    if (cached := cached_file(repo_id, commit, file)) is not None:
        return _sha256(cached.resolve().name)  # the cache names what it holds by that
    return _sha256(get_hf_file_metadata(hf_hub_url(repo_id, file, revision=commit)).etag)


def _sha256(text: str | None) -> str | None:
    return text if text is not None and _SHA256.fullmatch(text) else None


def first_bytes(repo_id: str, commit: str, file: str, count: int) -> bytes:
    """At most ``count`` bytes from the start of a file; no more of it is read, also from a server that sends all.

    Raises the client's errors.
    """
    url = hf_hub_url(repo_id, file, revision=commit)
    headers = {**build_hf_headers(), "range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            data += part
            if len(data) >= count:
                break
    return bytes(data[:count])


def cache_folder() -> Path:
    """The hub's cache."""
    return Path(constants.HF_HUB_CACHE)


def cached_file(repo_id: str, commit: str, file: str) -> Path | None:
    """Where the cache has a file of a commit, as a link or as it is; None if it does not, or only a link to nothing."""
    found = try_to_load_from_cache(repo_id, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


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
