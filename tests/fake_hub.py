"""A stand-in for the Hugging Face Hub: the real `huggingface_hub` client talks to it over real HTTP.

    with FakeHub() as hub:
        hub.add("org/model", folder)                       # one commit, at `main`
        hub.add("org/model", newer, ref="v2")              # another commit, another branch
        hub.add("datasets/org/texts", texts)               # a dataset
        hub.gate("org/model")                              # files answer 401 or 403, the listing does not
        hub.fail("model.safetensors", cut_at=1000)         # once, then well again
        hub.served("model.safetensors")                    # bytes of bodies sent for paths with that text

The client reads HF_ENDPOINT when it is imported, so tests/conftest.py starts one server for the whole session
before anything imports the client; tests use its `fake_hub` fixture, which is emptied for each test. A test
that runs the command line in a subprocess inherits the same environment.

What it speaks is what the client asks (huggingface_hub 2.4): model info, the file tree, and `resolve` with
HEAD, Range, ETags and a redirect to a "CDN" path for LFS files, with the error headers that the client's own
exceptions are made from.
A later room that pushes adds its routes to `ROUTES`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_fakeFAKEfakeFAKEfakeFAKE"  # the one token this Hub knows
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt")


@dataclass
class Entry:
    """One file of a commit, with the names the Hub gives its content."""

    path: Path
    size: int
    blob_id: str
    sha256: str | None  # LFS files only

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id

    def tree_row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": name, "size": self.size, "oid": self.blob_id}
        if self.sha256:
            row["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return row


@dataclass
class Repo:
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lies: list[dict[str, Any]] = field(default_factory=list)  # tree rows that no file stands behind
    gated: bool = False
    private: bool = False
    allowed: bool = True  # whether TOKEN may read a gated repo

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens, `times` times, to requests whose path holds `text`."""

    text: str
    method: str
    times: int
    status: int | None = None
    cut_at: int | None = None
    body: bytes | None = None
    ignore_range: bool = False

    @property
    def spoils_body(self) -> bool:
        return self.cut_at is not None or self.ignore_range


@dataclass
class Sent:
    method: str
    path: str
    status: int
    body_bytes: int
    authorization: str | None


class FakeHub:
    """Repos by id, faults to come, and a record of what was asked and sent."""

    def __init__(self, repos: dict[str, Path] | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.record: list[Sent] = []
        self.lock = threading.Lock()
        self._commits = itertools.count()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        port = self._server.server_address[1]
        # Two names for one server: to the client the CDN is another host, to which no token may go.
        self.url, self.cdn_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        for repo_id, folder in (repos or {}).items():
            self.add(repo_id, folder)

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        self.repos, self.faults, self.record = {}, [], []

    def add(self, repo_id: str, folder: Path, ref: str = "main", lies: list[dict[str, Any]] | None = None) -> str:
        """Makes a commit of the folder's files and returns its sha, which no other commit has."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.lies = lies or []
        files = {p.relative_to(folder).as_posix(): entry(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        rows = [e.tree_row(n) for n, e in files.items()] + repo.lies
        # Without the number the client would know a commit of an earlier test from its memory.
        sha = hashlib.sha1(json.dumps([repo_id, rows, next(self._commits)]).encode()).hexdigest()
        repo.commits[sha], repo.refs[ref] = files, sha
        return sha

    def gate(self, repo_id: str, allowed: bool = True) -> None:
        self.repos[repo_id].gated, self.repos[repo_id].allowed = True, allowed

    def fail(self, text: str, *, method: str = "GET", times: int = 1, **what: Any) -> None:
        """what: status=503, cut_at=bytes, body=b"instead", ignore_range=True."""
        self.faults.append(Fault(text, method, times, **what))

    def served(self, text: str = "") -> int:
        return sum(s.body_bytes for s in self.record if text in s.path)

    def requests(self, text: str = "", method: str | None = None) -> list[Sent]:
        return [s for s in self.record if text in s.path and method in (None, s.method)]

    def take_fault(self, method: str, path: str, in_body: bool) -> Fault | None:
        """`in_body` tells faults of a file's bytes (cut_at, ignore_range) from those replacing the answer."""
        with self.lock:
            for fault in self.faults:
                fits = fault.text in path and fault.method == method and fault.spoils_body == in_body
                if fits and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def entry(path: Path) -> Entry:
    data = path.read_bytes()
    blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = hashlib.sha256(data).hexdigest() if path.suffix in LFS_SUFFIXES else None
    return Entry(path, len(data), blob_id, lfs)


class Handler(BaseHTTPRequestHandler):
    """Finds the route, and knows how to send bytes: whole, in part, or cut short."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.take_fault(self.command, path, in_body=False)
        if fault and fault.status:
            return self.send(fault.status, fault.body or b"", {"Content-Type": "text/plain"})
        if fault and fault.body is not None:
            return self.send(200, fault.body, {"Content-Type": "text/html"})
        for method, pattern, answer in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return answer(self, **match.groupdict())
        return self.send(404, b'{"error": "Not Found"}')

    do_HEAD = do_GET
    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut_at: int | None = None) -> None:
        """cut_at: promises the whole body, sends that many bytes and hangs up."""
        shown = b"" if self.command == "HEAD" else body[:cut_at]
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.record.append(Sent(self.command, path, status, len(shown), self.headers.get("Authorization")))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(shown)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # a client that has read enough may hang up
        if cut_at is not None:
            self.close_connection = True

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), headers | {"Content-Type": "application/json"})

    def find(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        """The repo and its commit, or None after the refusal has been sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token != TOKEN):
            # The real Hub tells strangers the same of missing and of private repos.
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            return self.refuse(status, "RepoNotFound" if token else None, message)
        commit = repo.commit(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit


def model_info(http: Handler, repo_id: str, revision: str | None = None) -> None:
    if found := http.find(repo_id, revision or "main"):
        repo, commit = found
        rows = [{"rfilename": name} for name in repo.commits[commit]]
        gated = "manual" if repo.gated else False
        name = repo_id.removeprefix("datasets/")
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "gated": gated, "tags": []}
        http.send_json(info | {"private": repo.private, "siblings": rows})


def tree(http: Handler, repo_id: str, revision: str) -> None:
    if found := http.find(repo_id, revision):
        repo, commit = found
        http.send_json([e.tree_row(name) for name, e in repo.commits[commit].items()] + repo.lies)


def resolve(http: Handler, repo_id: str, revision: str, name: str) -> None:
    found = http.find(repo_id, revision)
    if not found:
        return None
    repo, commit = found
    token = http.headers.get("Authorization")
    if repo.gated and not (token and repo.allowed):
        return http.refuse(403 if token else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
    file = repo.commits[commit].get(name)
    if file is None:
        return http.refuse(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
    if file.sha256:
        linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.etag}"'}
        location = {"Location": f"{http.hub.cdn_url}/cdn/{repo_id}/{commit}/{name}"}
        return http.send(302, b"", headers | linked | location)
    return send_file(http, file, headers)


def cdn(http: Handler, repo_id: str, revision: str, name: str) -> None:
    file = http.hub.repos[repo_id].commits[revision][name]
    send_file(http, file, {"ETag": f'"{file.etag}"'})


def send_file(http: Handler, file: Entry, headers: dict[str, str]) -> None:
    fault = http.hub.take_fault(http.command, unquote(urlsplit(http.path).path), in_body=True)
    first, last, status = 0, file.size - 1, 200
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", http.headers.get("Range") or "")
    if wanted and not (fault and fault.ignore_range):
        first, last = int(wanted[1]), min(int(wanted[2] or file.size - 1), file.size - 1)
        if first >= file.size:
            return http.send(416, b"", {"Content-Range": f"bytes */{file.size}"})
        headers = headers | {"Content-Range": f"bytes {first}-{last}/{file.size}"}
        status = 206
    with file.path.open("rb") as opened:
        opened.seek(first)
        body = opened.read(last + 1 - first)
    return http.send(status, body, headers | {"Accept-Ranges": "bytes"}, cut_at=fault.cut_at if fault else None)


# A dataset's pages, files and entry in `repos` begin with datasets/, its API has it where a model's says models/.
REPO = r"(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/)?{REPO}"
# The revision may hold slashes (refs/pr/1): the client quotes them, and they come here unquoted.
REVISION = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", API, model_info),
    ("GET", rf"{API}/revision/{REVISION}", model_info),
    ("GET", rf"{API}/tree/{REVISION}", tree),
    ("HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<name>.+)", resolve),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<name>.+)", resolve),
    ("HEAD", rf"/cdn/{REPO}/(?P<revision>[^/]+)/(?P<name>.+)", cdn),
    ("GET", rf"/cdn/{REPO}/(?P<revision>[^/]+)/(?P<name>.+)", cdn),
]
