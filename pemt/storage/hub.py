"""Folders from and to the Hugging Face hub (`HF_ENDPOINT` and `HF_TOKEN` are honoured, as everywhere)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    tqdm,
)

from pemt.config import PemtError

# How long a hub that does not answer is waited for before that is logged.
ANSWER_SECONDS = 10.0


class HubError(PemtError):
    """A repository of the hub that cannot be read or written."""


@cache
def check_hub(name: str, *, file: str) -> None:
    """Say that a model is loaded from the hub, and find out at once whether it can be: once a process.

    Libraries try a hub out of reach again and again, for half a minute, and print nothing meanwhile.

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


def hub_is_asked() -> bool:
    """Whether HF_HUB_OFFLINE allows it."""
    return not constants.HF_HUB_OFFLINE


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
        fetched = snapshot_download(
            path_or_id, allow_patterns=list(files), revision=revision, tqdm_class=_Bar
        )
    except (OSError, ValueError, HTTPError) as error:
        raise HubError(
            f"{path_or_id}: is no folder here, and from the hub it cannot be fetched ({_reason(error)})"
        ) from None
    return Path(fetched)


def download(repo_id: str, folder: Path, *, revision: str | None = None) -> Path:
    """Fetch a repository into a folder of its own, which is complete or not there.

    A cut connection leaves a partial download beside it under a hidden name; the same call resumes it.

    Raises:
        HubError: there is no such repository, the hub is out of reach, or the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(f"{folder}: is not empty; give a new folder")
    commit = commit_of(repo_id, revision=revision)
    # by the commit, so that files of two repositories or two revisions never mix
    unfinished = folder.absolute().with_name(f".fetching-{folder.name}-{commit}")
    with _hub_errors(repo_id, _NOT_FETCHED):
        snapshot_download(repo_id, local_dir=unfinished, revision=commit, tqdm_class=_Bar)
        unfinished.replace(folder)
    return folder


def commit_of(repo_id: str, *, revision: str | None = None) -> str:
    """The commit that a branch, a tag or (default) the newest state of a repository is.

    Raises:
        HubError: there is no such repository or revision, or the hub is out of reach.
    """
    with _hub_errors(repo_id, _NOT_FETCHED):
        return str(HfApi().model_info(repo_id, revision=revision).sha)


def fetch_files(repo_id: str, folder: Path, *, files: Sequence[str], commit: str) -> None:
    """Fetch files of a repository into a folder; what is there already is not fetched again.

    Args:
        files: names or patterns; a repository may lack some.
        commit: as `commit_of` gives it.

    Raises:
        HubError: as `commit_of`.
    """
    with _hub_errors(repo_id, _NOT_FETCHED):
        snapshot_download(
            repo_id, local_dir=folder, revision=commit, allow_patterns=list(files), tqdm_class=_Bar
        )


def licence_in(folder: Path) -> str | None:
    """The licence that the model card in a folder names; None where there is no card, or no word of it."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        found = ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return str(found) if found else None


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """Push a folder as one commit to a model repository, made if it does not exist.

    Returns:
        The commit's address.

    Raises:
        HubError: the hub is out of reach, or refuses name or token.
    """
    api = HfApi()
    with _hub_errors(repo_id, _NOT_PUSHED), _bars_on_terminals_alone():
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(commit.commit_url)


def make_repository(repo_id: str, *, private: bool) -> str:
    """Make a model repository, if it does not exist; its newest commit.

    Raises:
        HubError: as `upload`.
    """
    with _hub_errors(repo_id, _NOT_PUSHED):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        return str(HfApi().model_info(repo_id).sha)


def commit_files(
    repo_id: str, files: Mapping[str, Path | bytes], *, message: str, parent: str
) -> str:
    """Push files as one commit: all of them are there afterwards, or none.

    Args:
        files: by their names in the repository.
        parent: the commit they go on top of; where another has come after it meanwhile, nothing is pushed.

    Returns:
        The commit's address.

    Raises:
        HubError: as `upload`.
    """
    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _hub_errors(repo_id, _NOT_PUSHED), _bars_on_terminals_alone():
        commit = HfApi().create_commit(repo_id, added, commit_message=message, parent_commit=parent)
    return str(commit.commit_url)


class _Bar(tqdm):
    """The hub's bar, on terminals and in notebooks; in a file it is noise."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"disable": None, **options})


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    """For uploads, which take no class of bars."""
    hidden = not are_progress_bars_disabled() and not sys.stderr.isatty()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


_NOT_FETCHED = (
    "fetched from",
    "check name and revision, the connection, and for a private one `hf auth login`",
)
_NOT_PUSHED = ("pushed to", "check the name, the connection, and `hf auth login`")


@contextmanager
def _hub_errors(repo_id: str, what: tuple[str, str]) -> Iterator[None]:
    """What goes wrong with the hub, in one line."""
    done, advice = what
    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise HubError(
            f"{repo_id}: cannot be {done} the hub ({_reason(error)}); {advice}"
        ) from None


def _reason(error: Exception) -> str:
    """The first two lines: of the hub's own errors, the status and what it says."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2]) or type(error).__name__
