"""`pemt predict` and `pemt evaluate` on a finished run: the same answers and scores as the run itself gave."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pemt.commands import COMMANDS
from pemt.config import PemtError
from pemt.run.evaluate_finished import evaluate_run
from pemt.run.predict import Prediction, Predictor
from pemt.run.train import run_adapt
from tests.support.tiny import adapt_config
from tests.support.trained import train_sources

SOURCES, TARGET = ("tiny-predict-a", "tiny-predict-b"), "tiny-predict-target"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two sources, a target run that answers yes to some and no to others, and a baseline."""
    folder = train_sources(tmp_path_factory.mktemp("predict"), SOURCES, TARGET)
    seldom: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 200, "logging_steps": 100}
    for method, epochs in (("pemt", 20), ("adapter", 1)):
        fields = {**seldom, "learning_rate": 0.1, "num_train_epochs": epochs, "method": method}
        paths = (folder / "base", folder / TARGET, folder / method, folder / "bank")
        run_adapt(adapt_config(*paths, TARGET, **fields))
    return folder


def rows_of(world: Path, split: str = "test") -> list[dict[str, Any]]:
    lines = (world / TARGET / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def predictor(world: Path) -> Predictor:
    return Predictor.load(world / "pemt")


def test_one_text_or_row_alone_is_a_list_of_one(predictor: Predictor) -> None:
    text = "text : the box is red"
    (alone,) = predictor(text)
    assert alone == predictor([text])[0] == predictor({"text": "the box is red"})[0]


def test_answers_and_gates_are_those_of_the_final_test(world: Path, predictor: Predictor) -> None:
    rows = rows_of(world)
    answers = predictor(rows, batch_size=3)
    results = json.loads((world / "pemt" / "all_results.json").read_text())
    right = [
        answer.prediction == ("no", "yes")[row["label"]]
        for answer, row in zip(answers, rows, strict=True)
    ]
    assert {answer.prediction for answer in answers} == {"no", "yes"}
    assert 100 * sum(right) / len(right) == pytest.approx(results["test_accuracy"])
    names = ["encoder/0", "encoder/1", "decoder/0", "decoder/1"]
    for name in names:
        assert list(answers[0].gates) == names
        for source in SOURCES:
            mean = sum(answer.gates[name][source] for answer in answers) / len(answers)
            assert mean == pytest.approx(results["gates"][name][source], abs=1e-6)


def test_the_order_is_kept_whatever_the_batches(world: Path, predictor: Predictor) -> None:
    rows = rows_of(world, "train")
    together = predictor(rows, batch_size=7)
    assert [each.input for each in together] == [f"text : {row['text']}" for row in rows]
    for answer, row in list(zip(together, rows, strict=True))[::5]:
        (alone,) = predictor([row])
        assert alone.prediction == answer.prediction
        for ffn, weights in alone.gates.items():
            assert weights == pytest.approx(answer.gates[ffn], abs=1e-5)
    gates = {tuple(each.gates["encoder/1"].values()) for each in together}
    assert len(gates) > 5, "gates that never change show nothing"


def test_texts_rows_and_inputs_are_the_same(world: Path, predictor: Predictor) -> None:
    row = {"text": "the box is red"}
    answers = predictor([row, "text : the box is red", {"input": "text : the box is red"}])
    likely = [list((each.probabilities or {}).values()) for each in answers]
    # a batch's rows are added up in different orders
    assert likely[1] == pytest.approx(likely[0], abs=1e-5)
    assert likely[2] == pytest.approx(likely[0], abs=1e-5)
    first, *others = (replace(each, probabilities=None) for each in answers)
    assert others == [first, first]
    assert predictor([]) == []


def test_a_baseline_has_no_gates(world: Path) -> None:
    (answer,) = Predictor.load(world / "adapter")(["text : the box is red"])
    assert answer.gates == {}
    assert answer.prediction in ("no", "yes")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_folder_with_the_split_alone_is_enough(world: Path, tmp_path: Path, split: str) -> None:
    (tmp_path / f"{split}.jsonl").write_bytes((world / TARGET / "test.jsonl").read_bytes())
    scored = evaluate_run(
        world / "adapter",
        split=split,
        output_file=str(tmp_path / "scores.json"),
        overrides=["--data_dir", str(tmp_path)],
    )
    results = json.loads((world / "adapter" / "all_results.json").read_text())
    assert scored["examples"] == 11
    assert scored[f"{split}_accuracy"] == results["test_accuracy"]
    with pytest.raises(PemtError, match=f"found {split}; train and at least one of"):
        evaluate_run(world / "adapter", split="train", overrides=["--data_dir", str(tmp_path)])


@pytest.fixture(scope="module")
def untaught(world: Path) -> Predictor:
    """A run of one step: what it writes is no label."""
    config = adapt_config(
        world / "base", world / TARGET, world / "raw", world / "bank", TARGET,
        max_steps=1, max_train_samples=4, eval_strategy="no",
    )  # fmt: skip
    run_adapt(config)
    return Predictor.load(world / "raw")


def test_an_answer_is_a_label_with_its_probability(world: Path, untaught: Predictor) -> None:
    rows = rows_of(world)
    generated = untaught(rows, constrain_labels=False)
    assert not {each.prediction for each in generated} <= {"no", "yes"}
    assert {each.probabilities for each in generated} == {None}
    assert None in {each.label for each in generated}
    answers = untaught(rows)
    assert {each.prediction for each in answers} <= {"no", "yes"}
    for answer, other in zip(answers, generated, strict=True):
        assert answer.probabilities is not None
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.label == max(
            answer.probabilities, key=lambda name: answer.probabilities[name]
        )
        for ffn, weights in answer.gates.items():
            assert weights == pytest.approx(other.gates[ffn], abs=1e-5)
    # as generation is asked for, it is generated
    assert untaught(rows, num_beams=1)[0].prediction == generated[0].prediction
    with pytest.raises(PemtError, match="num_beams and max_new_tokens are for generated answers"):
        untaught(rows, num_beams=2, constrain_labels=True)


def test_scores_by_likelihood_stand_beside_those_by_generation(
    world: Path, untaught: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(world / "raw")
    COMMANDS["evaluate"]([run])
    plain = evaluated(world / "raw" / "test_results.json")
    COMMANDS["evaluate"]([run, "--constrain_labels", "true"])
    both = evaluated(world / "raw" / "test_results.json")
    rows = rows_of(world)
    right = [
        answer.prediction == ("no", "yes")[row["label"]]
        for answer, row in zip(untaught(rows), rows, strict=True)
    ]
    assert both["test_accuracy_by_likelihood"] == pytest.approx(100 * sum(right) / len(right))
    assert both["test_accuracy"] == plain["test_accuracy"]
    assert "test_accuracy_by_likelihood" not in plain
    assert "test_accuracy_by_likelihood" in capsys.readouterr().out


class Terminal(io.StringIO):
    """Stdout and stderr of one terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("to_file", [False, True])
def test_lines_are_not_glued_to_a_bar(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to_file: bool
) -> None:
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"text": "the box is red"}\n' * 3)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    files = ["--output_file", str(answers)] if to_file else []
    COMMANDS["predict"]([str(world / "pemt"), "--input_file", str(asked), *files])
    shown = terminal.getvalue()
    assert ("predicting" in shown) is to_file
    lines = (answers.read_text() if to_file else shown).splitlines()
    assert [json.loads(line)["input"] for line in lines] == ["text : the box is red"] * 3


def predict(*arguments: str, stdin: bytes | None = None, monkeypatch: pytest.MonkeyPatch) -> None:
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    COMMANDS["predict"](list(arguments))


def test_from_stdin_to_stdout(
    world: Path,
    predictor: Predictor,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever a library writes to file descriptor 1 while answers are made would stand between the lines."""
    rows = rows_of(world)
    lines = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
    # tests.support.tiny's task is not in the table: a task file describes it.
    task = world / "task.yaml"
    task.write_text(
        f"name: {TARGET}\ndescription: the lid and the box\ntemplate: 'text : {{text}}'\n"
        "labels: ['no', 'yes']\nlabel_names: [closed, open]\nmetrics: [accuracy]\nmax_target_length: 4\n"
    )
    run = str(world / "pemt")
    capfd.readouterr()
    predict(run, "--task_file", str(task), stdin=lines.encode(), monkeypatch=monkeypatch)
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert list(found[0]) == ["input", "prediction", "label", "probabilities", "gates"]
    assert [list(each.pop("probabilities")) for each in found] == [["closed", "open"]] * len(rows)
    names = {"no": "closed", "yes": "open"}
    assert [each.pop("label") for each in found] == [names[each["prediction"]] for each in found]
    assert found == [unlabelled(each) for each in predictor(rows)]


def unlabelled(answer: Prediction) -> dict[str, Any]:
    """Its line without what depends on how the labels are called."""
    line = json.loads(answer.line())
    return {key: line[key] for key in ("input", "prediction", "gates")}


def test_a_file_and_options(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"text": "the box is red"}\n\n{"input": "text : the box is blue é"}\n')
    options = ["--batch_size", "1", "--num_beams", "2", "--max_new_tokens", "1"]
    files = ["--input_file", str(asked), "--output_file", str(answers)]
    predict(str(world / "pemt"), *files, *options, monkeypatch=monkeypatch)
    first, second = (json.loads(line) for line in answers.read_text().splitlines())
    assert second["input"] == "text : the box is blue é"
    assert "é" in answers.read_text(), "letters stay legible"
    assert len(first["prediction"].split()) <= 1
    assert sum(first["gates"]["decoder/1"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', r":2: field 'text' is missing; found: txt"),
        (b'{"text": [3]}\n', r":1: field 'text' must be text, found list"),
        (b'{"text": "\\ud800"}\n', r":1: no UTF-8"),
        (b'{"input": "\\ud800"}\n', r":1: no UTF-8"),
        (b'{"input": 3}\n', r":1: field 'input' must be text, found int"),
        (b'\n{"text": "a"\n', r":2: broken JSON"),
        (b'{"text": "a"}\n["a"]\n', r":2: no JSON object"),
        (b'{"text": "\xff"}\n', r":1: bad UTF-8"),
        (b"\n", r": no row in it"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    asked.write_bytes(content)
    run, output = str(world / "pemt"), ["--output_file", str(answers)]
    with pytest.raises(PemtError, match="output_file: there is no folder"):
        predict(run, "--input_file", str(asked), *output, monkeypatch=monkeypatch)
    answers.parent.mkdir()
    with pytest.raises(PemtError, match=f"in.jsonl{message}"):
        predict(run, "--input_file", str(asked), *output, monkeypatch=monkeypatch)
    with pytest.raises(PemtError, match=f"stdin{message}"):
        predict(run, *output, stdin=content, monkeypatch=monkeypatch)
    assert list(answers.parent.iterdir()) == []


def test_what_is_wrong_on_the_command_line(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(world / "pemt")
    with pytest.raises(PemtError, match=r"input_file: no file nowhere.jsonl; give a jsonl file"):
        predict(run, "--input_file", "nowhere.jsonl", monkeypatch=monkeypatch)
    with pytest.raises(
        PemtError, match="unknown argument `--batchsize`; did you mean `--batch_size`"
    ):
        predict(run, "--batchsize", "3", monkeypatch=monkeypatch)
    with pytest.raises(PemtError, match="holds no run"):
        predict(str(world), monkeypatch=monkeypatch)
    both = ("--constrain_labels", "true", "--num_beams", "2")
    with pytest.raises(PemtError, match="--constrain_labels true: --num_beams is for generated"):
        predict(run, *both, monkeypatch=monkeypatch)
    with pytest.raises(PemtError, match="--batch_size: found `0`"):
        predict(run, "--batch_size", "0", monkeypatch=monkeypatch)


def test_long_inputs_are_cut_and_counted(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = json.dumps({"text": "the " * 50}) + "\n" + json.dumps({"text": "the"}) + "\n"
    predict(str(world / "pemt"), stdin=lines.encode(), monkeypatch=monkeypatch)
    out, err = capsys.readouterr()
    assert "1 of 2 inputs are longer than max_source_length, 24 tokens, and are cut" in err
    assert len(out.splitlines()) == 2


def test_from_python_it_is_logged_once_as_well(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor.load(world / "pemt")
    predictor(["the box", "the ☃"])
    assert "1 of 2 inputs contain pieces unknown" in capsys.readouterr().out
    predictor(["the ☃"])
    assert capsys.readouterr() == ("", "")


def test_predictions_are_frozen_records() -> None:
    line = Prediction(input="a", prediction="b", gates={"encoder/0": {"x": 1 / 3}}).line()
    assert line == '{"input": "a", "prediction": "b", "gates": {"encoder/0": {"x": 0.3333}}}'


def evaluated(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_evaluate_gives_what_the_run_gave(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world / "pemt"
    monkeypatch.setattr("pemt.monitor.bars.SECONDS_A_LINE", 0.0)
    COMMANDS["evaluate"]([str(run)])
    out = capsys.readouterr().out
    assert f"evaluating {TARGET}: 4/11 examples, " in out
    assert "***** test metrics *****" in out
    assert re.search(rf"test_moe_weight_1 += +[01]\.\d{{4}}  {SOURCES[1]}$", out, re.MULTILINE)
    results, again = evaluated(run / "all_results.json"), evaluated(run / "test_results.json")
    for key in ("test_accuracy", "test_loss", "test_moe_weight_1", "gates", "sources"):
        assert again[key] == results[key]
    COMMANDS["evaluate"]([str(run), "--split", "validation"])
    told = capsys.readouterr().out
    assert "validation_accuracy" in told
    assert "validation_average_metrics" not in told, "it says the same"
    validation = evaluated(run / "validation_results.json")
    assert validation["validation_average_metrics"] == results["best_validation_average_metrics"]
    assert validation["checkpoint"] == results["best_checkpoint"]
    COMMANDS["evaluate"]([str(run), "--split", "train"])
    assert evaluated(run / "train_results.json")["examples"] == 40


def test_evaluate_on_another_task_and_with_other_fields(world: Path, tmp_path: Path) -> None:
    run, other = world / "pemt", SOURCES[0]
    arguments = [str(run), "--task_name", other, "--data_dir", str(world / other)]
    COMMANDS["evaluate"](arguments)
    first = evaluated(run / f"{other}_test_results.json")
    assert (first["task_name"], first["examples"]) == (other, 11)
    path = tmp_path / "scores.json"
    COMMANDS["evaluate"]([*arguments, "--max_eval_samples", "3", "--output_file", str(path)])
    assert evaluated(path)["examples"] == 3
    with pytest.raises(PemtError, match=r"scores.json: cannot be written"):
        COMMANDS["evaluate"]([*arguments, "--output_file", str(path / "scores.json")])
    with pytest.raises(PemtError, match="--split: invalid choice"):
        COMMANDS["evaluate"]([str(run), "--split", "dev"])


def test_the_run_leaves_its_test_predictions(world: Path, predictor: Predictor) -> None:
    rows = rows_of(world)
    lines = (world / "pemt" / "predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    answers = predictor(rows)
    results = evaluated(world / "pemt" / "all_results.json")
    assert [each["input"] for each in found] == [f"text : {row['text']}" for row in rows]
    assert [each["prediction"] for each in found] == [each.prediction for each in answers]
    assert [each["references"] for each in found] == [[("no", "yes")[r["label"]]] for r in rows]
    mean = sum(each["scores"]["accuracy"] for each in found) / len(found)
    assert mean == pytest.approx(results["test_accuracy"])
    for k, source in enumerate(SOURCES):
        mean = sum(each["gates"][source] for each in found) / len(found)
        assert mean == pytest.approx(results[f"test_moe_weight_{k}"], abs=1e-4)
    baseline = (world / "adapter" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(baseline[0])["gates"] == {}
