"""How this package is installed: as the distribution `pemt-trainer`, since on PyPI `pemt` is another program."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

DISTRIBUTION = "pemt-trainer"
# It provides a package of the same import name, and pip would let one write over the other's files.
OTHER = "pemt"
_OUR_COMMAND = "pemt.__main__:program"


def installed_version(name: str = DISTRIBUTION) -> str | None:
    """The version of a distribution; None where it is not installed, as this one where it is run from a checkout."""
    found = _distribution(name)
    return found.version if found else None


def version_line() -> str:
    """One line: version and distribution, and where the running package lies and came from."""
    version, source = installed_version(), _git_source()
    version = (
        f"{version} (distribution {DISTRIBUTION}"
        if version
        else f"(not installed as {DISTRIBUTION}"
    )
    return f"pemt {version}, running from {Path(__file__).parents[1]}{f', from {source}' if source else ''})"


def other_distribution() -> str | None:
    """One line on a distribution called `pemt` in this environment; None where there is none."""
    found = _distribution(OTHER)
    if found is None:
        return None
    if any(each.value == _OUR_COMMAND for each in found.entry_points):
        return (
            f"`{OTHER}` {found.version} is this program under its old name; `pip uninstall {OTHER}`, then install it "
            "again"
        )
    (about,) = found.metadata.get_all("Summary") or ["no summary"]
    return (
        f"`{OTHER}` {found.version} ({about}) is installed as well: another program of the same import name, and "
        f"each may have written over the other's files; `pip uninstall {OTHER} {DISTRIBUTION}`, then install "
        f"{DISTRIBUTION} again"
    )


def how_to_install() -> str:
    """What a person who wants this program has to type: it is on no package index."""
    if (source := _git_source()) and "file://" not in source:
        return f'`pip install "{DISTRIBUTION} @ {source}"`'
    return f"`pip install .` in a checkout of {DISTRIBUTION}"


def _git_source() -> str | None:
    """The git URL and commit that pip installed from (PEP 610); None for any other source."""
    found = _distribution(DISTRIBUTION)
    text = found.read_text("direct_url.json") if found else None
    try:
        direct = json.loads(text or "{}")
        vcs = direct.get("vcs_info", {})
        return f"git+{direct['url']}@{vcs['commit_id']}" if vcs.get("vcs") == "git" else None
    except (ValueError, KeyError, AttributeError):
        return None


def _distribution(name: str) -> Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except PackageNotFoundError:
        return None
