"""Metrics as `evaluate.Metric` subclasses that load nothing from the network, in percent.

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

import datasets
import evaluate
import numpy as np

POSITIVE = 1  # the index of the positive class among two labels
# What T5's own evaluation puts in place of text that is no number (1910.10683's code).
NO_NUMBER = -1.0

Labels = Sequence[str]


class TextMetric(evaluate.Metric):
    """Base: predictions, references, groups as text; `labels` are the task's target texts."""

    about = ""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description="predictions: texts; references: lists of texts; groups: texts",
            features=datasets.Features(
                {"predictions": text, "references": datasets.List(text), "groups": text}
            ),
        )

    def __init__(self, labels: Labels = ()) -> None:
        super().__init__(keep_in_memory=True)
        self.labels = tuple(labels)

    def class_ids(
        self, predictions: list[str], references: list[list[str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices into `labels`; -1 for a prediction that is no label of the task."""
        index = {label: i for i, label in enumerate(self.labels)}
        predicted = np.array([index.get(text.strip(), -1) for text in predictions], dtype=int)
        gold = np.array([index[texts[0]] for texts in references], dtype=int)
        return predicted, gold


class Accuracy(TextMetric):
    """Share of predictions that are the gold text, blanks at the ends aside; 0 for empty input."""

    about = "percentage of predictions equal to the first reference"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        hits = [p.strip() == r[0].strip() for p, r in zip(predictions, references, strict=True)]
        return {"accuracy": percent(hits)}


class BinaryF1(TextMetric):
    """F1 of the second label. A prediction that is neither label counts as the wrong one."""

    about = "F1 of the positive class; an invalid prediction counts as the wrong class"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        predicted, gold = self.class_ids(predictions, references)
        predicted = np.where(predicted < 0, 1 - gold, predicted)
        return {"f1": 100 * class_f1(predicted, gold, POSITIVE)}


class MacroF1(TextMetric):
    """Mean of the F1 of every label, 0 for a label that is neither gold nor predicted."""

    about = "unweighted mean of the F1 of all labels"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        predicted, gold = self.class_ids(predictions, references)
        scores = [class_f1(predicted, gold, label) for label in range(len(self.labels))]
        return {"macro_f1": 100 * float(np.mean(scores))}


class Matthews(TextMetric):
    """Matthews' correlation of the class ids; an invalid prediction is a class of its own.

    The multi-class form of Gorodkin (2004); 0 where either side is constant.
    """

    about = "Matthews correlation coefficient times 100"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        predicted, gold = self.class_ids(predictions, references)
        classes = np.arange(-1, len(self.labels))
        predicted_NC = (predicted[:, None] == classes).astype(float)
        gold_NC = (gold[:, None] == classes).astype(float)
        return {"matthews_correlation": 100 * correlation(predicted_NC, gold_NC)}


class PearsonSpearman(TextMetric):
    """Both correlations of the numbers in the texts; 0 where either side is constant.

    Text that is no finite number counts as -1, as in T5's evaluation.
    """

    about = "Pearson and Spearman correlation times 100"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        x = np.array([number(text) for text in predictions])
        y = np.array([number(texts[0]) for texts in references])
        return {
            "pearson": 100 * correlation(x[:, None], y[:, None]),
            "spearman": 100 * correlation(ranks(x)[:, None], ranks(y)[:, None]),
        }


class Squad(TextMetric):
    """Exact match and token F1 after SQuAD's normalisation, the best over all references."""

    about = "exact match and token F1, maximum over the references"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": percent([best(exact_match, p, texts) for p, texts in pairs]),
            "f1": percent([best(token_f1, p, texts) for p, texts in pairs]),
        }


class MultiRC(TextMetric):
    """SuperGLUE's pair: F1 over all answers, and the share of questions answered without a fault.

    A prediction that is neither label counts as the wrong one.
    """

    about = "F1a over answers and exact match over questions"

    def _compute(
        self, predictions: list[str], references: list[list[str]], groups: list[str]
    ) -> dict[str, float]:
        predicted, gold = self.class_ids(predictions, references)
        predicted = np.where(predicted < 0, 1 - gold, predicted)
        right: dict[str, list[bool]] = defaultdict(list)
        for group, is_right in zip(groups, predicted == gold, strict=True):
            right[group].append(bool(is_right))
        return {
            "f1a": 100 * class_f1(predicted, gold, POSITIVE),
            "exact_match": percent([all(answers) for answers in right.values()]),
        }


METRICS: dict[str, type[TextMetric]] = {
    "accuracy": Accuracy,
    "f1": BinaryF1,
    "macro_f1": MacroF1,
    "matthews": Matthews,
    "pearson_spearman": PearsonSpearman,
    "squad": Squad,
    "multirc": MultiRC,
}


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
    labels: Labels,
    predictions: list[str],
    references: list[list[str]],
    groups: list[str],
) -> dict[str, float]:
    """Every named metric, in percent, and `average_metrics`, the mean of their values."""
    scores: dict[str, float] = {}
    for name in names:
        metric = METRICS[name](labels)
        scores.update(metric.compute(predictions=predictions, references=references, groups=groups))
    return {**scores, "average_metrics": float(np.mean(list(scores.values())))}
