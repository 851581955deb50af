"""Tasks as the published code has them: what a row of the hub is answered with there."""

from __future__ import annotations

import pytest

from pemt.tasks import RowError, example_of, get_task, task_names
from pemt.tasks.paper import DIFFERENT, PREFIX
from tests.tasks.test_table import HUB_ROWS

# The target of each row in HUB_ROWS, by the names that the hub's copy has for its classes.
TARGETS = {
    "mnli": "contradiction",
    "qnli": "entailment",
    "qqp": "not_duplicate",
    "sst2": "negative",
    "cola": "acceptable",
    "mrpc": "equivalent",
    "rte": "entailment",
    "stsb": "3.7",
    "superglue-boolq": "True",
    "superglue-cb": "neutral",
    "superglue-multirc": "True",
    "superglue-wic": "False",
    "superglue-wsc-fixed": "True",
    "superglue-record": "Ann",
    "scitail": "neutral",
    "winogrande": "Ann",
}


def test_every_one_is_in_the_table() -> None:
    assert TARGETS.keys() == DIFFERENT.keys()
    assert {f"{PREFIX}{name}" for name in TARGETS} <= set(task_names())


@pytest.mark.parametrize("name", TARGETS)
def test_it_answers_as_published(name: str) -> None:
    row, source, _ = HUB_ROWS[name]
    example = example_of(get_task(f"{PREFIX}{name}"), row)
    assert example is not None
    expected = f"record {source}" if name == "superglue-record" else source
    assert (example["source"], example["target"]) == (expected, TARGETS[name])


def test_one_metric_where_the_published_mean_has_one() -> None:
    for name in ("mrpc", "qqp", "superglue-cb", "winogrande"):
        assert get_task(f"{PREFIX}{name}").metrics == ("accuracy",)


def test_mnli_is_validated_on_its_mismatched_set() -> None:
    hub = get_task("paper-mnli").hub
    assert hub is not None
    assert (hub.validation, hub.test) == ("validation_mismatched", "validation_matched")


def test_a_choice_that_is_none_is_refused() -> None:
    row = {"sentence": "_ sings.", "option1": "Ann", "option2": "Eve", "answer": ""}
    with pytest.raises(RowError, match="field 'answer': unknown label ''; allowed: 1, 2"):
        example_of(get_task("paper-winogrande"), row)
