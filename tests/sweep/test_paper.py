"""The paper's recipes: as published, planned, and a dry run over all their tasks on a tiny random T5."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import T5Config, T5ForConditionalGeneration

from pemt.commands import COMMANDS
from pemt.config import ConfigError, sweep_file
from pemt.data.local_files import read_rows
from pemt.model.tokenizer import load_tokenizer
from pemt.plan import Cluster, Job, PlanError, PlannedRun, Zero, examples_of, hours_of
from pemt.plan.job import CHIPS
from pemt.plan.shapes import KNOWN
from pemt.plan.speed import step_time
from pemt.sweep.plan import Sweep, read_sweep
from pemt.sweep.run import run_sweep
from pemt.tasks import RowError, example_of, get_task
from tests.tasks.test_table import HUB_ROWS

SOURCES = ["mnli", "qnli", "qqp", "sst2", "squad", "superglue-record"]
GLUE = ["stsb", "mrpc", "rte", "cola"]
SUPERGLUE = [f"superglue-{name}" for name in ("multirc", "boolq", "wic", "wsc-fixed", "cb")]
MRQA = ["nq", "hotpotqa", "searchqa", "newsqa"]
OTHERS = ["winogrande", "yelp_polarity", "scitail", "paws"]
METHODS = ["pemt", "full", "bitfit", "lora", "prompt", "adapter"]
# Where ../shared/data has rows of a task; the others' are those of the task table's test, with other labels.
REAL = {
    "mnli": "glue/MNLI/train.slice.json",
    "qnli": "glue/QNLI/train.slice.json",
    "qqp": "glue/QQP/train.slice.json",
    "sst2": "glue/SST-2/dev.tsv",
    "squad": "squad/squad_v2_dev_slice.json",
    "superglue-record": "superglue/ReCoRD/train.32shot.jsonl",
    "stsb": "glue/STS-B/dev.tsv",
    "mrpc": "glue/MRPC/dev.tsv",
    "rte": "superglue/RTE/val.jsonl",
    "cola": "glue/CoLA/dev.tsv",
    "superglue-multirc": "superglue/MultiRC/train.32shot.jsonl",
    "superglue-boolq": "superglue/BoolQ/val.slice.jsonl",
    "superglue-wic": "superglue/WiC/val.jsonl",
    "superglue-cb": "superglue/CB/train.jsonl",
    "newsqa": "mrqa/newsqa_sample.jsonl",
    "yelp_polarity": "yelp/dev.json",
    "paws": "paws/paws_qqp_dev_and_test.tsv",
}
OTHER_LABELS = {
    "superglue-wsc-fixed": ("label", (0, 1)),
    "winogrande": ("answer", ("1", "2")),
    "scitail": ("gold_label", ("entailment", "neutral")),
}
MOST = 32  # rows of a class, as many as the largest k
SMALL = {
    "bf16": False,
    "max_steps": 2,
    "max_source_length": 24,
    "max_target_length": 8,
    "eval_strategy": "no",
    "max_eval_samples": 2,
    "report_to": [],
}


@pytest.fixture(scope="module")
def paper() -> Callable[[str], Sweep]:
    pytest.importorskip("peft")
    return cache(lambda name: read_sweep(sweep_file(name)))


def test_all_data_as_published(paper: Callable[[str], Sweep]) -> None:
    sweep = paper("paper_full")
    assert sweep.tasks == [*GLUE, *SUPERGLUE, *MRQA, *OTHERS]
    assert (sweep.methods, sweep.seeds[0]) == (METHODS, 4096)
    assert len(sweep.runs) == 17 * len(METHODS) * len(sweep.seeds)
    stage_1 = sweep.sources
    assert [each.task_name.removeprefix("paper-") for each in stage_1] == SOURCES
    assert {(each.learning_rate, each.per_device_train_batch_size) for each in stage_1} == {
        (5e-4, 128)
    }
    assert {(each.num_train_epochs, each.warmup_steps, each.expert.rank) for each in stage_1} == {
        (5, 500, 64)
    }
    ours = [run.config for run in sweep.runs if run.method == "pemt"]
    assert {(each.learning_rate, each.per_device_train_batch_size) for each in ours} == {(3e-4, 32)}
    assert {(each.num_train_epochs, each.max_source_length) for each in ours} == {(20, 256)}
    assert {each.data_seed for each in ours} == {42}
    assert {tuple(each.source_tasks or ()) for each in ours} == {
        tuple(each.task_name for each in stage_1)
    }
    assert {each.bank_dir for each in (*ours, *stage_1)} == {"runs/paper-bank"}
    rates = {run.method: run.config.learning_rate for run in sweep.runs}
    assert [rates[name] for name in ("full", "bitfit", "lora", "prompt")] == [3e-4, 3e-4, 6e-4, 0.3]
    assert sweep.published["pemt"] == {"superglue-cb": 92.86}


def test_few_shot_as_published(paper: Callable[[str], Sweep]) -> None:
    sweep = paper("paper_few_shot")
    drawn = Counter(
        (run.config.task_name, run.config.few_shot, run.config.per_device_train_batch_size)
        for run in sweep.runs
    )
    assert drawn == {
        (f"paper-{task}", k, k): len(METHODS) * len(sweep.seeds)
        for task in ("superglue-boolq", "superglue-cb", "scitail")
        for k in (4, 16, 32)
    }
    assert sweep.sources == [
        type(each)(**{**vars(each), "output_dir": each.output_dir.replace("full", "few-shot")})
        for each in paper("paper_full").sources
    ]


def test_a_name_that_is_no_sweeps_is_an_error(tmp_path: Path) -> None:
    assert sweep_file(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    for name in ("adapt", "paper_none"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            read_sweep(sweep_file(name))


def test_hours_by_hand() -> None:
    job = Job(shape=KNOWN["t5-base"], batch=32)
    alone, eight = (
        Cluster(nodes=1, gpus_per_node=n, chip=CHIPS["a100-80"], efficiency=0.2) for n in (1, 8)
    )
    zero = Zero(name="zero2.json", stage=2)
    run = PlannedRun(group="pemt", job=job, steps=100, evaluated=65, eval_batch=64, checkpoints=3)
    (found,) = hours_of([run, run], zero, alone, least=0.0).values()
    second = step_time(job, zero, alone).total
    assert found.training == pytest.approx(2 * 100 * second / 3600)
    assert found.evaluation == pytest.approx(2 * 2 * 2 * second / 3600, rel=0.05), (
        "two batches of 64"
    )
    # adapters, gates in the encoder and in the decoder, layer norms, prompt
    trained = 24 * 74_544 + 12 * 6 * 3072 + 12 * 6 * 768 + 62 * 768 + 20 * 768
    assert found.disk == 2 * 3 * 12 * trained
    (slow,) = hours_of([run], zero, alone, least=10.0).values()
    assert (slow.training, slow.evaluation) == (100 * 10 / 3600, 2 * 10 / 3600)
    # a batch of 4 leaves 4 of 8 GPUs idle; of 32, each takes 4
    (shared,) = hours_of([run], zero, eight, least=0.0).values()
    assert 0.1 < shared.training / (found.training / 2) < 0.2
    small = PlannedRun(
        group="k", job=Job(shape=KNOWN["t5-base"], batch=4), steps=1, evaluated=0, eval_batch=1, checkpoints=1
    )  # fmt: skip
    (few,) = hours_of([small], zero, eight, least=1.0).values()
    assert few.training == 1 / 3600


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("paper-superglue-cb", (250, 28, 28)),
        ("superglue-multirc", (27_243, 2_424, 2_424)),
        ("qqp", (362_849, 1_000, 40_430)),
        ("paper-mnli", (392_702, 9_815, 9_815)),
        ("paws", (49_401, 8_000, 8_000)),
        ("yelp_polarity", (559_000, 1_000, 38_000)),
    ],
)
def test_examples_by_the_split_rule(name: str, sizes: tuple[int, int, int]) -> None:
    assert examples_of(get_task(name)) == sizes


def test_a_sweep_is_planned(
    paper: Callable[[str], Sweep],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pemt.sweep.read_sweep", lambda path: paper(path.stem))
        COMMANDS["plan"](["--sweep", "paper_full", "--json"])
        first, second = json.loads(capsys.readouterr().out)
        COMMANDS["plan"](["--sweep=paper_few_shot"])
        told = capsys.readouterr().out
    machines = [(each["gpus"], each["gpu"]) for each in (first, second)]
    assert machines == [(1, "h100-80"), (8, "a100-80")]
    assert list(first["groups"]) == ["stage 1", *METHODS]
    assert [each["runs"] for each in first["groups"].values()] == [6, *[51] * len(METHODS)]
    assert all(each["all_fit"] for each in first["groups"].values())
    assert first["groups"]["full"]["disk"] == 51 * 3 * 12 * 222_903_552
    assert "8 x a100-80" in told
    assert "nothing is measured. Assumed: 20%" in told


def test_a_sweep_of_unknown_sizes_is_not_planned(tmp_path: Path) -> None:
    content = {"output_dir": "o", "methods": ["adapter"], "tasks": ["rte"], "seeds": [0]}
    content["fields"] = {"model_name_or_path": "t5-base", "data_dir": str(tmp_path)}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PlanError, match="task rte: the number of its examples is not known"):
        COMMANDS["plan"](["--sweep", str(path)])
    with pytest.raises(ConfigError, match=r"--efficiency: found 0\.0"):
        COMMANDS["plan"](["--sweep", str(path), "--efficiency", "0"])


def rows_of(name: str, shared: Path) -> Iterator[dict[str, Any]]:
    """At most MOST rows of each class, and of what has none; real ones where ../shared/data has them."""
    task = get_task(name)
    if name in REAL:
        seen: Counter[str] = Counter()
        for _, row in read_rows(task, [shared / "data" / REAL[name]]):
            assert not isinstance(row, RowError), row
            example = example_of(task, row)
            kind = example["target"] if example and task.labels else "all"
            if example and seen[kind] < MOST:
                seen[kind] += 1
                yield dict(row)
    else:
        key, labels = OTHER_LABELS.get(name, ("", ("",)))
        for number in range(MOST):
            for label in labels:
                yield {**HUB_ROWS[name][0], **({key: label} if key else {}), "n": number}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Path]:
    """A tiny random T5 with the real vocabulary; as the working directory, in which `write_files` writes."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=32128, decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    load_tokenizer(str(shared / "data" / "t5_tokenizer")).save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        # each of the runs would spend a third of its time on these
        patch.setattr("pemt.model.base.load_tokenizer", cache(load_tokenizer))
        patch.setattr("pemt.sweep.report.draw", lambda *_: None)
        yield folder


def write_files(name: str, shared: Path) -> None:
    folder = Path(name)
    if folder.is_dir():
        return
    folder.mkdir()
    rows = [json.dumps(row) + "\n" for row in rows_of(name, shared)]
    (folder / "train.jsonl").write_text("".join(rows))
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(islice(rows, 6)))


def dry_run(
    recipe: str, shared: Path, *, methods: list[str], tasks: Collection[str]
) -> dict[tuple[str, str], str]:
    """The recipe, made small, run with some of its methods on some of its tasks; (task, method) -> the mean score."""
    content = yaml.safe_load(sweep_file(recipe).read_text())
    content["fields"] |= {"model_name_or_path": "base", **SMALL}
    content["source_fields"] |= {**SMALL, "expert": {"rank": 2}}
    content["seeds"] = content["seeds"][:1]
    content["methods"] = {name: content["methods"][name] for name in methods}
    content["tasks"] = {name: each for name, each in content["tasks"].items() if name in tasks}
    content["output_dir"] = out = f"{recipe}-{len(methods)}"
    for name, each in (*content["sources"].items(), *content["tasks"].items()):
        each["data_dir"] = each.get("task_name", name).removeprefix("paper-")
        write_files(each["data_dir"], shared)
    if "superglue-cb" not in content["tasks"]:
        content["published"]["numbers"] = {"pemt": {}}
    Path("dry.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run_sweep(read_sweep(Path("dry.yaml")))
    with Path(out, "sweep.csv").open() as file:
        return {(row["task"], row["method"]): row["mean"] for row in csv.DictReader(file)}


ALL = (*GLUE, *SUPERGLUE, *MRQA, *OTHERS)
# A number, a score below 0, rows that belong together, published numbers, answers of no list, rows of one file.
KINDS = ("stsb", "cola", "superglue-multirc", "superglue-cb", "nq", "paws")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("tasks", [KINDS, pytest.param(ALL, marks=pytest.mark.soak)], ids=len)
def test_a_dry_run_of_all_tasks(
    dry: Path, shared: Path, capfd: pytest.CaptureFixture[str], tasks: tuple[str, ...]
) -> None:
    shutil.rmtree("runs", ignore_errors=True)  # the bank of another parameter
    scores = dry_run("paper_full", shared, methods=["pemt"], tasks=tasks)
    assert sorted(scores) == sorted((task, "pemt") for task in tasks)
    assert all(0 <= float(each) <= 100 or task == "cola" for (task, _), each in scores.items())
    told = capfd.readouterr().out
    assert "source 6 of 6: paper-superglue-record" in told
    table = Path("paper_full-1", "sweep.md").read_text()
    score = float(scores["superglue-cb", "pemt"])
    assert f"| superglue-cb | pemt | {score:.1f} | 92.86 | {score - 92.86:+.2f} |" in table
    assert f"| paws | pemt | {float(scores['paws', 'pemt']):.1f} | – | – |" in table
    assert "README of github.com/JachinLin2022/PEMT" in table

    scores = dry_run("paper_few_shot", shared, methods=["pemt"], tasks=("cb-4", "cb-32"))
    assert len(scores) == 2
    assert all(scores.values())
    told = capfd.readouterr().out
    kept = ", ".join(f"paper-{name}" if name != "squad" else name for name in SOURCES)
    assert f"in the bank runs/paper-bank, kept: {kept}" in told
    assert "few_shot 32, but class neutral has 16 training examples: all are taken" in told

    scores = dry_run("paper_full", shared, methods=METHODS, tasks=("superglue-cb",))
    assert [method for _, method in scores] == METHODS
    assert all(scores.values())
