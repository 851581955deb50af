"""`pemt bank list` and `show`: what a bank has, and what of it is like a task."""

from __future__ import annotations

import math
from typing import Any

from pemt.config import PemtError


def list_entries(*, bank_dir: str) -> None:
    """`pemt bank list`."""
    from pemt.bank import entry_folder, entry_names, manifest_of
    from pemt.model import projections_of

    entries = [manifest_of(entry_folder(bank_dir, name)) for name in entry_names(bank_dir)]
    width = max(len(entry.task) for entry in entries)
    for entry in entries:
        score = entry.metrics.get("average_metrics")
        score_text = "" if score is None else f", test score {score:.1f}"
        print(
            f"{entry.task:<{width}}  {entry.kind} on {projections_of(entry.sites)}, rank {entry.rank}, "
            f"alpha {entry.alpha:g}, on {entry.base['name']}{score_text}"
        )


def show(*, bank_dir: str | None, task: str | None, task_name: str | None, **options: Any) -> None:
    """`pemt bank show`."""
    if bank_dir is None or (task is None) == (task_name is None):
        raise PemtError(
            "pemt bank show: name a bank, and either an entry of it or with --task_name a task; "
            "`pemt bank show --help` tells what it takes"
        )
    if task is None:
        _rank(bank_dir, str(task_name), **options)
    else:
        _show_entry(bank_dir, task)


def _rank(bank_dir: str, task_name: str, *, task_file: str | None, **base: str | None) -> None:
    from pemt.tasks import get_task

    description = get_task(task_name, task_file).description
    from pemt.bank import entry_names, rank_entries

    width = max(map(len, entry_names(bank_dir)))
    ranked = rank_entries(bank_dir, description, **base)
    print(
        f"{task_name}: `{description}`\n"
        "similarity: the cosine, from -1 to 1, between the means over tokens of an entry's prompt and of the one that "
        "this\n  sentence starts; mixture.top_sources N takes the first N. It tells what is alike in words, not what "
        "helps."
    )
    for place, (name, cosine) in enumerate(ranked, start=1):
        print(f"{place:>3}  {name:<{width}}  {cosine:9.6f}")


def _show_entry(bank_dir: str, task: str) -> None:
    from pemt.bank import PROMPT, entry_folder, read_shapes, site_names
    from pemt.model import absent_sites, projections_of

    folder = entry_folder(bank_dir, task)
    manifest, shapes = read_shapes(folder)
    prompt_length, _ = shapes.pop(PROMPT)
    sites = site_names(shapes)
    absent = absent_sites(sites, manifest.base)
    many = f"{len(sites)} layers"
    if absent:  # of the same kinds
        many = f"{len(sites)} of {len(sites) + len(absent)} such layers; not on {', '.join(absent)}"
    size = sum(path.stat().st_size for path in folder.iterdir())
    shape = {key: value for key, value in manifest.base.items() if key != "name"}
    rows = {
        "entry": str(folder),
        "description": manifest.description or "not known",
        "expert": f"{manifest.kind}, rank {manifest.rank}, alpha {manifest.alpha:g}",
        "on": f"{projections_of(sites)} ({many})",
        "prompt": f"{prompt_length} tokens",
        "base model": manifest.base.get("name"),
        "its shape": ", ".join(f"{key} {value}" for key, value in shape.items()),
        "its weights": manifest.base_sha256 or "not known",
        "test metrics": ", ".join(f"{key} {value:.2f}" for key, value in manifest.metrics.items())
        or "none",
        "size": f"{size / 2**20:.1f} MiB, {manifest.dtype}, "
        f"{sum(map(math.prod, shapes.values())):,} parameters in the expert",
        "made of": manifest.origin or "no adapter of the hub",
        "licence": manifest.licence or "not known",
        "written by": ", ".join(f"{key} {value}" for key, value in manifest.versions.items()),
    }
    for key, value in rows.items():
        print(f"{key:<13} {value}")
