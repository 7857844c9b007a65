"""A Hugging Face hub on this machine, enough of one for the official client.

Serves the folders given to ``publish`` as repositories, and takes uploads (LFS, not Xet) into these and into ones that the
client makes; ``refuse`` makes one answer as the hub does for gated, disabled or failing ones. Every request is recorded, and
so is every commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info|preupload|commit|auth-check)/(?P<rev>[^/]+))?"
)
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(?P<what>resolve)/(?P<rev>[^/]+)/(?P<file>.+)")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<what>batch)")

#: Two of the same user: what may be done with the first, and with any other.
WRITING_TOKEN = "hf_may_write"
READING_TOKEN = "hf_may_read"
_LICENSES = ("apache-2.0", "mit", "llama3", "other", "brand-new-1.0")


@dataclass
class Commit:
    """What a commit has made of its repository: the sha256 of each file."""

    message: str
    files: dict[str, str]


@dataclass
class Repo:
    folder: Path
    commit: str
    branches: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    private: bool = False
    corrupted: set[str] = field(default_factory=set)  # files whose last byte changes on the way
    ignores_ranges: bool = False
    page_size: int = 1000  # of its listing
    by_xet: bool = False  # whether the listing says so of large files
    history: list[Commit] = field(default_factory=list)
    hashes: dict[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict)  # with what the file was known by
    pages: list[object] | None = None  # of the listing, in the place of the true one; endless if the last is ...

    def knows(self, revision: str) -> bool:
        return revision == self.commit or revision in self.branches

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def card(self) -> dict[str, object]:
        card = self.folder / "README.md"
        return _front_matter(card.read_text()) if card.is_file() else {}

    def _hash(self, path: Path) -> str:
        """The sha256, taken anew where the file has changed: commits of thousands of files are many."""
        found = path.stat()
        state = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if path not in self.hashes or self.hashes[path][0] != state:
            self.hashes[path] = state, _sha256(path.read_bytes())
        return self.hashes[path][1]

    def apply(self, message: str, changes: dict[str, bytes | None]) -> None:
        """Make a commit."""
        for name, data in changes.items():
            path = self.folder / name
            if data is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self.hashes.pop(path, None)
        files = {path.relative_to(self.folder).as_posix(): self._hash(path) for path in self.files()}
        self.history.append(Commit(message, files))
        self.commit = hashlib.sha1(f"{self.commit} {message} {files}".encode()).hexdigest()
        self.branches["main"] = self.commit


@dataclass
class _Failure:
    count: int
    status: int
    part: str
    done_all_the_same: bool


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer: a status in its place, or a body that does not come to its end.

    Attributes:
        status: answered instead, with ``headers``; None: the answer is begun.
        after: how many bytes of the body come.
        how: and then: ``cut`` closes the connection, ``reset`` breaks it, ``stall`` leaves it open and silent, ``chunked`` cuts
            an answer in chunks, ``quiet`` ends one that has not said how long it is.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    how: str = "cut"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has read enough hangs up
            super().handle_error(request, client_address)


class LoopbackHub:
    def __init__(self) -> None:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes sent
        self.blobs: dict[str, bytes] = {}  # by sha256: what has been uploaded, committed or not
        self.received: list[str] = []  # sha256 of each upload
        self.gate = threading.Event()  # uploads wait while it is cleared
        self.gate.set()
        self.over = threading.Event()  # ends the answers that stall
        self.meanwhile: dict[str, Callable[[], None]] = {}  # part of a path: called once, just before the answer goes out
        self.links_to: str | None = None  # the host that links to further pages name, if not this one
        self._failures: list[_Failure] = []
        self._faults: dict[str, Iterator[Fault | None]] = {}
        self._one = threading.Lock()
        self._root = tempfile.TemporaryDirectory(prefix="surgery-test-hub-")
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def publish(self, name: str, folder: Path) -> Repo:
        commit = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo(folder, commit, {"main": commit})
        return self.repos[name]

    def refuse(self, name: str, status: int, code: str) -> None:
        self.repos[name] = Repo(Path(), "0" * 40, {"main": "0" * 40}, (status, code))

    def described(self, repo: Repo) -> list[dict[str, object]]:
        """The listing of a repository as it is."""
        return [_described(repo, path) for path in repo.files()]

    def create(self, name: str, *, private: bool) -> Repo:
        """A new repository, with the one file that the hub puts there."""
        folder = Path(self._root.name, name)
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        repo = self.publish(name, folder)
        repo.private = private
        return repo

    def fail_next(self, count: int, status: int, part: str = "", *, done_all_the_same: bool = False) -> None:
        """Fail so many of the coming POST and PUT requests whose paths have this part, before or after doing what they ask."""
        self._failures.append(_Failure(count, status, part, done_all_the_same))

    def disturb(self, part: str, faults: Iterable[Fault | None]) -> None:
        """What goes wrong with the coming GET and HEAD requests whose addresses have this part, one after the other; None:
        nothing. After the last all go well again."""
        self._faults[part] = iter(faults)

    def fault(self, address: str) -> Fault | None:
        with self._one:
            for part, faults in self._faults.items():
                if part in address:
                    return next(faults, None)
        return None

    def failing(self, path: str) -> _Failure | None:
        for failure in self._failures:
            if failure.count > 0 and failure.part in path:
                failure.count -= 1
                return failure
        return None


class _Handler(BaseHTTPRequestHandler):
    owner: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms
    status_instead: int | None = None
    fault: Fault | None = None

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fault = self.owner.fault(self.path)
        if self.fault is not None and self.fault.status is not None:
            self._send(self.fault.status, b"", {"X-Error-Message": "", **self.fault.headers}, False)
            return
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        repo = self.owner.repos.get(match["repo"]) if match else None
        if match is None or repo is None:
            self._error(404, "RepoNotFound")
        elif repo.refusal is not None:
            self._error(*repo.refusal)
        elif repo.private and "Authorization" not in self.headers:
            self._error(401, "")
        elif match["what"] == "auth-check":
            if self._may_write():
                self._json({}, body)
        elif match["rev"] is not None and not repo.knows(match["rev"]):
            self._error(404, "RevisionNotFound")
        elif match["what"] == "resolve":
            self._file(repo, match["file"], body)
        elif match["what"] == "tree":
            self._tree(repo, body)
        else:
            names = [{"rfilename": path.relative_to(repo.folder).as_posix()} for path in repo.files()]
            tags = repo.card().get("tags", [])
            self._json(
                {"id": match["repo"], "sha": repo.commit, "siblings": names, "private": repo.private, "tags": tags}, body
            )

    def _tree(self, repo: Repo, body: bool) -> None:
        """A page of the listing, with a link to the next one."""
        asked = urlsplit(self.path)
        number = int(parse_qs(asked.query).get("cursor", ["0"])[0])
        files = repo.files()
        pages = repo.pages or [files[at : at + repo.page_size] for at in range(0, len(files), repo.page_size)] or [[]]
        endless = pages[-1] is ...
        pages = pages[:-1] if endless else pages
        page = pages[min(number, len(pages) - 1)]
        if repo.pages is None and isinstance(page, list):
            page = [_described(repo, path) for path in page]
        data = page if isinstance(page, bytes) else json.dumps(page).encode()
        headers = {"Content-Type": "application/json"}
        if endless or number + 1 < len(pages):
            headers["Link"] = f'<{self.owner.links_to or self.owner.url}{asked.path}?cursor={number + 1}>; rel="next"'
        self._send(200, data, headers, body)

    def do_PUT(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def _take(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self._body()
        failure = self.owner.failing(path)
        if failure is not None and not failure.done_all_the_same:
            self._error(failure.status, "")
            return
        self.status_instead = None if failure is None else failure.status
        if path == "/api/validate-yaml":
            self._validate(json.loads(data)["content"])
        elif path.startswith("/lfs/"):
            self._upload(path.removeprefix("/lfs/"), data)
        elif self._may_write():
            match = _API.fullmatch(path) or _BATCH.fullmatch(path)
            repo = self.owner.repos.get(match["repo"]) if match else None
            if path == "/api/repos/create":
                self._create(json.loads(data))
            elif match is None or repo is None:
                self._error(404, "RepoNotFound")
            elif match["what"] == "paths-info":
                paths = [repo.folder / name for name in parse_qs(data.decode())["paths"]]
                self._json([_described(repo, path) for path in paths if path.is_file()], True)
            elif match["what"] == "batch":
                self._json({"transfer": "basic", "objects": [self._action(item) for item in json.loads(data)["objects"]]}, True)
            elif match["what"] == "preupload":
                self._json({"files": self._modes(repo, json.loads(data))}, True)
            else:
                self._commit(match["repo"], repo, [json.loads(line) for line in data.splitlines()])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _may_write(self) -> bool:
        """Whether the token is good for it; says so if not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != WRITING_TOKEN:
            self._error(403 if token == READING_TOKEN else 401, "")
        return token == WRITING_TOKEN

    def _create(self, asked: dict[str, str | None]) -> None:
        name = f"{asked['organization'] or 'acme'}/{asked['name']}"
        there = name in self.owner.repos
        if not there:
            # Older clients say the one, newer ones the other.
            self.owner.create(name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self._json({"url": f"{self.owner.url}/{name}"}, True, 409 if there else 200)

    def _validate(self, card: str) -> None:
        try:
            wrong = _front_matter(card).get("license", "other") not in _LICENSES
        except yaml.YAMLError:
            wrong = True
        errors = [{"message": '"license" must be one of ' + ", ".join(_LICENSES)}] if wrong else []
        self._json({"errors": errors, "warnings": []}, True, 400 if wrong else 200)

    def _modes(self, repo: Repo, asked: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
        """How each file is to be uploaded, and whether git ignores it."""
        ignored = repo.folder / ".gitignore"
        rules = str(asked.get("gitIgnore") or (ignored.read_text() if ignored.is_file() else "")).split()
        modes = []
        for file in asked["files"]:
            name = str(file["path"])
            path = repo.folder / name
            mode = "lfs" if _is_lfs(name) else "regular"
            ours = None if not path.is_file() else _sha256(path.read_bytes()) if mode == "lfs" else _blob(path)
            ignore = any(fnmatch(name, rule) for rule in rules)
            modes.append({"path": name, "uploadMode": mode, "shouldIgnore": ignore, "oid": ours})
        return modes

    def _action(self, item: dict[str, object]) -> dict[str, object]:
        if item["oid"] in self.owner.blobs:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.owner.url}/lfs/{item['oid']}"}}}

    def _upload(self, oid: str, data: bytes) -> None:
        self.owner.gate.wait(timeout=30)
        if _sha256(data) != oid:
            self._error(400, "")
            return
        self.owner.received.append(oid)
        self.owner.blobs[oid] = data
        self._send(200, b"", {}, True)

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, dict[str, str]]]) -> None:
        head, changes = lines[0]["value"], dict[str, bytes | None]()
        if head.get("parentCommit") not in (None, repo.commit):
            self._error(412, "")
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.owner.blobs[value["oid"]]
            elif line["key"] == "deletedFile" and (repo.folder / value["path"]).is_file():
                changes[value["path"]] = None
            else:
                self._error(404, "EntryNotFound")
                return
        repo.apply(head["summary"], changes)
        self._json({"commitUrl": f"{self.owner.url}/{name}/commit/{repo.commit}", "commitOid": repo.commit}, True)

    def _file(self, repo: Repo, name: str, body: bool) -> None:
        path = repo.folder / name
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        data, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        etag = _sha256(data) if _is_lfs(path.name) else _blob(path)
        headers["ETag"] = f'"{etag}"'
        if name in repo.corrupted:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not repo.ignores_ranges:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, headers, body)

    def _json(self, value: object, body: bool, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _error(self, status: int, code: str) -> None:
        message = "Access to this resource is disabled." if code == "DisabledRepo" else code
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message}, False)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.owner.requests.append((self.command, self.path, len(data) if body else 0))
        for part in [part for part in self.owner.meanwhile if part in self.path]:
            self.owner.meanwhile.pop(part)()
        self.send_response(self.status_instead or status)
        self.status_instead = None
        fault, self.fault = self.fault, None
        length = {"Content-Length": str(len(data))}
        if fault is not None and fault.status is None:
            self.close_connection = True
            length = {"chunked": {"Transfer-Encoding": "chunked"}, "quiet": {"Connection": "close"}}.get(fault.how, length)
        for name, value in {**length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault is not None and fault.status is None:
            self._break_off(data[: fault.after], fault.how)
        elif body:
            self.wfile.write(data)

    def _break_off(self, data: bytes, how: str) -> None:
        if how == "chunked":
            data = b"%x\r\n%s\r\n" % (len(data), data) if data else b""
        self.wfile.write(data)
        self.wfile.flush()
        if how == "stall":
            self.owner.over.wait(timeout=30)
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _described(repo: Repo, path: Path) -> dict[str, object]:
    size = path.stat().st_size
    described: dict[str, object] = {
        "type": "file",
        "path": path.relative_to(repo.folder).as_posix(),
        "size": size,
        "oid": _blob(path),
    }
    if _is_lfs(path.name):
        described["lfs"] = {"oid": _sha256(path.read_bytes()), "size": size, "pointerSize": 130}
        if repo.by_xet:
            described["xetHash"] = _sha256(b"some other hash")
    return described


def _is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _front_matter(card: str) -> dict[str, object]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def _blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
