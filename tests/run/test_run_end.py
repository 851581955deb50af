"""What a run says at its end: what was scored, which checkpoint and why, where everything lies."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from pemt.checkpoint.train_state import TrainState, train_state_of
from pemt.commands import COMMANDS
from pemt.config.schema import AdaptConfig
from pemt.data import splits
from pemt.engine import Engine
from pemt.publish.card import Card, model_card
from pemt.run.results import checkpoint_line, results_block
from pemt.run.train import run_adapt
from pemt.storage import StorageError
from pemt.tasks import get_task, without_redundant_mean
from tests.support.tiny import adapt_config, make_base, tiny_task, write_task_files

TASK = "tiny-end"
HALF = "half of the official validation set, data_seed 4096"
NAN = math.nan


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        ([(70.0, 1.0), (80.0, 2.0)], 2),
        ([(80.0, 1.0), (70.0, 0.5)], 1),
        ([(80.0, 1.0), (80.0, 0.9), (80.0, 0.95)], 2),
        ([(80.0, 1.0), (80.0, 1.0)], 1),
        ([(NAN, 1.0), (0.0, 2.0)], 2),
        ([(0.0, 2.0), (NAN, 1.0)], 1),
        ([(80.0, NAN), (80.0, 3.0)], 2),
    ],
    ids=["higher", "lower", "tie", "same", "after NaN", "before NaN", "NaN loss"],
)
def test_the_best_has_the_highest_metric_and_of_equal_ones_the_lowest_loss(
    validations: list[tuple[float, float]], best: int
) -> None:
    progress = TrainState()
    for step, (metric, loss) in enumerate(validations, start=1):
        progress = replace(progress, step=step).measured(metric, loss)
    assert progress.best_step == best
    assert progress.validations == len(validations)
    told = (progress.best_metric, progress.best_loss)
    assert told == pytest.approx(validations[best - 1], nan_ok=True)


def test_a_checkpoint_from_before_goes_on_and_its_best_wins_a_tie() -> None:
    """Its loss is not known, and no number of validations is made up."""
    content = asdict(TrainState(step=5, best_metric=80.0, best_step=4, validated_step=4))
    for added in ("best_loss", "validations"):
        del content[added]
    found = train_state_of({"progress": content}).measured(80.0, 0.1)
    assert (found.best_step, found.best_loss, found.validations) == (4, None, None)
    assert found.measured(80.1, 9.0).best_step == 5
    with pytest.raises(StorageError, match=r"progress\.validations: found 'x'"):
        train_state_of({"progress": {**content, "validations": "x"}})


@pytest.mark.parametrize("metric", [-0.5, NAN])
def test_a_metric_below_zero_or_nan_is_read_back(metric: float) -> None:
    """A metric of the user's own is the negative of an error; correlations are below zero at times."""
    kept = TrainState(step=5, best_metric=metric, best_loss=1.0, best_step=5, validations=1)
    found = train_state_of({"progress": asdict(kept)})
    assert found.best_metric == pytest.approx(metric, nan_ok=True)


def test_one_metric_is_told_once_and_two_with_their_mean() -> None:
    rest = {"average_metrics": 1.0, "loss": 2.0, "moe_weight_0": 1.0, "runtime": 3.0}
    assert "average_metrics" not in without_redundant_mean({"accuracy": 1.0, **rest})
    assert "average_metrics" in without_redundant_mean({"accuracy": 1.0, "f1": 1.0, **rest})


def rows(count: int) -> Dataset:
    texts = [str(number) for number in range(count)]
    return Dataset.from_dict({"source": texts, "target": texts, "group": [""] * count})


def test_where_each_set_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    rte = get_task("rte")
    train, validation, test = rows(30), rows(10), rows(8)

    def told(**given: Dataset) -> list[str]:
        made, origins = splits.split(rte, given, seed=4096)
        return [origins[name] for name in made]

    whole = [f"the official {name} set" for name in ("train", "validation", "test")]
    assert told(train=train, validation=validation, test=test) == whole
    assert told(train=train, validation=validation) == [whole[0], HALF, HALF]
    less = "the official train set without what validation got, data_seed 4096"
    held_out = "held out of the official train set, data_seed 4096"
    assert told(train=train, test=test) == [less, held_out, whole[2]]
    monkeypatch.setattr(splits, "SMALL", 20)
    assert told(train=train, validation=validation) == [less, held_out, whole[1]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptConfig, list[str]]:
    """A finished run whose data has no test set, and what it printed at its end."""
    folder = tmp_path_factory.mktemp("end")
    make_base(folder / "base")
    (write_task_files(folder / "data", seed=0) / "test.jsonl").unlink()
    tiny_task(TASK)
    paths = (folder / "base", folder / "data", folder / "run", folder)
    config = adapt_config(
        *(*paths, TASK), method="adapter", max_steps=6, eval_strategy="steps", eval_steps=2,
        data_seed=4096, learning_rate=1e-9,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: told.extend(map(str, texts)))
        run_adapt(config)
    return config, "\n".join(told).splitlines()


def test_the_block_of_a_run_tells_it_all(run: tuple[AdaptConfig, list[str]]) -> None:
    config, told = run
    folder = Path(config.output_dir)
    results = json.loads((folder / "all_results.json").read_text())
    start = told.index("***** test metrics *****")
    names = [line.split("=")[0].strip() for line in told[start + 1 : start + 6]]
    assert names == [
        "epoch",
        "test_accuracy",
        "test_loss",
        "test_runtime",
        "test_samples_per_second",
    ]
    size, best = results["examples"], results["best_checkpoint"]
    assert told[start + 6 :] == [
        f"test: {size} examples, {HALF}",
        f"{best}: the best of 3 validated, by accuracy on validation ({11 - size} examples, {HALF}); a tie goes to "
        "the lower loss",
        f"results: {folder / 'all_results.json'}",
        f"predictions: {folder / 'predictions.jsonl'}",
        f"checkpoint: {folder / best}",
    ]
    for line in told[start + 8 :]:
        assert Path(line.split(": ")[1]).exists()
    assert "test_average_metrics" in results, "people read it there"


def test_a_tie_went_to_the_lower_loss(run: tuple[AdaptConfig, list[str]]) -> None:
    """At a learning rate of 1e-9 no answer changes."""
    folder = Path(run[0].output_dir)
    results = json.loads((folder / "all_results.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seen = {
        line["step"]: (line[f"eval/{TASK}/average_metrics"], line[f"eval/{TASK}/loss"])
        for line in lines
        if f"eval/{TASK}/loss" in line
    }
    assert len({metric for metric, _ in seen.values()}) == 1
    lowest = min(seen, key=lambda step: (seen[step][1], step))
    assert results["best_checkpoint"] == f"checkpoint-{lowest}"
    assert results["best_validation_loss"] == seen[lowest][1]


def test_evaluate_tells_the_same(
    run: tuple[AdaptConfig, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(run[0].output_dir)
    results = json.loads((folder / "all_results.json").read_text())
    COMMANDS["evaluate"]([str(folder), "--split", "validation"])
    *_, scored, written, checkpoint = capsys.readouterr().out.splitlines()
    assert scored == f"validation: {results['validation_examples']} examples, {HALF}"
    assert written == f"results: {folder / 'validation_results.json'}"
    assert checkpoint == f"checkpoint: {folder / results['best_checkpoint']}"


def test_the_card_and_its_metadata_say_it_too(run: tuple[AdaptConfig, list[str]]) -> None:
    config, told = run
    results = json.loads((Path(config.output_dir) / "all_results.json").read_text())
    given = {"base_model": "b", "model_type": "t5", "licence": None, "dtype": "float32", "bytes": 1}
    card = Card(config=config, task=get_task(TASK), results=results, **given)
    text = model_card(card)
    scored = next(line for line in told if line.startswith("test: "))
    chosen = next(line for line in told if "the best of 3" in line)
    assert f"{scored}; in percent." in text
    assert f"C{chosen[1:]}. " in text
    assert "average_metrics" not in re.sub(r"^---\n.*?^---\n", "", text, flags=re.M | re.S)
    (result,) = ModelCard(text).data.eval_results  # type: ignore[attr-defined]
    assert result.dataset_split == "validation"
    assert result.dataset_args == {
        "split": "test",
        "examples": results["examples"],
        "split_origin": HALF,
    }
    older = {name: value for name, value in results.items() if not name.startswith("split")}
    text = model_card(replace(card, results=older))
    assert "On the test split, in percent." in text
    assert "The best checkpoint on validation." in text


def test_a_run_without_validation_says_so() -> None:
    results = {
        "best_checkpoint": "checkpoint-9",
        "best_validation_average_metrics": None,
        "checkpoints_validated": 0,
        "checkpoint_metric": "accuracy",
    }
    assert checkpoint_line(results) == "checkpoint-9: the last one, since none was validated"
    results |= {"sources": [], "split": "test", "examples": 3, "split_origin": "x"}
    block = results_block({**results, "test_f1": 1.0}, {}).splitlines()
    assert block[-2:] == ["test: 3 examples, x", checkpoint_line(results)]


def test_nothing_of_a_run_stays_in_memory_with_its_engine(
    run: tuple[AdaptConfig, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where the traceback of an interrupted run keeps its frames."""
    engines, trained = [], []

    def release(engine: Engine) -> None:
        engines.append(engine)
        trained.extend(weakref.ref(each) for _, each in engine.optimizer_state.parameters)
        original(engine)

    original = Engine.release
    monkeypatch.setattr(Engine, "release", release)
    run_adapt(replace(run[0], output_dir=str(tmp_path / "run"), max_steps=1))
    gc.collect()
    assert trained
    assert [each() for each in trained if each() is not None] == []
