"""The CUSTOM SCALARS page: charts in the order in which one asks."""

from __future__ import annotations

import re

from pemt.monitor.gates import STACKS, GateNames

Layout = dict[str, dict[str, list[object]]]


def layout(task: str, gates: GateNames) -> Layout:
    """Category -> chart -> the tags in it, as `SummaryWriter.add_custom_scalars` takes them."""
    charts = {
        "1 is it learning": {
            "loss": _lines("train/(loss|ce_loss|sparsity_loss)"),
            f"validation of {task}": _lines(f"eval/{re.escape(task)}/(?!loss$).*"),
            f"validation loss of {task}": _lines(f"eval/{re.escape(task)}/loss"),
            "gradient norm": _lines("train/grad_norm"),
            "learning rate": _lines("train/learning_rate"),
        }
    }
    if gates.sources:
        charts["2 which sources"] = {
            "mean gate of each source": _lines("gate_mean/.*"),
            "entropy of the gates (1: undecided)": _lines("gate_entropy/.*"),
            "prompt similarity": _lines("prompt_similarity/.*"),
        }
        charts["3 where each source acts, by layer"] = {
            f"{source}, {stack}": _lines(rf"gate/{stack}/\d+(/\w+/\w+)?/{re.escape(source)}")
            for source in gates.sources
            for stack in STACKS
            if gates.is_in(source, stack)
        }
    charts["4 what it costs"] = {
        "samples per second": _lines("train/samples_per_second"),
        "tokens per second": _lines("train/tokens_per_second"),
        "padding waste": _lines("train/padding_waste"),
        "memory, GB": _lines("memory/.*"),
    }
    return charts


def _lines(tags: str) -> list[object]:
    return ["Multiline", [f"^{tags}$"]]
