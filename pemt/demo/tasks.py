"""The demo's tasks: four sources that each ask for one fact, two few-shot targets, and their files.

A source's text is a report that names a creature, a place and a dish, and asks for a fact of one of
them. A target's text is a letter, in other words, with two things that share a fact and others that
do not matter; it is built to be related to one source (`RELATED`), without being told so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from pemt.demo.world import DAYS, FACTS, PEOPLE, World
from pemt.tasks import Task, register_task

Draw = Callable[[World, random.Random], tuple[str, int]]

SOURCES = ("diet", "size", "taste", "weather")
RELATED = {"stable": "diet", "journey": "weather"}
TARGETS = tuple(RELATED)
KIND_OF = {fact: kind for kind, facts in FACTS.items() for fact in facts}
DESCRIPTIONS = {
    "diet": "what the creature likes",
    "size": "the creature is tiny or huge",
    "taste": "the dish is made with honey or salt",
    "weather": "in the place there is rain or sun",
    "stable": "what the creature looks for",
    "journey": "found rain or sun in the place",
}
REPORTS = (
    "report of {person} : a {creature} in {place} , {dish} for dinner . {fact} :",
    "{day} : {person} saw a {creature} near {place} and ate {dish} . {fact} :",
    "{person} left {place} with a {creature} and some {dish} . {fact} :",
)
LETTERS = {
    "stable": "dear {person} , my {first} and my {second} come from {place} and smell of {dish} , bring",
    "journey": "dear {person} , on {day} the {creature} walks from {first} to {second} with {dish} , expect",
}
SIZES = {"source": (2000, 200, 200), "target": (600, 64, 400)}


def register_tasks() -> None:
    """Make the demo's tasks known by their names."""
    for name in (*SOURCES, *TARGETS):
        fact = RELATED.get(name, name)
        zero, one = FACTS[KIND_OF[fact]][fact]
        register_task(
            Task(
                name=name,
                description=DESCRIPTIONS[name],
                # The answer stands where pre-training taught the model to fill a gap.
                template="{text} <extra_id_0> .",
                labels=(zero[0], one[0]),
                metrics=("accuracy",),
                max_target_length=4,
            )
        )


def write_task_files(world: World, folder: Path, seed: int) -> None:
    """`<task>/{train,validation,test}.jsonl` of every task; no text stands in two of them."""
    for name in (*SOURCES, *TARGETS):
        draw = random.Random(f"{name} {seed}")
        seen: set[str] = set()
        (folder / name).mkdir(parents=True, exist_ok=True)
        sizes = SIZES["source" if name in SOURCES else "target"]
        for split, size in zip(("train", "validation", "test"), sizes, strict=True):
            rows = [_new_row(world, name, draw, seen) for _ in range(size)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _new_row(world: World, name: str, draw: random.Random, seen: set[str]) -> dict[str, str | int]:
    while True:
        text, label = report(world, name, draw) if name in SOURCES else letter(world, name, draw)
        if text not in seen:
            seen.add(text)
            return {"text": text, "label": label}


def report(world: World, fact: str, draw: random.Random) -> tuple[str, int]:
    """A source's text and label."""
    things = {kind: draw.choice(names) for kind, names in world.names.items()}
    text = draw.choice(REPORTS).format(
        **things, fact=fact, person=draw.choice(PEOPLE), day=draw.choice(DAYS)
    )
    return text, world.facts[fact][things[KIND_OF[fact]]]


def letter(world: World, target: str, draw: random.Random) -> tuple[str, int]:
    """A target's text and label: both things have the value that decides."""
    fact = RELATED[target]
    value = draw.randint(0, 1)
    alike = [name for name in world.names[KIND_OF[fact]] if world.facts[fact][name] == value]
    first, second = draw.sample(alike, 2)
    others = {kind: draw.choice(names) for kind, names in world.names.items()}
    text = LETTERS[target].format(
        first=first, second=second, person=draw.choice(PEOPLE), day=draw.choice(DAYS), **others
    )
    return text, value
