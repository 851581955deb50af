"""Which weights ZeRO-3 gathers in a forward and backward pass, and how many lie whole at once.

DeepSpeed 0.19 gathers a module's weights before it runs, more of them in advance (`prefetch`), and
gives them back afterwards unless they are used again within `reuse_distance` elements. A model of
less than half that many elements is therefore gathered once a pass, a larger one almost twice. This
replays those rules, as deepspeed/runtime/zero/partitioned_param_coordinator.py has them, over the
order of the model's modules. From the third step on: until then DeepSpeed records that order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pemt.model import FAMILIES
from pemt.plan.count import Weight
from pemt.plan.job import Zero

_EMBEDDINGS = tuple(f"base.{name}" for family in FAMILIES.values() for name in family.embeddings)


@dataclass(frozen=True)
class Gathered:
    """What a pass gathers.

    Args:
        names: of the weights, in order, one as often as it is gathered.
        live: most elements whole at once.
        largest: most elements gathered together; their flat buffer lives until the last of them is used.
    """

    names: list[str]
    live: int
    largest: int


def gathered(weights: list[Weight], zero: Zero) -> Gathered:
    """One forward and backward pass at stage 3; weights that stay whole (`is_kept`) do not count."""
    size = {each.name: each.size for each in weights}
    order = [
        [name for name in module if not is_kept(size[name], zero)]
        for module in module_order(weights)
    ]
    order = [module for module in order if module]
    uses = [(name, step) for step, module in enumerate(order) for name in module]
    releases = _releases(order, size, zero.reuse_distance)
    queue = deque(uses)
    fetched_for: dict[str, int] = {}
    whole: set[str] = set()
    names: list[str] = []
    elements = most = largest = 0
    for step, module in enumerate(order):
        wanted = [name for name in module if name not in whole]
        expected = {name for name in module if fetched_for.get(name, -1) < step}
        found: set[str] = set()
        while queue and len(found) < len(expected):
            name, at = queue.popleft()
            fetched_for[name] = at
            found.add(name)
        room = min(zero.max_live - elements - sum(size[name] for name in wanted), zero.prefetch)
        ahead = 0
        while queue and ahead < room:
            name, at = queue.popleft()
            fetched_for[name] = max(fetched_for.get(name, -1), at)
            if name not in whole and name not in wanted:
                wanted.append(name)
                ahead += size[name]
        whole.update(wanted)
        largest = max(largest, ahead)
        names += wanted
        elements += sum(size[name] for name in wanted)
        most = max(most, elements)
        for name in module:
            if name in releases[step] and fetched_for[name] <= step:
                whole.discard(name)
                elements -= size[name]
    return Gathered(names=names, live=most, largest=largest)


def is_kept(size: int, zero: Zero) -> bool:
    """Whether stage 3 leaves a weight of this many elements whole on every rank."""
    return size <= zero.persistence


def module_order(weights: list[Weight]) -> list[list[str]]:
    """The weights that each module uses, in the order of a forward and a backward pass."""
    modules: dict[str, list[str]] = {}
    mixtures = {each.module for each in weights if each.experts}
    for each in weights:
        place, _, _ = each.module.partition(".adapter.")  # which a mixture applies itself
        modules.setdefault(place if place in mixtures else each.module, []).append(each.name)
    embeddings = [modules.pop(name) for name in list(modules) if name.endswith(_EMBEDDINGS)]
    heads = [modules.pop(name) for name in list(modules) if name.startswith("base.lm_head")]
    head = heads[0] if heads else embeddings[-1]
    prompt = [modules.pop("prompt")] if "prompt" in modules else []
    encoder = [names for module, names in modules.items() if ".encoder." in module]
    decoder = [names for module, names in modules.items() if ".decoder." in module]
    forward = [*prompt, embeddings[0], *encoder, embeddings[-1], *decoder, head]
    # Nothing before the embeddings has a gradient, so the backward pass does not visit them.
    backward = [head, *reversed(decoder), *reversed(encoder), *prompt]
    return forward + backward


def _releases(order: list[list[str]], size: dict[str, int], distance: int) -> list[set[str]]:
    """Of every module, the weights that are not used again within so many elements."""
    starts = [0]
    for module in order:
        starts.append(starts[-1] + sum(size[name] for name in module))
    next_use: dict[str, int] = {}
    releases: list[set[str]] = []
    for step in range(len(order) - 1, -1, -1):
        after = starts[step + 1]
        releases.append(
            {
                name
                for name in order[step]
                if name not in next_use or starts[next_use[name]] - after >= distance
            }
        )
        next_use.update(dict.fromkeys(order[step], step))
    return releases[::-1]
