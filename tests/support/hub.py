"""A stand-in for the hub on this machine: enough of its HTTP to fetch and to push repositories.

It keeps every repository as a folder below its root, with one revision, and speaks to the real
`huggingface_hub` through `HF_ENDPOINT`. As on the hub, files of tensors travel by LFS: they are put to a
store by their sha256, and a download of one is sent on to that store.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

COMMIT = "a" * 40
REVISIONS = ("main", COMMIT)
TOKEN = "stand-in"
LFS = (".bin", ".safetensors")


class Hub(BaseHTTPRequestHandler):
    root: Path
    stored: dict[str, bytes]  # LFS objects by sha256
    private: set[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if match := re.match(r"/store/(\w+)", self.path):
            return self.answer_file(self.stored[match[1]])
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            return self.refuse_token()
        path = self.path.split("?")[0]
        match = re.match(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?$", path)
        match = match or re.match(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if match is None:
            return self.answer(404, {"error": "not found"})
        folder = self.root / match[1]
        hidden = match[1] in self.private and "Authorization" not in self.headers
        if not folder.is_dir() or hidden:
            return self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        if match[3] not in (None, *REVISIONS):
            return self.answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        if match[2] == "resolve":
            return self.resolve(folder / match[4])
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if match[2] == "tree":
            return self.answer(200, [entry(folder, file) for file in files])
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        return self.answer(200, {"id": match[1], "sha": COMMIT, "siblings": siblings})

    def resolve(self, file: Path) -> None:
        if not file.is_file():
            return self.answer(404, {"error": "Entry not found"}, code="EntryNotFound")
        data = file.read_bytes()
        if file.suffix not in LFS:
            return self.answer_file(data)
        digest = hashlib.sha256(data).hexdigest()
        self.stored[digest] = data
        self.send_response(302)
        self.send_header("Location", self.url(f"store/{digest}"))
        self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def do_PUT(self) -> None:
        """An LFS object, to the address that the batch request gave."""
        data = self.read_body()
        digest = self.path.removeprefix("/store/")
        if hashlib.sha256(data).hexdigest() != digest:
            return self.answer(400, {"error": "other content than announced"})
        self.stored[digest] = data
        return self.answer(200, {})

    def do_POST(self) -> None:
        body = self.read_body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse_token()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            return self.answer(200, {"url": self.url(name), "id": name, "name": name})
        if re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.batched(each) for each in json.loads(body)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            return self.commit(match[1], body)
        if self.path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        return self.answer(404, {"error": f"no such page: {self.path}"})

    def batched(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.stored:
            return asked
        return {**asked, "actions": {"upload": {"href": self.url(f"store/{asked['oid']}")}}}

    def commit(self, name: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "header":
                if value.get("parentCommit") not in (None, COMMIT):
                    return self.answer(412, {"error": "A commit has happened since."})
                continue
            path = self.root / name / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if each["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif each["key"] == "lfsFile" and value["oid"] in self.stored:
                path.write_bytes(self.stored[value["oid"]])
            else:
                return self.answer(400, {"error": f"{each['key']} cannot be committed"})
        url = f"{self.url(name)}/commit/{COMMIT}"
        return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length:
            return self.rfile.read(int(length))
        chunks = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def url(self, name: str) -> str:
        return f"http://{self.headers['Host']}/{name}"

    def refuse_token(self) -> None:
        self.answer(401, {"error": "Invalid user token."})

    def answer(self, status: int, content: Any, *, code: str | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_file(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entry(folder: Path, file: Path) -> dict[str, Any]:
    """A file in the listing of a repository."""
    data = file.read_bytes()
    told = {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
    }
    if file.suffix in LFS:
        digest = hashlib.sha256(data).hexdigest()
        told["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return told


@contextmanager
def hub(root: Path, kind: type[Hub] = Hub) -> Iterator[dict[str, str]]:
    """Serve the repositories below `root`; gives the environment that makes a process use it."""
    fresh: dict[str, Any] = {"root": root, "stored": {}, "private": set()}
    handler = type("Here", (kind,), fresh)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(root.parent / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub_for_this_process(root: Path, kind: type[Hub] = Hub) -> Iterator[Path]:
    """The same for the process that asks, whose `huggingface_hub` has read the environment already."""
    root.mkdir(exist_ok=True)
    with hub(root, kind) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        address = environment["HF_ENDPOINT"]
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(root.parent / "cache"),
        }.items():
            patch.setattr(huggingface_hub.constants, name, value)
        yield root
