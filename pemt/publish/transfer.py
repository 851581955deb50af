"""`pemt push` and `pemt pull`: a published folder to the hub and from it."""

from __future__ import annotations

from pathlib import Path

from pemt.publish.adapter_format import CONFIG, PublishError
from pemt.storage import download, upload

WHOLE_MODEL = "config.json"


def push_folder(folder: str | Path, repo_id: str, *, private: bool, message: str) -> str:
    """Push what `pemt export` wrote; returns the commit's address.

    Raises:
        PublishError: the folder holds nothing published.
        HubError: the hub is out of reach, or refuses name or token.
    """
    source = Path(folder)
    if not any((source / name).is_file() for name in (CONFIG, WHOLE_MODEL)):
        raise PublishError(f"{source}: holds no {CONFIG}; give a folder that `pemt export` wrote")
    return upload(source, repo_id, private=private, message=message)


def pull_folder(repo_id: str, folder: str | Path, *, revision: str | None = None) -> Path:
    """Fetch a published folder.

    Raises:
        HubError: no such repository, the hub is out of reach, or the folder is not empty.
    """
    return download(repo_id, Path(folder), revision=revision)
