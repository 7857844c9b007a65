"""What a user gives for a model: a folder, a repo id, or an address that stands for one of these."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from surgery.errors import FormatError, OptionError, SourceError, advice
from surgery.escapes import quoted
from surgery.files.access import read_errors
from surgery.files.kinds import HEAD_BYTES, other_kind
from surgery.files.paths import check_relative_path
from surgery.source.weight_files import SUFFIX

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WITH_REVISION = re.compile(r"(?P<repo>[^@]+)@(?P<rest>.+)")
#: As in the hub's own addresses (hf://): a revision ends at a slash, except those that have slashes in their names.
_REVISION = re.compile(r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)(?:/(?P<path>.*))?")
#: A single slash is allowed too: ``Path`` makes one of two.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://?(?P<rest>.*)", re.DOTALL)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co", "hf-mirror.com")
#: The address of a repository that git reaches by ssh.
_SSH = re.compile(r"git@(?P<host>[^/:@]+):(?P<path>.*)")
#: Kinds of repositories that are no models; they stand before the owner in an address.
_OTHER_REPOSITORIES = ("datasets", "spaces", "buckets")
_NO_MODELS = (
    *_OTHER_REPOSITORIES,
    "collections",
    "papers",
    "docs",
    "blog",
    "posts",
    "models",
    "organizations",
    "api",
)
_OF_FILES = ("blob", "resolve", "raw", "blame", "edit")
_PAGES = ("tree", *_OF_FILES, "commit", "commits", "discussions")
_WINDOWS = re.compile(r"(?:(?P<drive>[A-Za-z]):[\\/]|\\\\|[^/:]*\\)")
_QUOTES = "\"'`\u201c\u201d\u2018\u2019<>"
_STORES = {"s3": "aws s3 sync", "gs": "gcloud storage cp -r", "gcs": "gcloud storage cp -r"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a model is.

    Attributes:
        folder: of a local model; None for one on the hub.
        repo_id: of a model on the hub; empty for a local one.
        revision: that the address names; None if it names none.
        subfolder: that the address names, in which the model lies; None if it names none.
        file: the weight file of the model that the address names; None if it names none.
    """

    folder: Path | None = None
    repo_id: str = ""
    revision: str | None = None
    subfolder: str | None = None
    file: str | None = None

    def with_options(self, revision: str | None, subfolder: str | None) -> Address:
        """This address, completed by the options ``--revision`` and ``--subfolder``.

        Raises:
            SourceError: an option contradicts the address.
        """
        where = str(self.folder or self.repo_id)
        for option, asked, named in (("--revision", revision, self.revision), ("--subfolder", subfolder, self.subfolder)):
            if asked is not None and named is not None and asked.strip("/") != named:
                raise SourceError(
                    f"the address of {where} names another one than {option}", got=f"{named!r} and {asked!r}", hint="give one"
                )
        return replace(self, revision=self.revision or revision, subfolder=self.subfolder or subfolder)


def check_subfolder(subfolder: str) -> str:
    """``subfolder`` without slashes around it.

    Raises:
        OptionError: it leaves the model's folder, or is no portable path (``check_relative_path``).
    """
    try:
        return check_relative_path(subfolder.strip("/"), "the subfolder")
    except FormatError as error:
        raise OptionError(error.what, got=error.got, expected="a path inside of the model, such as transformer") from None


def address_of(model: str | Path) -> Address:
    """The address of a model, from a folder, a weight file, a repo id, ``owner/name@revision``, or an address of the hub.

    A file or folder of exactly that name on this machine comes first. Otherwise quotes and spaces around it are ignored.

    Raises:
        SourceError: it is none of these; says what it is, and what to do.
    """
    text = str(model)
    if (found := _local(text)) is not None:
        return found
    if (bare := text.strip().strip(_QUOTES).strip()) != text and bare:
        return address_of(bare)
    if (match := _SCHEME.fullmatch(text)) is not None:
        return _by_scheme(text, match["scheme"].lower(), match["rest"])
    if (match := _SSH.fullmatch(text)) is not None:
        return _by_scheme(text, "ssh", f"{match['host']}/{match['path']}")
    if text.split("/")[0].lower() in _HOSTS:
        return _by_url(text, text.partition("/")[2])
    if (match := _WINDOWS.match(text)) is not None:
        raise _windows_path(text, match["drive"])
    if (match := _WITH_REVISION.fullmatch(text)) is not None and _REPO_ID.fullmatch(match["repo"]):
        return _by_revision(text, match["repo"], match["rest"])
    repo_id = text.rstrip("/") if "/" in text.rstrip("/") else text
    if Path(text).suffix == SUFFIX and Path(text).parent.is_dir():  # a mistyped local file rather than a repo id
        raise SourceError(f"there is no file {text!r}", expected="a weight file, the folder of a model, or owner/name")
    if _REPO_ID.fullmatch(repo_id):
        return Address(repo_id=repo_id)
    raise SourceError(
        f"there is no folder {text!r}",
        expected="a local folder or a Hugging Face repo id such as owner/name",
        hint=_hint_of_path(text.rstrip("/").split("/")),
    )


def _hint_of_path(parts: list[str]) -> str | None:
    """A hint for a path that does not exist and is too long for a repo id: it may be a repo id with a subfolder."""
    if parts[0] == "models":
        parts = parts[1:]
    elif parts[0] in _NO_MODELS:
        return None
    repo, inside = "/".join(parts[:2]), PurePosixPath(*parts[2:])
    if len(parts) < 2 or not _REPO_ID.fullmatch(repo) or ".." in parts:
        return None
    subfolder = inside.parent if inside.suffix == SUFFIX else inside
    return f"for a hub model: {repo}" + (f" --subfolder {quoted(subfolder)}" if subfolder.parts else "")


def _local(text: str) -> Address | None:
    """The address of a file or folder on this machine; None if there is none. Raises SourceError."""
    try:
        path = Path(text).expanduser()
        is_folder, is_file = bool(text) and path.is_dir(), path.is_file()
        leads_to = path.readlink() if not is_folder and not is_file and path.is_symlink() else None
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~ of an unknown user, a null byte, or the disk fails
        hint = advice(error) if isinstance(error, OSError) else None
        raise SourceError(f"there is no folder {text[:100]!r}", got=str(error)[:200], hint=hint) from None
    if leads_to is not None:
        raise SourceError(
            f"{text} is a link that leads nowhere", got=leads_to, hint="make what it leads to, or give the folder of a model"
        )
    if is_folder:
        return Address(folder=path)
    if not is_file:
        return None
    if path.suffix == SUFFIX:
        return Address(folder=path.parent, file=path.name)
    with read_errors(path), open(path, "rb") as file:
        kind = None if path.suffix == ".json" else other_kind(file.read(HEAD_BYTES), path.stat().st_size, path)
    raise SourceError(
        f"{text} is {kind.what if kind else 'a file'}",
        expected="the folder of a model in safetensors, with its config.json",
        hint=kind.hint if kind else f"give {path.parent}",
    )


def _by_scheme(text: str, scheme: str, rest: str) -> Address:
    """The address for a URL, by its scheme and what comes after ``://``. Raises SourceError."""
    if scheme == "file":
        return address_of("/" + unquote(rest.lstrip("/").removeprefix("localhost/")))
    if scheme == "hf":
        kind, _, inside = rest.partition("/")
        if kind in _OTHER_REPOSITORIES:
            raise _no_model(text, kind)
        owner, _, name = (inside if kind == "models" else rest).strip("/").partition("/")
        repo, slash, path = name.partition("/")
        if "@" in repo:
            repo, _, rev = repo.partition("@")
            return _by_revision(text, f"{owner}/{repo}", rev + slash + path)
        if not name and "@" in owner:
            owner, _, rev = owner.partition("@")
            return _by_revision(text, owner, rev)
        return _inside(text, f"{owner}/{repo}" if name else owner, None, path)
    try:
        endpoint, url = urlsplit(os.environ.get("HF_ENDPOINT", "")), urlsplit(f"{scheme}://{rest}")
    except ValueError:  # half an IPv6 address
        _refuse(text)
    is_of_hub = url.hostname in _HOSTS or (url.netloc and url.netloc == endpoint.netloc)
    if is_of_hub and scheme in ("http", "https", "git+https", "ssh", "git+ssh"):
        return _by_url(text, url.path)
    if scheme in ("http", "https", "ftp", "git+https", "ssh", "git+ssh"):
        hint = "fetch the model into a folder first; models of the Hugging Face hub have addresses of huggingface.co"
    else:
        hint = f"fetch it into a folder first: {_STORES.get(scheme, 'copy')} {quoted(text)} FOLDER"
    raise SourceError(
        f"{text} is neither here nor on the Hugging Face hub",
        expected="a local folder or a Hugging Face repo id such as owner/name",
        hint=hint,
    )


def _by_url(text: str, path: str) -> Address:
    """The address for a page or a file of the hub, by the path of its URL."""
    parts = [unquote(part) for part in re.split("[?#]", path)[0].split("/") if part]
    if parts[:2] == ["api", "models"] or (parts[:1] == ["models"] and len(parts) > 2):
        parts = parts[2:] if parts[0] == "api" else parts[1:]
    if not parts or parts[0] in _NO_MODELS:
        raise _no_model(text, parts[0] if parts else "")
    count = 1 if len(parts) == 1 or parts[1] in (*_PAGES, "revision") else 2
    repo, page, rest = "/".join(parts[:count]).removesuffix(".git"), parts[count : count + 1], parts[count + 1 :]
    if not page:
        return _inside(text, repo, None, "")
    if page[0] not in (*_PAGES, "revision") or page[0] == "discussions" or not rest:
        raise SourceError(
            f"{text} is a page of {repo} that is no model",
            hint=f"give {repo}" + (f" --revision {quoted(f'refs/pr/{rest[0]}')}" if page[0] == "discussions" and rest else ""),
        )
    if rest[0] == "refs" and len(rest) > 2:
        rest = ["/".join(rest[:3]), *rest[3:]]
    inside = rest[1:] if page[0] in ("tree", *_OF_FILES) else []
    return _inside(text, repo, rest[0], "/".join(inside))


def _by_revision(text: str, repo: str, rest: str) -> Address:
    match = _REVISION.fullmatch(rest)
    if match is None:
        _refuse(text)
    return _inside(text, repo, unquote(match["revision"]), match["path"] or "")


def _inside(text: str, repo: str, revision: str | None, path: str) -> Address:
    """The address of the model at a path in a repository; the path of a file stands for the folder that it is in."""
    if not _REPO_ID.fullmatch(repo):
        _refuse(text)
    inside = PurePosixPath(path.strip("/"))
    file = None
    if inside.suffix == SUFFIX:
        file, inside = inside.name, inside.parent
    elif inside.suffix in (".json", ".md", ".txt", ".model", ".jinja", ".py"):
        inside = inside.parent
    elif inside.suffix in (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".zip"):
        raise SourceError(
            f"{text} is a file in another format than safetensors", hint=f"give {repo}, if it has its weights in safetensors"
        )
    subfolder = None if str(inside) == "." else str(inside)
    return Address(repo_id=repo, revision=revision, subfolder=subfolder, file=file)


def _refuse(text: str) -> NoReturn:
    raise SourceError(
        f"{text} names no model on the hub",
        expected="owner/name, owner/name@revision, or https://huggingface.co/owner/name/tree/revision/subfolder",
    )


def _no_model(text: str, kind: str) -> SourceError:
    what = f"is a page of {kind}" if kind else "is the hub itself"
    return SourceError(f"{text} {what}, and no model", expected="a model of the hub, such as owner/name")


def _windows_path(text: str, drive: str | None) -> SourceError:
    """The error for a path in the form of Windows that does not exist."""
    plain = text.replace("\\", "/")
    here = f"/mnt/{drive.lower()}{plain[2:]}" if drive else plain
    return SourceError(
        f"there is no folder {text!r}",
        got="a path as Windows writes it" if os.name != "nt" else None,
        expected="a local folder or a Hugging Face repo id such as owner/name",
        hint=None if os.name == "nt" else f"in WSL: {quoted(here)}" if drive else f"with slashes: {quoted(here)}",
    )
