"""A stand-in for the hub on this machine: enough of its HTTP to fetch and to push repositories.

It keeps every repository as a folder below its root, with one revision, and speaks to the real
`huggingface_hub` through `HF_ENDPOINT`.
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

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    root: Path

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if match := re.match(r"/api/models/([^/]+/[^/]+)/(revision|tree)/", self.path):
            folder = self.root / match[1]
            if not folder.is_dir():
                return self.answer(404, {"error": "Repository not found"}, RepoNotFound=True)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(folder)) for path in files]
            if match[2] == "tree":
                listed = [
                    {
                        "type": "file",
                        "path": name,
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for name, path in zip(names, files, strict=True)
                ]
                return self.answer(200, listed)
            siblings = [{"rfilename": name} for name in names]
            return self.answer(200, {"id": match[1], "sha": COMMIT, "siblings": siblings})
        if match := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            path = self.root / match[1] / match[2]
            if path.is_file():
                return self.answer_file(path.read_bytes())
        return self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        if self.headers.get("Authorization") != "Bearer stand-in":
            return self.answer(401, {"error": "Invalid user token."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": self.url(name), "id": name, "name": name})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in body.decode().splitlines():
                each = json.loads(line)
                if each["key"] == "file":
                    path = self.root / match[1] / each["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(each["value"]["content"]))
            url = f"{self.url(match[1])}/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        if self.path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        return self.answer(404, {"error": f"no such page: {self.path}"})

    def read_chunks(self) -> bytes:
        chunks = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def url(self, name: str) -> str:
        return f"http://{self.headers['Host']}/{name}"

    def answer(self, status: int, content: Any, *, RepoNotFound: bool = False) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if RepoNotFound:
            self.send_header("X-Error-Code", "RepoNotFound")
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


@contextmanager
def hub(root: Path, kind: type[Hub] = Hub) -> Iterator[dict[str, str]]:
    """Serve the repositories below `root`; gives the environment that makes a process use it."""
    handler = type("Here", (kind,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "stand-in",
            "HF_HOME": str(root.parent / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
    finally:
        server.shutdown()
        server.server_close()
