"""How many examples the published data sets have, so that a plan needs no download.

Sources: T5's own counts (google-research/text-to-text-transfer-transformer, t5/data/glue_utils.py) for GLUE's and
SuperGLUE's training sets, where ReCoRD has an example for each answer; the MRQA 2019 shared task's table for its sets;
the hub's data set cards for the others and for validation and test.
"""

from __future__ import annotations

from typing import NamedTuple

from pemt.tasks import Task


class Examples(NamedTuple):
    """Of the sets with labels; 0 where there is none."""

    train: int
    validation: int
    test: int = 0


# By the hub's name of the configuration, or of the data set where it has none.
EXAMPLES = {
    "cola": Examples(8_551, 1_043),
    "sst2": Examples(67_349, 872),
    "mrpc": Examples(3_668, 408),
    "qqp": Examples(363_849, 40_430),
    "stsb": Examples(5_749, 1_500),
    "mnli": Examples(392_702, 9_815),
    "qnli": Examples(104_743, 5_463),
    "rte": Examples(2_490, 277),
    "wnli": Examples(635, 71),
    "boolq": Examples(9_427, 3_270),
    "cb": Examples(250, 56),
    "copa": Examples(400, 100),
    "multirc": Examples(27_243, 4_848),
    "wic": Examples(5_428, 638),
    "wsc.fixed": Examples(554, 104),
    "record": Examples(138_854, 10_000),
    "rajpurkar/squad": Examples(87_599, 10_570),
    "lucadiliello/newsqa": Examples(74_160, 4_212),
    "lucadiliello/searchqa": Examples(117_384, 16_980),
    "lucadiliello/naturalquestionsshortqa": Examples(104_071, 12_836),
    "lucadiliello/hotpotqa": Examples(72_928, 5_901),
    "snli_format": Examples(23_596, 1_304, 2_126),
    "labeled_final": Examples(49_401, 8_000, 8_000),
    "winogrande_xl": Examples(40_398, 1_267),
    "fancyzhx/yelp_polarity": Examples(560_000, 0, 38_000),
}
HALVED = 10_000  # below so many training examples validation is halved; in larger sets training gives 1000
HELD_OUT = 1_000


def examples_of(task: Task) -> Examples | None:
    """Of what a run trains, validates and tests on, by the published split rule; None where it is not known."""
    if task.hub is None:
        return None
    found = EXAMPLES.get(task.hub.config or task.hub.path)
    if found is None:
        return None
    train, validation, test = found
    if task.hub.test and task.hub.validation and not test:  # MNLI's two validation sets
        return Examples(train, validation, validation)
    if test and validation:
        return found
    # MultiRC's 27,243 are answers to 5,100 questions, which is what counts
    if not test and (train < HALVED or task.group):
        return Examples(train, validation // 2, validation - validation // 2)
    return Examples(train - HELD_OUT, HELD_OUT, test or validation)
