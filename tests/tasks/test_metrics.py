"""Every formula against scikit-learn, scipy or known values of the official scorers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy import stats

from pemt.tasks import TaskError, example_scores, get_task, score
from pemt.tasks.metrics import METRICS, compute, normalize_answer

LABELS = ("0", "1", "2")


def scores(name, predictions, golds, labels=LABELS, groups=None):
    """One metric, with `golds` as texts or lists of texts."""
    golds = [[gold] if isinstance(gold, str) else gold for gold in golds]
    groups = groups or [""] * len(golds)
    result = compute((name,), labels, list(predictions), golds, groups)
    result.pop("average_metrics")
    return result


def random_labels(seed, labels, size=200):
    rng = np.random.default_rng(seed)
    return rng.choice(labels, size).tolist(), rng.choice(labels, size).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_class_metrics_equal_scikit_learn(seed):
    predictions, golds = random_labels(seed, LABELS)
    binary, binary_golds = random_labels(seed, LABELS[:2])
    assert scores("accuracy", predictions, golds)["accuracy"] == pytest.approx(
        100 * reference.accuracy_score(golds, predictions)
    )
    assert scores("f1", binary, binary_golds, LABELS[:2])["f1"] == pytest.approx(
        100 * reference.f1_score(binary_golds, binary, pos_label="1")
    )
    assert scores("macro_f1", predictions, golds)["macro_f1"] == pytest.approx(
        100 * reference.f1_score(golds, predictions, average="macro", labels=list(LABELS))
    )
    for p, g, labels in ((predictions, golds, LABELS), (binary, binary_golds, LABELS[:2])):
        assert scores("matthews", p, g, labels)["matthews_correlation"] == pytest.approx(
            100 * reference.matthews_corrcoef(g, p)
        )


def test_matthews_counts_invalid_answers_as_a_class_of_their_own():
    predictions, golds = ["1", "0", "maybe", "1", "0"], ["1", "0", "1", "0", "0"]
    expected = 100 * reference.matthews_corrcoef(golds, predictions)
    found = scores("matthews", predictions, golds, LABELS[:2])["matthews_correlation"]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_correlations_equal_scipy_with_ties(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 26, 300) / 5, rng.integers(0, 26, 300) / 5
    found = scores("pearson_spearman", [f"{v:.1f}" for v in x], [f"{v:.1f}" for v in y])
    assert found["pearson"] == pytest.approx(100 * stats.pearsonr(x, y)[0])
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(x, y)[0])


@pytest.mark.parametrize(
    "texts", [["1e-200", "0", "0"], ["1e200", "0", "3"], ["1e-250", "3e-250", "2e-250"]]
)
def test_numbers_whose_squares_are_none_correlate_all_the_same(texts):
    golds = ["1.0", "2.0", "4.0"]
    expected = 100 * stats.pearsonr([float(text) for text in texts], [1.0, 2.0, 4.0])[0]
    assert scores("pearson_spearman", texts, golds)["pearson"] == pytest.approx(expected)
    assert scores("pearson_spearman", golds, texts)["pearson"] == pytest.approx(expected)


@pytest.mark.parametrize("text", ["none", "", "nan", "inf", "-inf", "3.0.0", "1_0"])
def test_text_that_is_no_number_counts_as_minus_one(text):
    golds = ["0.0", "2.0", "4.0", "5.0"]
    found = scores("pearson_spearman", ["0.2", text, "3.8", "5.0"], golds)
    assert found == scores("pearson_spearman", ["0.2", "-1", "3.8", "5.0"], golds)


def test_binary_f1_counts_invalid_answers_as_wrong():
    golds = ["1", "1", "0", "0"]
    right_then_invalid = scores("f1", ["1", "?", "0", "?"], golds, LABELS[:2])
    assert right_then_invalid == scores("f1", ["1", "0", "0", "1"], golds, LABELS[:2])
    assert right_then_invalid["f1"] == pytest.approx(50)


def test_squad_normalisation_and_token_f1():
    assert normalize_answer("The  Cat's,\tan apple!") == "cats apple"
    assert normalize_answer("theatre another Anna") == "theatre another anna"
    found = scores(
        "squad", ["the Norman people", "1066", "in Paris"], [["Normans"], ["1066."], ["Paris"]]
    )
    # By hand: no common word; equal after normalisation; precision 1/2 and recall 1 give 2/3.
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (0 + 1 + 2 / 3) / 3)


def test_squad_takes_the_best_reference_and_counts_repeated_words_once_each():
    found = scores("squad", ["red red fish", ""], [["blue", "red fish"], ["a", "b c"]])
    # "a" is an article: an empty prediction equals it; 2 common words of 3 and 2 give 4/5.
    assert found["exact_match"] == pytest.approx(50)
    assert found["f1"] == pytest.approx(100 * (0.8 + 1) / 2)


# (prediction, references, exact match, F1): what the official evaluate-v1.1.py and evaluate-v2.0.py of SQuAD
# gave. They differ in one row, an answer that is empty after normalisation: F1 0 by v1.1, 1 by v2.0 and by ours.
OFFICIAL_SQUAD = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos"], 1, 1),
    ("in Santa Clara, California", ["Santa Clara, California", "Levi's Stadium"], 0, 6 / 7),
    ('"golden anniversary"', ["gold", "golden anniversary themed"], 0, 4 / 5),
    ("24\N{EN DASH}10", ["24-10", "2410"], 0, 0),
    ("U.S.", ["the US", "United States of America"], 1, 1),
    ("the the a an", ["The"], 1, 1),
    ("", ["no answer"], 0, 0),
    ("York New York city", ["New York, New York", "New York City"], 0, 6 / 7),
    ("New York, New York", ["York New York city"], 0, 3 / 4),
    ("10th-century", ["10th century", "in the 10th and 11th centuries"], 0, 0),
    ("l'École  des\N{NO-BREAK SPACE}Chartes", ["L'école des chartes"], 1, 1),
    ("a theory of everything", ["Theory of Everything, a"], 1, 1),
]


@pytest.mark.parametrize("row", OFFICIAL_SQUAD, ids=lambda row: row[0])
def test_squad_gives_the_official_scripts_values(row):
    prediction, references, exact, f1 = row
    found = scores("squad", [prediction], [references])
    assert found == pytest.approx({"exact_match": 100 * exact, "f1": 100 * f1})


def test_multirc_gives_the_official_scripts_values():
    answers = ["1011", "010", "11000", "1", "001", "10"]  # a word a question, a digit an answer
    golds = ["1011", "000", "11010", "0", "001", "01"]
    groups = [str(number) for number, word in enumerate(golds) for _ in word]
    found = scores("multirc", "".join(answers), "".join(golds), LABELS[:2], groups)
    assert found == pytest.approx({"exact_match": 100 / 3, "f1a": 70.58823529411765})


def test_multirc_scores_answers_and_whole_questions():
    golds = ["1", "0", "1", "1", "0", "0"]
    predictions = ["1", "0", "1", "0", "0", "1"]
    groups = ["q1", "q1", "q2", "q2", "q3", "q3"]
    found = scores("multirc", predictions, golds, LABELS[:2], groups)
    assert found["f1a"] == pytest.approx(
        100 * reference.f1_score(golds, predictions, pos_label="1")
    )
    assert found["exact_match"] == pytest.approx(100 / 3)
    # The order of the rows is of no account, the question they belong to is.
    order = [5, 2, 0, 4, 3, 1]
    shuffled = [[column[i] for i in order] for column in (predictions, golds, groups)]
    assert scores("multirc", shuffled[0], shuffled[1], LABELS[:2], shuffled[2]) == found


def test_multirc_counts_invalid_answers_as_wrong():
    found = scores("multirc", ["yes", "no"], ["1", "0"], LABELS[:2], ["q", "q"])
    assert found == {"f1a": 0.0, "exact_match": 0.0}


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize(
    ("predictions", "golds"),
    [
        ([], []),
        (["1"], ["1"]),
        (["1", "1", "1"], ["1", "1", "1"]),
        (["0", "0", "0"], ["1", "1", "1"]),
        (["", "\x00", "1e999"], ["0", "1", "0"]),
        (["1e-200", "0", "0"], ["1", "0", "1"]),
        (["1e308", "-1.7e308", "5e-324"], ["1", "0", "1"]),
        (["1e308", "1e308", "1e308"], ["1", "0", "1"]),
        (["0", "1"], ["1", "1"]),
    ],
)
def test_degenerate_input_gives_finite_values_and_no_warning(name, predictions, golds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(name, predictions, golds, LABELS[:2])
    assert all(np.isfinite(value) and -100 <= value <= 100 for value in found.values())


def test_constant_input_has_no_correlation():
    assert scores("pearson_spearman", ["2.0"] * 3, ["1.0", "2.0", "3.0"]) == {
        "pearson": 0.0,
        "spearman": 0.0,
    }
    assert scores("matthews", ["1", "1"], ["1", "1"], LABELS[:2]) == {"matthews_correlation": 0.0}


def test_score_gives_percent_and_the_mean_of_all_values():
    rows = [{"references": [gold], "group": ""} for gold in ("1", "0", "1", "1")]
    found = score(get_task("mrpc"), ["1", "0", "0", "1"], rows)
    assert found == pytest.approx({"f1": 80.0, "accuracy": 75.0, "average_metrics": 77.5})


def test_score_refuses_a_wrong_number_of_predictions():
    with pytest.raises(TaskError, match="1 predictions for 0 rows"):
        score(get_task("mrpc"), ["1"], [])


def test_scores_of_one_example():
    assert example_scores(get_task("mrpc"), "1 ", ["1"]) == {"accuracy": 100.0}
    assert example_scores(get_task("superglue-multirc"), "maybe", ["1"]) == {"accuracy": 0.0}
    assert example_scores(get_task("stsb"), "2.0", ["2.0"]) == {}
    found = example_scores(get_task("squad"), "in Paris", ["Rome", "Paris"])
    assert found == {"exact_match": 0.0, "f1": pytest.approx(100 * 2 / 3)}
