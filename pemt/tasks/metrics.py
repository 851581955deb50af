"""Metrics on `evaluate.Metric` that load nothing from the network, in percent.

Every metric compares texts. `predictions` are generated texts, `references` lists of accepted
texts per example (the first is the gold label where there is only one right answer), `groups` the
question an example belongs to. Empty input, constant input and text that is no number give the
defined values given below, never NaN and never a warning. `metric_kinds.py`
says which tasks each can score.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np

POSITIVE = 1  # the index of the positive class among two labels
# What T5's own evaluation puts in place of text that is no number (1910.10683's code).
NO_NUMBER = -1.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is scored, and the task's labels in the order of their class ids."""

    predictions: list[str]
    references: list[list[str]]
    groups: list[str]
    labels: Sequence[str]

    def class_ids(self, *, binary: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Indices into `labels`, predicted and gold [N]; -1 predicted is no label, `binary` makes it the wrong one."""
        index = {label: i for i, label in enumerate(self.labels)}
        predicted = np.array([index.get(text.strip(), -1) for text in self.predictions], dtype=int)
        gold = np.array([index[texts[0]] for texts in self.references], dtype=int)
        return np.where(predicted < 0, 1 - gold, predicted) if binary else predicted, gold


def accuracy(answers: Answers) -> dict[str, float]:
    """Share of predictions that are the gold text, blanks at the ends aside; 0 for empty input."""
    pairs = zip(answers.predictions, answers.references, strict=True)
    return {"accuracy": percent([p.strip() == texts[0].strip() for p, texts in pairs])}


def binary_f1(answers: Answers) -> dict[str, float]:
    """F1 of the second label. A prediction that is neither label counts as the wrong one."""
    return {"f1": 100 * class_f1(*answers.class_ids(binary=True), POSITIVE)}


def macro_f1(answers: Answers) -> dict[str, float]:
    """Mean of the F1 of every label, 0 for a label that is neither gold nor predicted."""
    ids = answers.class_ids()
    scores = [class_f1(*ids, label) for label in range(len(answers.labels))]
    return {"macro_f1": 100 * float(np.mean(scores))}


def matthews(answers: Answers) -> dict[str, float]:
    """Matthews' correlation of the class ids; an invalid prediction is a class of its own.

    The multi-class form of Gorodkin (2004); 0 where either side is constant.
    """
    classes = np.arange(-1, len(answers.labels))
    predicted_NC, gold_NC = ((ids[:, None] == classes).astype(float) for ids in answers.class_ids())
    return {"matthews_correlation": 100 * correlation(predicted_NC, gold_NC)}


def pearson_spearman(answers: Answers) -> dict[str, float]:
    """Both correlations of the numbers in the texts; 0 where either side is constant.

    Text that is no finite number counts as -1, as in T5's evaluation.
    """
    x = np.array([number(text) for text in answers.predictions])
    y = np.array([number(texts[0]) for texts in answers.references])
    return {
        "pearson": 100 * correlation(x[:, None], y[:, None]),
        "spearman": 100 * correlation(ranks(x)[:, None], ranks(y)[:, None]),
    }


def squad(answers: Answers) -> dict[str, float]:
    """Exact match and token F1 after SQuAD's normalisation, the best over all references."""
    pairs = list(zip(answers.predictions, answers.references, strict=True))
    return {
        "exact_match": percent([best(exact_match, p, texts) for p, texts in pairs]),
        "f1": percent([best(token_f1, p, texts) for p, texts in pairs]),
    }


def multirc(answers: Answers) -> dict[str, float]:
    """SuperGLUE's pair: F1 over all answers, and the share of questions answered without a fault.

    A prediction that is neither label counts as the wrong one.
    """
    predicted, gold = answers.class_ids(binary=True)
    right: dict[str, list[bool]] = defaultdict(list)
    for group, is_right in zip(answers.groups, predicted == gold, strict=True):
        right[group].append(bool(is_right))
    return {
        "f1a": 100 * class_f1(predicted, gold, POSITIVE),
        "exact_match": percent([all(each) for each in right.values()]),
    }


METRICS: dict[str, Callable[[Answers], dict[str, float]]] = {
    "accuracy": accuracy,
    "f1": binary_f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson_spearman": pearson_spearman,
    "squad": squad,
    "multirc": multirc,
}


class TextMetric(evaluate.Metric):
    """The one of METRICS that `config_name` names, of predictions, references and groups as text."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.config_name,
            citation="",
            features=datasets.Features(
                {"predictions": text, "references": datasets.List(text), "groups": text}
            ),
        )

    def _compute(self, **columns: Any) -> dict[str, float]:
        return METRICS[self.config_name](Answers(**columns))


def percent(values: Sequence[float] | Sequence[bool]) -> float:
    """The mean times 100; 0 for no values."""
    return 100 * float(np.mean(values)) if len(values) else 0.0


def class_f1(predicted: np.ndarray, gold: np.ndarray, label: int) -> float:
    """2 TP / (2 TP + FP + FN); 0 where the label is neither gold nor predicted."""
    true_positive = int(np.sum((predicted == label) & (gold == label)))
    total = int(np.sum(predicted == label) + np.sum(gold == label))
    return 2 * true_positive / total if total else 0.0


def correlation(x_NC: np.ndarray, y_NC: np.ndarray) -> float:
    """Correlation of the rows of two matrices [N, C]: cov(x, y) / sqrt(cov(x, x) cov(y, y)).

    With C = 1 this is Pearson's, with one-hot rows Matthews'. 0 where a side is constant or empty.
    """
    x_NC, y_NC = centred(x_NC), centred(y_NC)
    if not x_NC.any() or not y_NC.any():
        return 0.0
    value = float(np.sum(x_NC * y_NC) / np.sqrt(np.sum(x_NC**2) * np.sum(y_NC**2)))
    return min(1.0, max(-1.0, value))


def centred(x_NC: np.ndarray) -> np.ndarray:
    """Columns less their means, of the largest size 1; zeros where every column is constant."""
    x_NC = scaled(x_NC)
    if not len(x_NC):
        return x_NC
    # The mean of equal numbers may differ from them in the last digit.
    return scaled(np.where(np.ptp(x_NC, axis=0), x_NC - x_NC.mean(axis=0), 0.0))


def scaled(x_NC: np.ndarray) -> np.ndarray:
    """The same with 1 as its largest size: the squares of 1e200 and 1e-200 are no float64s."""
    largest = np.abs(x_NC).max(initial=0.0)
    return x_NC / largest if largest else x_NC


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def number(text: str) -> float:
    """The number a text says, NO_NUMBER where it says none or none that is finite."""
    try:
        value = float(text)
    except ValueError:
        return NO_NUMBER
    # Python's own spelling of 10, "1_0", is nobody else's.
    return value if np.isfinite(value) and "_" not in text else NO_NUMBER


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single blanks."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are equal after normalisation."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words after normalisation; with an empty side, 1 if both are, else 0."""
    ours, gold = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not ours or not gold:
        return float(ours == gold)
    common = sum((Counter(ours) & Counter(gold)).values())
    return 2 * common / (len(ours) + len(gold))


def best(score: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The highest score over all accepted answers."""
    return max(score(prediction, reference) for reference in references)


def compute(
    names: Sequence[str],
    labels: Sequence[str],
    predictions: list[str],
    references: list[list[str]],
    groups: list[str],
) -> dict[str, float]:
    """Every named metric, in percent, and `average_metrics`, the mean of their values."""
    scores: dict[str, float] = {}
    for name in names:
        metric = TextMetric(name, keep_in_memory=True)
        scores |= metric.compute(
            predictions=predictions, references=references, groups=groups, labels=labels
        )
    return {**scores, "average_metrics": float(np.mean(list(scores.values())))}
