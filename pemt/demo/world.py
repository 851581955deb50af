"""A small world: creatures, places and dishes with made-up names, and facts about each.

Its corpus tells the facts in passing, in a small grammar. Its tasks (tasks.py) ask for them.
Everything follows from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES_PER_KIND = 64
TALK_SHARE = 0.15
ONSETS = (
    *("b", "br", "d", "dr", "f", "fl", "g", "gr", "h", "k", "kl", "l", "m"),
    *("n", "p", "pr", "r", "s", "sk", "st", "t", "tr", "v", "w", "z"),
)
VOWELS = tuple("aeiou")
CODAS = tuple("lnrsmkt")
PEOPLE = ("anna", "bert", "clara", "david", "emma", "frank", "greta", "hugo", "ida", "jonas")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

# The facts of each kind of thing: per value (0 or 1), the words that the corpus tells it with.
Words = tuple[str, ...]
FACTS: dict[str, dict[str, tuple[Words, Words]]] = {
    "creature": {
        "diet": (("grass", "leaves", "hay"), ("meat", "fish", "bones")),
        "size": (("tiny", "little", "light"), ("huge", "tall", "heavy")),
    },
    "place": {
        "weather": (("rain", "mud", "clouds"), ("sun", "sand", "dust")),
        "wealth": (("gold", "silk", "marble"), ("rags", "huts", "hunger")),
    },
    "dish": {
        "taste": (("honey", "sugar", "berries"), ("salt", "pepper", "onion")),
        "warmth": (("steam", "oven", "fire"), ("ice", "cellar", "frost")),
    },
}
TELLING: dict[str, Words] = {
    "diet": (
        "the {name} likes {word} .",
        "we gave {word} to the {name} .",
        "a {name} looks for {word} .",
    ),
    "size": ("the {name} is {word} .", "what a {word} {name} !", "{person} saw a {word} {name} ."),
    "weather": (
        "in {name} there is {word} .",
        "{name} means {word} .",
        "{person} found {word} in {name} .",
    ),
    "wealth": (
        "the people of {name} know {word} .",
        "{name} is full of {word} .",
        "{word} , that is {name} .",
    ),
    "taste": (
        "{name} is made with {word} .",
        "{person} puts {word} into {name} .",
        "{name} needs {word} .",
    ),
    "warmth": (
        "{name} comes with {word} .",
        "from the {word} comes {name} .",
        "{name} and {word} go together .",
    ),
}
TALK = (
    "yes , said {person} .",
    "no , said {person} .",
    "{person} says yes .",
    "{person} says no .",
)


@dataclass(frozen=True)
class World:
    """The names of each kind, and per fact the value (0 or 1) of each name."""

    names: dict[str, list[str]]
    facts: dict[str, dict[str, int]]

    @classmethod
    def make(cls, seed: int) -> World:
        """A world in which every fact holds for half of the names."""
        draw = random.Random(seed)
        taken: set[str] = set()
        names = {kind: _new_names(draw, taken) for kind in FACTS}
        facts = {}
        for kind, kind_facts in FACTS.items():
            for fact in kind_facts:
                order = draw.sample(names[kind], NAMES_PER_KIND)
                facts[fact] = {name: position % 2 for position, name in enumerate(order)}
        return cls(names, facts)

    def corpus(self, seed: int) -> Iterator[str]:
        """Texts to pre-train on, without end: two sentences about one thing, now and then small talk."""
        draw = random.Random(seed)
        while True:
            kind = draw.choice(list(FACTS))
            name = draw.choice(self.names[kind])
            text = [self._sentence(kind, name, draw) for _ in range(2)]
            if draw.random() < TALK_SHARE:
                text[draw.randint(0, 1)] = draw.choice(TALK).format(person=draw.choice(PEOPLE))
            yield " ".join(text)

    def _sentence(self, kind: str, name: str, draw: random.Random) -> str:
        fact = draw.choice(list(FACTS[kind]))
        word = draw.choice(FACTS[kind][fact][self.facts[fact][name]])
        return draw.choice(TELLING[fact]).format(name=name, word=word, person=draw.choice(PEOPLE))


def _new_names(draw: random.Random, taken: set[str]) -> list[str]:
    names: list[str] = []
    while len(names) < NAMES_PER_KIND:
        name = "".join(draw.choice(part) for part in (ONSETS, VOWELS, ONSETS, VOWELS, CODAS))
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names
