"""Folders from and to the Hugging Face hub (`HF_ENDPOINT` and `HF_TOKEN` are honoured, as everywhere)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from pemt.config import PemtError

# How long a hub that does not answer is waited for before that is told.
ANSWER_SECONDS = 10.0


class HubError(PemtError):
    """A repository of the hub that cannot be read or written."""


@cache
def check_hub(name: str, *, file: str) -> None:
    """Say that a model is loaded from the hub, and find out at once whether it can be: once a process.

    Libraries try a hub out of reach again and again, for half a minute, and tell nothing meanwhile.

    Args:
        name: a hub id; of a folder nothing is said.
        file: one that the repository must have.

    Raises:
        HubError: `file` is not in the cache, and HF_HUB_OFFLINE is set or the hub does not answer.
    """
    if Path(name).is_dir():
        return
    try:
        cached = isinstance(try_to_load_from_cache(name, file), str)
    except ValueError:
        return  # no hub id: whoever loads it tells what it is
    if constants.HF_HUB_OFFLINE:
        if cached:
            return
        raise HubError(
            f"{name}: is no folder here and not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids "
            "to ask the hub; give a folder, or fetch it once without HF_HUB_OFFLINE"
        )
    print(f"pemt: loading {name} from the hub ...", file=sys.stderr, flush=True)
    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=ANSWER_SECONDS)
    except HfHubHTTPError:
        return  # it answers, and whoever loads it tells what
    except (OSError, HTTPError) as error:
        if not cached:
            raise HubError(
                f"{name}: is no folder here, and the hub ({constants.ENDPOINT}) is out of reach ({_reason(error)}); "
                "give a folder, or try again with a network"
            ) from None


def local_folder(path_or_id: str, *, files: Sequence[str], revision: str | None = None) -> Path:
    """A local folder as it is, or the named files of a hub repository, fetched into the hub's cache.

    Args:
        path_or_id: a folder, or `owner/name` on the hub.
        files: names or patterns of what to fetch; a repository may lack some.
        revision: branch, tag or commit.

    Raises:
        HubError: neither such a folder nor such a repository, or the hub is out of reach.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    try:
        fetched = snapshot_download(path_or_id, allow_patterns=list(files), revision=revision)
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(
            f"{path_or_id}: is no folder here, and from the hub it cannot be fetched ({_reason(error)})"
        ) from None
    return Path(fetched)


def download(repo_id: str, folder: Path, *, revision: str | None = None) -> Path:
    """Fetch a whole repository into a folder of its own, which is whole or not there.

    What a cut connection leaves lies beside it under a hidden name, and the same call goes on with it.

    Raises:
        HubError: there is no such repository, the hub is out of reach, or the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(f"{folder}: is not empty; give a new folder")
    try:
        commit = HfApi().model_info(repo_id, revision=revision).sha
        # by the commit, so that files of two repositories or two revisions never mix
        unfinished = folder.absolute().with_name(f".fetching-{folder.name}-{commit}")
        snapshot_download(repo_id, local_dir=unfinished, revision=commit)
        unfinished.replace(folder)
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(
            f"{repo_id}: cannot be fetched from the hub ({_reason(error)}); check name and revision, the "
            "connection, and for a private one `hf auth login`"
        ) from None
    return folder


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """Push a folder as one commit to a model repository, made if it does not exist.

    Returns:
        The commit's address.

    Raises:
        HubError: the hub is out of reach, or refuses name or token.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(
            f"{repo_id}: cannot be pushed to the hub ({_reason(error)}); check the name, the "
            "connection, and `hf auth login`"
        ) from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    """The first two lines: of the hub's own errors, the status and what it says."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2]) or type(error).__name__
