"""The stand-in hub's data sets: what `datasets.load_dataset` asks for, whole or streamed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.support.hub import COMMIT, Hub

NAME = r"([^/]+/[^/]+)"


class DatasetHub(Hub):
    """Serves data sets of one revision, and writes every path it is asked for into `asked.txt`."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with (self.root / "asked.txt").open("a") as file:
            file.write(f"{path}\n")
        if match := re.fullmatch(rf"/api/datasets/{NAME}(/revision/[^/]+)?", path):
            folder = self.root / match[1]
            if not folder.is_dir():
                return self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")
            names = [each["path"] for each in listed(folder, folder, recursive=True)]
            siblings = [{"rfilename": name} for name in names]
            return self.answer(200, {"id": match[1], "sha": COMMIT, "siblings": siblings})
        if match := re.fullmatch(rf"/api/datasets/{NAME}/tree/[^/]+/?(.*)", path):
            folder = self.root / match[1] / match[2]
            if not folder.is_dir():
                return self.answer(404, {"error": "no such folder"})
            deep = "recursive=true" in self.path.lower()
            return self.answer(200, listed(self.root / match[1], folder, recursive=deep))
        if match := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.+)", path):
            file_path = self.root / match[1] / match[2]
            if file_path.is_file():
                return self.answer_file(file_path.read_bytes())
        return self.answer(404, {"error": f"no such page: {path}"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        match = re.match(rf"/api/datasets/{NAME}/paths-info/", self.path)
        assert match, self.path
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        everything = listed(self.root / match[1], self.root / match[1], recursive=True)
        self.answer(200, [each for each in everything if each["path"] in asked])


def listed(repository: Path, folder: Path, *, recursive: bool) -> list[dict[str, Any]]:
    """A folder's entries as the hub tells them."""
    paths = sorted(folder.rglob("*") if recursive else folder.iterdir())
    return [
        {
            "type": "directory" if path.is_dir() else "file",
            "path": str(path.relative_to(repository)),
            "size": 0 if path.is_dir() else path.stat().st_size,
            "oid": "b" * 40,
        }
        for path in paths
    ]
