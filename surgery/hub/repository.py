"""Requests to the hub: the commit of a revision, its files, their contents, and whether a model card is valid."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from surgery.files.file_writer import write_file
from surgery.files.json_files import MAX_JSON_BYTES, decode_json
from surgery.files.paths import is_plain_path
from surgery.hub.client_cache import cached_commit, cached_file, ref_path
from surgery.hub.hub_client import (
    HfApi,
    HfHubHTTPError,
    HFValidationError,
    Incomplete,
    NoHub,
    RepoFile,
    build_hf_headers,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    hf_raise_for_status,
    validate_repo_id,
)
from surgery.hub.hub_file import COMMIT, SHA1, SHA256, HubFile, RemoteFile
from surgery.progress import Progress, listening

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
#: A page of a listing: its files, and the address of the next page.
_Page = tuple[list[RepoFile], str | None]
#: The most pages of a listing, of a thousand files each, and the most bytes of a file in it.
_MOST_PAGES = 1000
_MOST_BYTES = 1 << 63


def resolve_commit(repo_id: str, revision: str | None) -> str:
    """The commit of a branch, a tag or None (the default branch). It is recorded in the cache for when the hub is away.

    The id of a commit is returned without a request. Raises the client's errors, and ``NoHub``.
    """
    validate_repo_id(repo_id)
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    with _answering():
        commit = HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    if commit is None or not COMMIT.fullmatch(commit):
        raise NoHub(f"the commit is {commit!r}")
    if (kept := ref_path(repo_id, revision)) is not None and cached_commit(repo_id, revision) != commit:
        with suppress(OSError):  # the cache may be read-only
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, commit.encode())
    return commit


def list_files(
    repo_id: str, commit: str, further: Callable[[Callable[[], _Page]], _Page] = lambda ask: ask()
) -> dict[str, HubFile]:
    """The files of a repository by name, from its listing. Raises the client's errors, and ``NoHub``.

    The names are not checked: a listing may hold names that no file can have. The client's own listing is not used: it
    follows links to the next page to any host and without end, and some versions ask for the first page six times, others
    without a time limit.

    Args:
        repo_id, commit: of the repository.
        further: called with a request for a page, for each page but the first; returns its result, perhaps after retries.
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
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > MAX_JSON_BYTES:
                raise NoHub(f"a page of its listing has more than {MAX_JSON_BYTES} bytes")
        with _answering():
            if data.startswith(b"[") and not data.rstrip().endswith(b"]"):
                raise Incomplete("a page of the listing breaks off")
            entries = [RepoFile(**entry) for entry in decode_json(bytes(data).decode()) if entry["type"] == "file"]  # type: ignore[no-untyped-call]
            return entries, response.links.get("next", {}).get("url")


def _described(repo_id: str, commit: str, file: RepoFile) -> HubFile:
    """What a listing says of a file. Raises ``NoHub`` if that makes no sense."""
    name, size = file.path, file.size
    if not isinstance(name, str) or type(size) is not int or not 0 <= size < _MOST_BYTES:
        raise NoHub(f"it lists a file {name!r} of {size!r} bytes"[:300])
    if file.lfs is not None and file.lfs.size != size:
        raise NoHub(f"its entry of {name!r} contradicts itself"[:300])
    return HubFile(
        size=size,
        sha256=None if file.lfs is None else _matching(SHA256, file.lfs.sha256),
        git_sha1=_matching(SHA1, file.blob_id),
        is_cached=is_plain_path(name) and cached_file(repo_id, commit, name) is not None,
        by_xet=file.xet_hash is not None,
    )


def _matching(pattern: re.Pattern[str], text: object) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise NoHub(f"a file has the hash {text!r}"[:300])
    return text


@contextmanager
def _answering() -> Iterator[None]:
    """Translates errors: what the client raises on an answer that is no hub's, such as a portal's page, becomes ``NoHub``."""
    try:
        yield
    except (HFValidationError, HfHubHTTPError):
        raise
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise NoHub(f"{constants.ENDPOINT} answers something else ({type(error).__name__}: {error})"[:300]) from error


def byte_range(remote: RemoteFile, start: int, end: int) -> Iterator[bytes]:
    """The bytes from ``start`` up to but without ``end`` of a file, in chunks as they come, by one request.

    No more than these are read, even from a server that sends the whole file.

    Raises:
        Incomplete: the answer ends early.
        NoHub: the answer is of a file of another size.
        Exception: the client's errors.
    """
    headers = {**build_hf_headers(), "accept-encoding": "identity"}  # or ranges would be those of a compressed file
    size = remote.hub_file.size
    if (start, end) != (0, size):
        headers["range"] = f"bytes={start}-{end - 1}"
    url = hf_hub_url(remote.repo_id, remote.path, revision=remote.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        position = _first_position(response, start, size)
        for chunk in response.iter_bytes():
            wanted = chunk[max(0, start - position) : max(0, end - position)]
            position += len(chunk)
            if wanted:
                yield wanted
            if position >= end:
                return
    raise Incomplete(f"the answer ends after {position} of {end} bytes")


def _first_position(response: Any, start: int, size: int) -> int:
    """The position in the file of the first byte of an answer. Raises ``NoHub`` if it is none that was asked for."""
    if response.status_code != 206:
        told = response.headers.get("Content-Length")
        if told is not None and "Content-Encoding" not in response.headers and told != str(size):
            raise NoHub(f"{told} bytes come for a file of {size}")
        return 0
    told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if told is None or int(told[1]) > start or told[2] not in ("*", str(size)):
        raise NoHub(f"the answer to a range is {response.headers.get('Content-Range')!r}"[:300])
    return int(told[1])


def takes_card(card: str) -> bool:
    """Whether the hub finds the YAML of a model card valid, which the client asks too before it uploads one.

    The client's own function is not used: its oldest versions always ask huggingface.co. Raises the client's errors.
    """
    url, asked = f"{HfApi().endpoint}/api/validate-yaml", {"content": card, "repoType": "model"}
    response = get_session().post(url, json=asked, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if response.status_code == 400:
        return False
    hf_raise_for_status(response)
    return True


def has_xet() -> bool:
    """Whether the client can and may fetch from the hub's store of chunks (Xet)."""
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def download_by_xet(remote: RemoteFile, folder: Path | None = None) -> Path:
    """Fetch a file by the client's own download, into the cache or into a folder; returns its path. Tells the progress.

    Raises the client's errors; OSError, RuntimeError or ``XetDownloadError`` where the connection or the disk fails.
    """
    bar = type("Download", (_Download,), {"progress": listening(), "file": remote.path})
    return Path(hf_hub_download(remote.repo_id, remote.path, revision=remote.commit, local_dir=folder, tqdm_class=bar))


class _Download(tqdm):  # type: ignore[type-arg]
    """Given to the client as its progress bar. Shows nothing, and tells our progress how far the download is."""

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
