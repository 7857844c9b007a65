"""The official client of the Hugging Face hub: the one place that knows what it is called and how its versions differ.

Tried with huggingface_hub 1.5.0, 1.17.0, 1.31.0, 2.0.0 and 2.4.0. Older ones are refused. Newer ones are taken as long as they
have all names that are imported here. Of what has come or changed within that range nothing is used: revisions are resolved and
snapshots in the cache found and filled by the calls and the layout that all of them share. One thing is told apart at run time:
whether the client speaks through httpx or httpx2, from which its errors come.

Files and listings are asked for in single requests, through the client's session. ``hf_hub_download`` goes on with a file that
broke off until 1.17, and begins it again from 1.31 on; listings are asked for once until 2.0, and six times in 2.4; a status of
500 and above ends a download in all of them. It is called for what the hub has in its store of chunks, and for nothing else.

Slow to import, so the modules that need it are imported only when a model is on the hub or is uploaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from surgery.errors import MissingExtra, SourceError

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
    #: Errors of requests. ``TransportError`` are those of the connection, after which another attempt may succeed.
    RequestError: type[Exception] = http.RequestError
    TransportError: type[Exception] = http.TransportError
    InvalidURL: type[Exception] = http.InvalidURL
except ValueError as error:
    raise SourceError(
        "the hub's client does not accept a setting of this environment",
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
    "build_hf_headers",
    "constants",
    "get_session",
    "get_token",
    "hf_hub_download",
    "hf_hub_url",
    "hf_raise_for_status",
    "http",
    "is_away",
    "is_elsewhere",
    "is_offline",
    "try_to_load_from_cache",
    "validate_repo_id",
    "without_bars",
]


class NoHub(Exception):
    """Something answers, but not as a hub does: a captive portal, a proxy, or a listing that makes no sense."""


class Incomplete(Exception):
    """An answer ends before everything that was asked for has come."""


def is_offline() -> bool:
    """Whether the client has been told to make no requests (``HF_HUB_OFFLINE``)."""
    return bool(constants.HF_HUB_OFFLINE)


def is_away(error: Exception) -> bool:
    """Whether an error means that the hub cannot be reached now, so that only the cache is left."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 425, 429)
    return isinstance(error, (RequestError, InvalidURL, OfflineModeIsEnabled, NoHub))


def is_elsewhere(error: Exception) -> bool:
    """Whether an error comes from another host, to which the hub has redirected us for the contents of a file.

    Such addresses expire and take no token, so a refusal there says nothing about the user's rights. A redirect to another
    hub is told apart by the error headers that hubs send.
    """
    if not isinstance(error, HfHubHTTPError) or not error.response.history:
        return False
    here = error.response.history[0].request.url.netloc
    named = any(error.response.headers.get(name) for name in ("X-Error-Code", "X-Error-Message"))
    return error.response.request.url.netloc != here and not named


@contextmanager
def without_bars() -> Iterator[None]:
    """Switches the client's own progress bars off for as long as the context lasts."""
    shown = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
