"""A Hugging Face hub on this machine, enough of one for the official client.

Serves the folders given to ``publish`` as repositories; ``refuse`` makes one answer as the hub does for gated,
disabled or failing ones. Every request is recorded.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


@dataclass
class Repo:
    folder: Path
    commit: str
    branches: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None

    def knows(self, revision: str) -> bool:
        return revision == self.commit or revision in self.branches

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class LoopbackHub:
    def __init__(self) -> None:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes sent
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def publish(self, name: str, folder: Path) -> Repo:
        commit = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo(folder, commit, {"main": commit})
        return self.repos[name]

    def refuse(self, name: str, status: int, code: str) -> None:
        self.repos[name] = Repo(Path(), "0" * 40, {"main": "0" * 40}, (status, code))


class _Handler(BaseHTTPRequestHandler):
    owner: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        repo = self.owner.repos.get(match["repo"]) if match else None
        if match is None or repo is None:
            self._error(404, "RepoNotFound")
        elif repo.refusal is not None:
            self._error(*repo.refusal)
        elif match["rev"] is not None and not repo.knows(match["rev"]):
            self._error(404, "RevisionNotFound")
        elif "file" in match.groupdict():
            self._file(repo, match["file"], body)
        elif match["what"] == "tree":
            self._json([self._described(repo, path) for path in repo.files()], body)
        else:
            names = [{"rfilename": path.relative_to(repo.folder).as_posix()} for path in repo.files()]
            self._json({"id": match["repo"], "sha": repo.commit, "siblings": names, "private": False, "tags": []}, body)

    def _described(self, repo: Repo, path: Path) -> dict[str, object]:
        size = path.stat().st_size
        described: dict[str, object] = {
            "type": "file",
            "path": path.relative_to(repo.folder).as_posix(),
            "size": size,
            "oid": _blob(path),
        }
        if path.suffix == ".safetensors":
            described["lfs"] = {"oid": hashlib.sha256(path.read_bytes()).hexdigest(), "size": size, "pointerSize": 130}
        return described

    def _file(self, repo: Repo, name: str, body: bool) -> None:
        path = repo.folder / name
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        data, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        etag = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else _blob(path)
        headers["ETag"] = f'"{etag}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, headers, body)

    def _json(self, value: object, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _error(self, status: int, code: str) -> None:
        message = "Access to this resource is disabled." if code == "DisabledRepo" else code
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message}, False)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.owner.requests.append((self.command, self.path, len(data) if body else 0))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
