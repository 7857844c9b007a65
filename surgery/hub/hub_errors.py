"""Translating the exceptions of the hub's client into errors that say what happened and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from surgery.errors import SourceError, SurgeryError
from surgery.escapes import quoted
from surgery.hub import hub_client as client
from surgery.hub import patience

#: A placeholder in the tables below: the hint comes from ``how_to_fetch_it``.
_ONLINE = "fetch it while online"
_GO_ON = "run the same command again: it continues where it stopped, and what has been fetched is not fetched twice"
_TOKEN = "hf auth login, or set HF_TOKEN, with a token that may read it"
_NOT_HERE = "is neither a folder here nor (all) in the local cache"
_AWAY = f"cannot be reached on the hub, and {_NOT_HERE}"
#: Rows of (exception of the client, what happened, what to do). The first row that fits counts, so subclasses come first.
Messages = tuple[tuple[type[Exception], str, str], ...]
_MESSAGES: Messages = (
    (client.GatedRepoError, "is gated and your token has no access to it", "accept its terms on its page, then: hf auth login"),
    (client.DisabledRepoError, "has been disabled on the hub", "choose another one"),
    (
        client.RepositoryNotFoundError,
        "does not exist on the hub or is private, nor is there such a folder here",
        "check the name; for a private one: hf auth login",
    ),
    (client.RevisionNotFoundError, "has no such revision", "leave --revision out, or give a branch, tag or commit of it"),
    (client.RemoteEntryNotFoundError, "lacks a file that its listing names", "try again; the repository may be changing"),
    (client.LocalEntryNotFoundError, _AWAY, _ONLINE),
    (client.OfflineModeIsEnabled, f"{_NOT_HERE}, and the client is offline", _ONLINE),
    (client.HFValidationError, "is neither a local folder nor a valid repo id", "give owner/name or a path"),
    (client.HfHubHTTPError, "cannot be fetched from the hub", "try again later"),
    (client.Incomplete, "cannot be fetched from the hub: its answers are cut off", "try again later"),
    (client.RequestError, _AWAY, _ONLINE),
    (client.InvalidURL, "cannot be reached", "set HF_ENDPOINT to the address of a hub, or unset it"),
    (
        client.NoHub,
        "cannot be fetched: what answers is not a hub",
        "unset HF_ENDPOINT; or log in to the network, if its login page answers",
    ),
)
#: Status of the answer to the first request -> what happened, what to do. An expired token gets these for public models too.
FIRST_STATUSES = {
    401: ("may not be read with your token, which has expired or been revoked", f"{_TOKEN}; of a public one: unset HF_TOKEN"),
    403: ("may not be read with your token", _TOKEN),
}
#: The same for later requests of a run, after the hub has answered before: by status, and else (_MIDWAY) by exception.
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
    (client.DisabledRepoError, "has been disabled on the hub meanwhile", "choose another one"),
    (client.RemoteEntryNotFoundError, "lacks a file that its listing named", "see its page on the hub for what has changed"),
    (client.OfflineModeIsEnabled, "has files that are not in the local cache any more, and the client is offline", _ONLINE),
    (client.HfHubHTTPError, "cannot be fetched from the hub", "wait until the hub works again"),
    (client.Incomplete, "cannot be fetched from the hub: its answers are cut off", "try another network"),
    (client.RequestError, "cannot be reached any more", "connect to the network"),
    (
        client.NoHub,
        "cannot be fetched any more: what answers is not the hub",
        "log in to the network, if its login page answers",
    ),
)


@contextmanager
def hub_errors(
    repo_id: str,
    messages: Messages = _MESSAGES,
    raised: type[SurgeryError] = SourceError,
    *,
    revision: str | None = None,
    statuses: Mapping[int, tuple[str, str]] = MappingProxyType({}),
) -> Iterator[None]:
    """Translates errors: the client's exceptions become errors that say what happened and what to do.

    Args:
        repo_id: of the repository that the requests are about.
        messages: what to say, by exception.
        raised: the kind of error to raise.
        revision: that was asked for, for the hint.
        statuses: status of an answer -> what happened and what to do, where an exception has only its status.
    """
    try:
        yield
    except tuple(kind for kind, _, _ in messages) as error:
        what, hint = next((what, hint) for kind, what, hint in messages if isinstance(error, kind))
        if type(error) is client.HfHubHTTPError:  # those derived from it are told apart
            what, hint = statuses.get(error.response.status_code, (what, hint))
        if hint is _ONLINE:
            hint = how_to_fetch_it(repo_id, revision)
            if revision is None:  # which no folder has
                hint = f"if it is a local folder, check the name; else {hint}"
        raise raised(f"{repo_id} {what}", got=first_line(error), hint=hint) from error


@contextmanager
def hub_errors_midway(repo_id: str, file: str) -> Iterator[None]:
    """Translates errors, like ``hub_errors``, while a file is fetched that the hub has listed before."""
    try:
        yield
    except tuple(kind for kind, _, _ in _MIDWAY) as error:
        status = error.response.status_code if isinstance(error, client.HfHubHTTPError) else None
        what, hint = next((what, hint) for kind, what, hint in _MIDWAY if isinstance(error, kind))
        is_told_apart = isinstance(error, (client.GatedRepoError, client.DisabledRepoError, client.RemoteEntryNotFoundError))
        if patience.is_refused_elsewhere(error):
            what, hint = "is refused by the server that the hub redirects to", "try another network"
        elif status in _MIDWAY_STATUSES and not is_told_apart:
            what, hint = _MIDWAY_STATUSES[status]
        if hint is _ONLINE:
            hint = how_to_fetch_it(repo_id)
        raise SourceError(f"{repo_id} {what}: {file}", got=first_line(error), hint=f"{hint}; then {_GO_ON}") from error
    except (client.XetDownloadError, OSError, RuntimeError) as error:
        if isinstance(error, SurgeryError):
            raise
        raise SourceError(
            f"{repo_id}/{file} cannot be fetched", got=first_line(error), hint=f"when that is fixed, {_GO_ON}"
        ) from error


def how_to_fetch_it(repo_id: str, revision: str | None = None) -> str:
    """A hint on how to get a model or an adapter into the cache."""
    once = f"hf download {quoted(repo_id)}" + ("" if revision is None else f" --revision {quoted(revision)}")
    if client.is_offline():
        return f"unset HF_HUB_OFFLINE, or fetch it once without that: {once}"
    return f"connect to the network, or fetch it once while online: {once}"


def first_line(error: Exception) -> str:
    """The first line of an error's text, with the notes that have been added to the error."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "; ".join([first, *getattr(error, "__notes__", ())])
