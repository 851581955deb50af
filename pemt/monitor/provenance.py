"""Where a run comes from: its configuration, the git state, versions. No environment variables."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from pemt.config import DISTRIBUTION, RunConfig, installed_version

PACKAGES = (DISTRIBUTION, "torch", "transformers", "accelerate", "deepspeed", "datasets", "peft")
GIT_SECONDS = 5
MOST_FILES = 20


def config_text(config: RunConfig) -> str:
    """The configuration as Markdown: YAML in a block that nothing in it can end."""
    return _block(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def environment_text(facts: Mapping[str, str], *, folder: Path) -> str:
    """What the run stands on, as Markdown: facts such as ranks and device, versions, the folder's git state."""
    lines = {
        **facts,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: found for name in PACKAGES if (found := installed_version(name))},
        **git_state(folder),
    }
    width = max(map(len, lines))
    return _block("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))


def git_state(folder: Path) -> dict[str, str]:
    """Commit, branch and changed files of the repository around a folder; {} where there is none.

    Neither remotes nor differences are recorded: they can hold tokens.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain")
    if changed is None:
        changes = "unknown, git took too long"
    else:
        files = changed.splitlines()
        more = [f"and {len(files) - MOST_FILES} more"] if len(files) > MOST_FILES else []
        changes = ", ".join(line.strip() for line in [*files[:MOST_FILES], *more]) or "none"
    return {
        "git commit": commit.strip(),
        "git branch": (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "git changes": changes,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
