"""A small Hugging Face Hub on 127.0.0.1 that also hosts plain files, for tests of the real client.

It keeps repositories in memory, answers as the Hub does (weights by a redirect to another origin, failures by
``X-Error-Code``), takes uploads, logs every request, and goes wrong on demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    token: str | None

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass
class Fault:
    """What goes wrong with requests whose path contains ``part``, ``times`` times."""

    part: str
    method: str
    status: int
    code: str
    message: str
    cut: int | None
    shorten: int | None
    times: int


class HubServer:
    """The server: two origins, one for the Hub and one, as the Hub has it, for the content of large files.

    Attributes:
        url: of the Hub.
        requests: every request so far.
        files: path -> content of plain files, beside the repositories.
        serves_ranges: whether a request for a range is honoured.
        on_request: called with each request before it is answered.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.files: dict[str, bytes] = {}
        self.serves_ranges = True
        self.on_request: Callable[[Request], None] = lambda request: None
        self._revisions: dict[str, dict[str, str]] = {}  # repository -> revision -> commit
        self._commits: dict[str, dict[str, bytes]] = {}
        self._blobs: dict[str, bytes] = {}  # sha256 -> content
        self._faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse every connection from now on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def publish(self, repository: str, content: Path | Mapping[str, bytes], revision: str = "main") -> str:
        """Commit files, or those of a folder, as a revision of a repository; return the commit."""
        files = {f.name: f.read_bytes() for f in content.iterdir()} if isinstance(content, Path) else dict(content)
        commit = hashlib.sha1(repr((repository, revision, sorted(files.items()))).encode()).hexdigest()
        self._commits[commit] = files
        self._blobs |= {hashlib.sha256(body).hexdigest(): body for body in files.values()}
        self._revisions.setdefault(repository, {}).update({revision: commit, commit: commit})
        return commit

    def content(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return self._commits[self._revisions[repository][revision]]

    def fail(
        self,
        part: str = "",
        status: int = 200,
        code: str = "",
        message: str = "",
        cut: int | None = None,
        shorten: int | None = None,
        method: str = "",
        times: int = sys.maxsize,
    ) -> None:
        """Go wrong with requests whose path contains ``part`` and, if given, of one method.

        A status other than 200 is answered with ``code`` and ``message`` in the headers; 0 is no answer at all. With
        ``cut`` the answer is the right one, but the connection is closed after that many bytes of the body;
        with ``shorten`` its headers, too, claim that these are all.
        """
        self._faults.append(Fault(part, method, status, code, message, cut, shorten, times))

    def heal(self) -> None:
        """Stop going wrong."""
        self._faults.clear()

    def asked(self, method: str = "") -> list[str]:
        """The last part of the paths asked for so far."""
        return [r.file for r in self.requests if r.method == method or not method]

    def fault_for(self, request: Request) -> Fault | None:
        for fault in self._faults:
            if fault.part in request.path and fault.method in ("", request.method) and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def find(self, repository: str, revision: str, file: str) -> tuple[str, bytes] | str | None:
        """A file's commit and content; its commit if that lacks it; None if there is no such revision."""
        commit = self._revisions[repository].get(revision)
        if commit is None:
            return None
        content = self._commits[commit].get(file)
        return commit if content is None else (commit, content)

    def has(self, repository: str) -> bool:
        return repository in self._revisions

    def create(self, repository: str) -> bool:
        """Make an empty repository; False if there is one already."""
        if self.has(repository):
            return False
        self.publish(repository, {})
        return True

    def blob(self, sha256: str) -> bytes | None:
        return self._blobs.get(sha256)

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self._blobs[sha256] = content
        return sha256


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; HTTP/1.0, so that each has a connection of its own."""

    hub: HubServer

    def do_GET(self) -> None:
        request = Request(self.command, urlsplit(self.path).path, self.headers["Range"], self._token())
        self.hub.requests.append(request)
        self.hub.on_request(request)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.fault = fault = self.hub.fault_for(request)
        if fault and fault.status == 0:
            return
        if fault and fault.status != 200:
            self._send(fault.status, {"X-Error-Code": fault.code, "X-Error-Message": fault.message})
        elif request.method in ("GET", "HEAD"):
            self._download(request)
        else:
            self._upload(request, body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _token(self) -> str | None:
        value = self.headers["Authorization"]
        return value.removeprefix("Bearer ") if value else None

    def _download(self, request: Request) -> None:
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
            self._resolve(*map(unquote, found.groups()))  # a revision may hold slashes
        elif found := re.fullmatch(r"/api/models/(.+)/tree/main", request.path):
            self._send_json([_listed(*file) for file in self.hub.content(found[1]).items()])
        elif found := re.fullmatch(r"/api/models/(.+)/revision/main", request.path):
            self._send_json({"id": found[1], "xetEnabled": False})
        elif found := re.fullmatch(r"/storage/(\w+)/.+", request.path):
            self._send_file(self.hub.blob(found[1]))
        else:
            self._send_file(self.hub.files.get(request.path))

    def _resolve(self, repository: str, revision: str, file: str) -> None:
        if not self.hub.has(repository):
            self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        found = self.hub.find(repository, revision, file)
        if found is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        elif isinstance(found, str):
            self._send(
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": found},
            )
        else:
            self._send_entry(file, *found)

    def _send_entry(self, file: str, commit: str, content: bytes) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        if not file.endswith(".safetensors"):
            self._send_file(content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            return
        self._send(
            302,
            {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.storage_url}/storage/{sha256}/{file}",
            },
        )

    def _send_file(self, content: bytes | None, headers: Mapping[str, str] | None = None) -> None:
        if content is None:
            self._send(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if wanted is None or not self.hub.serves_ranges:
            self._send(200, headers, content)
            return
        start, size = int(wanted[1]), len(content)
        if start >= size:
            self._send(416, {"Content-Range": f"bytes */{size}"})
        else:
            self._send(206, {"Content-Range": f"bytes {start}-{size - 1}/{size}"}, content[start:])

    def _upload(self, request: Request, body: bytes) -> None:
        if request.method == "PUT":
            self.hub.store(body)
            self._send(200)
        elif request.path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif request.path == "/api/repos/create":
            self._create(json.loads(body))
        elif re.fullmatch(r"/api/models/.+/preupload/main", request.path):
            self._send_json({"files": [_upload_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif request.path.endswith(".git/info/lfs/objects/batch"):
            self._send_json(
                {"transfer": "basic", "objects": [self._lfs_action(o) for o in json.loads(body)["objects"]]}
            )
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", request.path):
            self._commit(found[1], body)
        else:
            self._send(404)

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}"
        created = self.hub.create(repository)
        self._send_json({"url": f"{self.hub.url}/{repository}"}, 200 if created else 409)

    def _lfs_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if self.hub.blob(wanted["oid"]) is None:
            entry["actions"] = {"upload": {"href": f"{self.hub.storage_url}/upload/{wanted['oid']}"}}
        return entry

    def _commit(self, repository: str, body: bytes) -> None:
        files = dict(self.hub.content(repository))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blob(value["oid"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.publish(repository, files)
        self._send_json({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repository}/commit/{commit}"})

    def _send_json(self, content: Any, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        cut = self.fault.cut if self.fault else None
        body = body[: self.fault.shorten] if self.fault else body
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])

    def log_message(self, *_: object) -> None:
        pass


def _listed(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
