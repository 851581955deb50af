"""`mixture.top_sources`: the experts whose prompts are most like the target's, in their own order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pemt.model.prompts import rank_by_prompt, top_sources
from tests.support.tiny_t5 import tiny_source

DIRECTIONS = {"away": [-1.0, 0.0], "near": [3.0, 1.0], "across": [0.0, 2.0], "along": [5.0, 0.0]}


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (1, ["along"]),
        (2, ["near", "along"]),
        (3, ["near", "across", "along"]),
        (4, list(DIRECTIONS)),
        (9, list(DIRECTIONS)),
        (None, list(DIRECTIONS)),
    ],
)
def test_by_the_cosine_of_the_means(most: int | None, kept: list[str]) -> None:
    sources = [
        # the mean over tokens counts, however many there are
        replace(tiny_source(name), prompt_PD=torch.tensor([direction] * n))
        for n, (name, direction) in enumerate(DIRECTIONS.items(), start=1)
    ]
    mixed, left_out = top_sources(torch.tensor([[2.0, 1.0], [2.0, -1.0]]), sources, most)
    assert [source.name for source in mixed] == kept
    assert left_out == [name for name in DIRECTIONS if name not in kept]


def test_of_equals_the_first_are_taken() -> None:
    prompt_PD = torch.tensor([[1.0, 2.0, 3.0]])
    sources = [
        replace(tiny_source(name), prompt_PD=scale * prompt_PD)
        for name, scale in {"b": 3.0, "a": 0.1, "c": 7.0}.items()
    ]
    assert [each.name for each in top_sources(prompt_PD, sources, 2)[0]] == ["b", "a"]


def test_ranked_with_the_number_that_decides() -> None:
    ranked = rank_by_prompt(
        torch.tensor([[2.0, 1.0], [2.0, -1.0]]),
        [torch.tensor([each]) for each in DIRECTIONS.values()],
    )
    names = list(DIRECTIONS)
    assert [(names[k], cosine) for k, cosine in ranked] == [
        ("along", 1.0), ("near", round(3 / 10**0.5, 6)), ("across", 0.0), ("away", -1.0),
    ]  # fmt: skip
