"""Data sets laid out as on the hub, from a folder, and over HTTP from a stand-in for the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase

from pemt.config.schema import AdaptConfig
from pemt.data import DataError, load_task_data
from pemt.data.examples import locate_data
from pemt.model.tokenizer import load_tokenizer
from pemt.tasks import HubSource, Task, get_task, load_task_file
from tests.conftest import python
from tests.support.hub import hub
from tests.support.hub_datasets import DatasetHub
from tests.support.tiny import adapt_config, make_base

SENTENCES = ("It rains.", "Dogs bark.", "He runs.")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two configurations with class labels, in shards, named in the README's header as on the hub."""
    folder = tmp_path / "glue"
    header = ["configs:"]
    for config, flip in (("rte", 0), ("wnli", 1)):
        (folder / config).mkdir(parents=True)
        header += [f"- config_name: {config}", "  data_files:"]
        for split, sizes in (("train", (20, 10)), ("validation", (8,)), ("test", (4,))):
            header += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            for shard, size in enumerate(sizes):
                write_shard(folder / config, split, shard, len(sizes), size, flip)
    (folder / "README.md").write_text("\n".join(["---", *header, "---", "# A data set"]))
    return folder


def write_shard(folder: Path, split: str, shard: int, shards: int, size: int, flip: int) -> None:
    rows = {
        "sentence1": [SENTENCES[i % 3] for i in range(size)],
        "sentence2": [f"{split} {shard} {i}" for i in range(size)],
        "label": [-1 if split == "test" else (i + flip) % 2 for i in range(size)],
        "idx": list(range(size)),
    }
    labels = {"names": ["entailment", "not_entailment"], "_type": "ClassLabel"}
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "sentence1": text,
        "sentence2": text,
        "label": labels,
        "idx": {"dtype": "int32", "_type": "Value"},
    }
    table = pa.table(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(table, folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet")


def at(repository: Path, name: str, **changes: Any) -> Any:
    """A task of the table, with its data set in a folder."""
    task = get_task(name)
    assert task.hub is not None
    return replace(task, hub=replace(task.hub, path=str(repository), **changes))


def loaded(task: Task) -> dict[str, datasets.Dataset]:
    """All that the data set has of a task."""
    location = locate_data(task, None)
    return {split: location.examples(split) for split in location.splits}


@pytest.mark.parametrize(("name", "first"), [("rte", "0"), ("wnli", "1")])
def test_configuration_and_splits_are_those_of_the_table(
    repository: Path, name: str, first: str
) -> None:
    parts = loaded(at(repository, name))
    # The hub's test set has no labels: it is not asked for.
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 30, "validation": 8}
    row = parts["train"][0]
    assert row["source"] == "sentence1: It rains. sentence2: train 0 0"
    assert row["target"] == first
    assert parts["train"][20]["source"].endswith("train 1 0")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_base(tmp_path_factory.mktemp("hub") / "base")))


def config_of(tmp_path: Path, **changes: Any) -> AdaptConfig:
    paths = (tmp_path, tmp_path, tmp_path / "out", tmp_path / "bank")
    return replace(adapt_config(*paths, "rte", method="adapter", **changes), data_dir=None)


def test_a_run_reads_it_by_the_split_rule(
    repository: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load_task_data(at(repository, "rte"), config_of(tmp_path), tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [30, 4, 4]


def test_streamed_rows_are_the_same(
    repository: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = at(repository, "rte")
    both = replace(task, hub=replace(task.hub, test="validation"))
    fields: dict[str, Any] = {"streaming": True, "max_steps": 1, "eval_strategy": "no"}
    data = load_task_data(both, config_of(tmp_path, **fields), tokenizer)
    assert [row["source"] for row in data.train.well_formed()] == loaded(task)["train"]["source"][:]


def test_a_malformed_row_is_told_by_its_place(
    repository: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = at(repository, "rte", train="test", validation="validation")
    with pytest.raises(DataError, match=r"glue/rte/test: row 1: field 'label': unknown label -1"):
        load_task_data(task, config_of(tmp_path), tokenizer)


def test_what_is_not_there_is_told(repository: Path) -> None:
    with pytest.raises(DataError, match=r"glue \(mrpc, train\) could not be loaded: .*mrpc"):
        loaded(at(repository, "rte", config="mrpc"))
    with pytest.raises(DataError, match=r"\(rte, dev\) could not be loaded: .*dev"):
        loaded(at(repository, "rte", validation="dev"))


def test_a_task_file_may_name_it(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "name: own\ndescription: Decide.\ntemplate: 'a: {sentence1} b: {sentence2}'\n"
        "labels: ['yes', 'no']\nmetrics: [accuracy]\n"
        f"hub: {{path: {repository}, config: wnli, revision: v1.0}}\n"
    )
    task = load_task_file(path)
    assert task.hub == HubSource(path=str(repository), config="wnli", revision="v1.0")
    assert loaded(task)["train"][0]["target"] == "no"


def test_a_data_set_without_validation(
    repository: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for path in (repository / "wnli").glob("validation-*"):
        path.unlink()
    readme = repository / "README.md"
    lines = readme.read_text().splitlines()
    at = len(lines) - 1 - lines[::-1].index("  - split: validation")
    readme.write_text("\n".join([*lines[:at], *lines[at + 2 :]]))
    for path in (repository / "wnli").glob("test-*"):
        write_shard(path.parent, "train", 0, 1, 6, 0)  # with labels
        (path.parent / "train-00000-of-00001.parquet").rename(path)
    own = tmp_path / "own.yaml"
    own.write_text(
        "name: rte\ndescription: Decide.\ntemplate: '{sentence1} {sentence2}'\nlabels: ['0', '1']\n"
        "metrics: [accuracy]\n"
        f"hub: {{path: {repository}, config: wnli, validation: null, test: test}}\n"
    )
    data = load_task_data(load_task_file(own), config_of(tmp_path), tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [27, 3, 6]


LOADS = """
import json, sys
from dataclasses import replace
from pemt.config import PemtError
from pemt.data.examples import locate_data
from pemt.tasks import HubSource, get_task

task = replace(get_task("rte"), hub=HubSource(path="owner/glue", config="rte", revision="v1.5"))
location = locate_data(task, None)
parts = {split: location.examples(split) for split in location.splits}
streamed = [row["source"] for row in location.stream()]
assert streamed == parts["train"]["source"][:]
print(json.dumps({split: rows["target"][:] for split, rows in parts.items()}))
try:
    locate_data(replace(task, hub=HubSource(path="owner/none")), None).examples("train")
except PemtError as error:
    print(error)
"""


def test_a_hub_id_is_fetched_at_its_revision_whole_and_streamed(
    repository: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "owner").mkdir(parents=True)
    repository.rename(root / "owner" / "glue")
    with hub(root, DatasetHub) as environment:
        done = python("-c", LOADS, **environment, HF_DATASETS_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    found, absent = done.stdout.splitlines()[-2:]
    labels = json.loads(found)
    assert {split: len(targets) for split, targets in labels.items()} == {
        "train": 30,
        "validation": 8,
    }
    assert labels["validation"] == ["0", "1"] * 4
    assert "owner/none (default, train) could not be loaded" in absent
    assert "data_dir" in absent
    asked = (root / "asked.txt").read_text().splitlines()
    assert "/datasets/owner/glue/resolve/v1.5/README.md" in asked
