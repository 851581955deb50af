"""From files to tokenised sets: contents, caching, one builder per node, errors before training."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config

from pemt.config.schema import SourceConfig
from pemt.data import (
    DataError,
    encoding as encoding_module,
    examples as examples_module,
    lengths_of,
    load_split,
    load_task_data,
)
from pemt.model.tokenizer import TokenizerError, load_tokenizer
from pemt.tasks import HubSource, Task
from tests.conftest import python

WORDS = ["<pad>", "</s>", "<unk>", "text", ":", "no", "yes", *(f"w{i}" for i in range(20))]
TASK = Task(
    name="loading",
    description="Say yes or no.",
    template="text: {text}",
    labels=("no", "yes"),
    metrics=("accuracy",),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path):
    for split, size in (("train", 40), ("validation", 12), ("test", 8)):
        rows = [{"text": f"w{i % 20} " * (i % 5 + 1), "label": i % 2} for i in range(size)]
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    return tmp_path / "data"


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def config(folder, **changes):
    values = {"model_name_or_path": "m", "output_dir": "o", "task_name": "loading", "bank_dir": "b"}
    return SourceConfig(**{**values, "data_dir": str(folder) if folder else None, **changes})


def test_rows_become_token_ids_with_the_end_of_sequence(folder, tokenizer):
    data = load_task_data(TASK, config(folder), tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 12, 8]
    row = data.train[1]
    assert row["source"] == "text: w1 w1 "
    assert row["input_ids"] == [3, 4, 8, 8, 1]
    assert (row["target"], row["labels"], row["references"]) == ("yes", [6, 1], ["yes"])
    assert lengths_of(data.train)[:5].tolist() == [4, 5, 6, 7, 8]
    assert data.notes == ()


def test_long_sources_are_cut_before_the_end_of_sequence_and_counted(folder, tokenizer):
    data = load_task_data(TASK, config(folder, max_source_length=6), tokenizer)
    assert data.train[4]["input_ids"] == [3, 4, 11, 11, 11, 1]
    assert lengths_of(data.train).max() == 6
    assert data.notes[0] == (
        "loading, train: 16 of 40 sources are longer than 6 tokens and were cut"
    )


def test_few_shot_and_maxima_apply_to_their_splits(folder, tokenizer):
    data = load_task_data(TASK, config(folder, few_shot=3, max_eval_samples=5), tokenizer)
    assert sorted(data.train["target"]) == ["no"] * 3 + ["yes"] * 3
    assert [len(part) for part in (data.validation, data.test)] == [5, 5]
    other = load_task_data(TASK, config(folder, few_shot=3, data_seed=9), tokenizer)
    assert other.train["source"][:] != data.train["source"][:]


def test_a_label_longer_than_the_maximum_is_refused(folder, tokenizer):
    with pytest.raises(DataError, match=r"max_target_length: found 1, but label 'no' .* 2 tokens"):
        load_task_data(TASK, config(folder, max_target_length=1), tokenizer)


def test_training_on_every_answer_gives_a_row_per_reference(tmp_path, tokenizer):
    task = Task(
        name="every",
        description="D.",
        template="text: {text}",
        label="answers",
        train_on_every_answer=True,
        metrics=("squad",),
    )
    rows = [{"text": f"w{i}", "answers": ["w1", "w2"]} for i in range(4)]
    for split in ("train", "validation", "test"):
        write(tmp_path / "data" / f"{split}.jsonl", rows)
    data = load_task_data(task, config(tmp_path / "data"), tokenizer)
    assert [len(data.train), len(data.validation)] == [8, 4]
    assert data.train["target"][:2] == ["w1", "w2"]
    assert data.validation[0]["references"] == ["w1", "w2"]


def test_malformed_rows_stop_with_file_and_line_or_are_left_out(folder, tokenizer):
    with (folder / "train.jsonl").open("a") as file:
        file.write('\n{"text": "w1", "label": 5}\n{"text": [3], "label": 0}\n{broken\n')
    with pytest.raises(DataError, match=r"train.jsonl:41: .*unknown label 5.*\(and 2 more\)"):
        load_task_data(TASK, config(folder), tokenizer)
    for _ in range(2):  # the second time from the cache, which must tell the same
        data = load_task_data(TASK, config(folder, skip_bad_rows=True), tokenizer)
        assert len(data.train) == 40
        assert "left out 3 malformed rows, first " in data.notes[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "a \\ud800", "label": 1}', r"no UTF-8: '\\ud800' is half of a character"),
        (b'{"\\ud800": "a", "label": 1}', r"field 'text' is missing; found: \\ud800, label"),
        (b'{"text": "a", "label": ' + b"1" * 5000 + b"}", "JSON that is not read: Exceeds"),
        (b'{"text": "a", "label": "' + b"1" * 5000 + b'"}', "unknown label"),
        (b"[" * 100_000, "JSON that is not read: nested too deep"),
        (b'{"text": "a", "label": 1e999}', "unknown label inf"),
    ],
    ids=["half", "key", "integer", "digits", "deep", "inf"],
)
def test_odd_rows_stop_with_file_and_line_or_are_left_out(folder, tokenizer, row, message):
    with (folder / "train.jsonl").open("ab") as file:
        file.write(b"\n" + row + b"\n")
    with pytest.raises(DataError, match=r"train.jsonl:41: .*" + message) as caught:
        load_task_data(TASK, config(folder), tokenizer)
    assert "\n" not in str(caught.value)
    data = load_task_data(TASK, config(folder, skip_bad_rows=True), tokenizer)
    assert len(data.train) == 40
    assert "left out 1 malformed rows, first " in data.notes[0]


def test_a_file_that_breaks_off_is_told_in_one_line(folder, tokenizer):
    (folder / "train.jsonl").unlink()
    whole = gzip.compress(b'{"text": "w1", "label": 1}\n' * 1000)
    (folder / "train.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"train.jsonl.gz: cannot be read: Compressed file ended"):
        load_task_data(TASK, config(folder), tokenizer)


def count_calls(monkeypatch, module, name):
    calls = []
    original = getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_second_load_reads_and_tokenises_nothing(folder, tokenizer, monkeypatch):
    calls = count_calls(monkeypatch, examples_module, "example_of")
    encoded = count_calls(monkeypatch, encoding_module, "encode_batch")
    first = load_task_data(TASK, config(folder), tokenizer)
    assert (len(calls), len(encoded)) == (60, 3)
    tokenizer("a call that changes the tokenizer's inner state", truncation=True, max_length=3)
    second = load_task_data(TASK, config(folder), tokenizer)
    assert (len(calls), len(encoded)) == (60, 3)
    assert second.train[:] == first.train[:]


@pytest.mark.parametrize("asked", [None, 2])
def test_several_processes_give_the_same_rows(folder, tokenizer, monkeypatch, asked):
    alone = load_task_data(TASK, config(folder), tokenizer).train[:]
    encoded = count_calls(monkeypatch, encoding_module, "encode_batch")
    if asked is None:
        monkeypatch.setattr(encoding_module, "PARALLEL_FROM", 1)
        monkeypatch.setattr(encoding_module.os, "cpu_count", lambda: 2)
    # Another maximum, which no target reaches, so that the cache is not used.
    changed = config(folder, max_target_length=9, preprocessing_num_workers=asked)
    assert load_task_data(TASK, changed, tokenizer).train[:] == alone
    assert not encoded, "it was other processes that tokenised"


def test_the_number_of_processes_does_not_make_the_cache_another_one(
    folder, tokenizer, monkeypatch
):
    load_task_data(TASK, config(folder), tokenizer)
    encoded = count_calls(monkeypatch, encoding_module, "encode_batch")
    load_task_data(TASK, config(folder, preprocessing_num_workers=1), tokenizer)
    assert not encoded


def test_another_file_template_or_length_is_read_anew(folder, tokenizer, monkeypatch):
    encoded = count_calls(monkeypatch, encoding_module, "encode_batch")
    load_task_data(TASK, config(folder), tokenizer)
    load_task_data(TASK, config(folder, max_source_length=5), tokenizer)
    assert len(encoded) == 6
    other = Task(**{**vars(TASK), "template": "text {text}"})
    assert load_task_data(other, config(folder), tokenizer).train[0]["source"] == "text w0 "
    write(folder / "train.jsonl", [{"text": "w9", "label": 1}] * 3)
    assert load_task_data(TASK, config(folder), tokenizer).train[0]["source"] == "text: w9"


def test_the_tasks_own_files_are_read_without_a_data_dir(folder, tokenizer):
    files = tuple((split, str(folder / f"{split}.jsonl")) for split in ("train", "test"))
    task = Task(**{**vars(TASK), "files": files})
    data = load_task_data(task, config(None), tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 4, 8]
    missing = Task(**{**vars(TASK), "files": (("train", str(folder / "no.jsonl")),)})
    with pytest.raises(DataError, match=r"no.jsonl: no such file, which task loading reads"):
        load_task_data(missing, config(None), tokenizer)


def test_the_published_test_file_without_labels_is_left_alone(folder, tokenizer):
    write(folder / "test.jsonl", [{"text": "w1"}])
    task = Task(**{**vars(TASK), "hub": HubSource(path="a/b")})
    data = load_task_data(task, config(folder), tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 6, 6]
    note = f"loading, test: left out {folder}/test.jsonl, which has no label"
    assert data.notes == (note,)
    with pytest.raises(DataError, match=r"field 'label' is missing"):
        load_task_data(TASK, config(folder), tokenizer)  # its test set ought to have labels
    write(folder / "test.jsonl", [{"text": "w1"}, {"text": "w2", "label": -1}])
    assert load_task_data(task, config(folder), tokenizer).notes == (note,)


def test_a_test_file_with_labels_is_used_whatever_the_hub_has(folder, tokenizer):
    task = Task(**{**vars(TASK), "hub": HubSource(path="a/b")})
    data = load_task_data(task, config(folder), tokenizer)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 12, 8]
    assert data.notes == ()
    write(folder / "test.jsonl", [{"text": "w1"}, {"text": "w2", "label": 1}])
    with pytest.raises(DataError, match=r"test.jsonl:1: field 'label' is missing"):
        load_task_data(task, config(folder), tokenizer)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_alone_is_as_it_is_among_the_others(folder, tokenizer, split):
    data = load_task_data(TASK, config(folder, max_eval_samples=5), tokenizer)
    alone, notes, made = load_split(TASK, config(folder, max_eval_samples=5), tokenizer, split)
    assert alone[:] == getattr(data, split)[:]
    assert notes == ()
    assert made == data.origins[split]
    if split != "train":
        of = {"validation": 12, "test": 8}[split]
        assert made == f"max_eval_samples 5 of the {of} of the official {split} set"
    # By the split rule, one half of validation.
    (folder / "test.jsonl").unlink()
    data = load_task_data(TASK, config(folder), tokenizer)
    alone, _, made = load_split(TASK, config(folder), tokenizer, split)
    assert alone[:] == getattr(data, split)[:]
    assert len(alone) == {"train": 40, "validation": 6, "test": 6}[split]
    whole, half = "the official train set", "half of the official validation set, data_seed 42"
    assert made == data.origins[split] == (whole if split == "train" else half)


def test_a_training_set_alone_is_the_one_that_was_drawn(folder, tokenizer):
    few = config(folder, few_shot=4)
    alone, *_ = load_split(TASK, few, tokenizer, "train")
    assert alone[:] == load_task_data(TASK, few, tokenizer).train[:]
    assert len(alone) == 8


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_alone_needs_no_other(folder, tokenizer, monkeypatch, split):
    encoded = count_calls(monkeypatch, encoding_module, "encode_batch")
    load_split(TASK, config(folder), tokenizer, split)
    assert len(encoded) == 1
    for path in folder.iterdir():
        if path.name != f"{split}.jsonl":
            path.unlink()
    alone, *_ = load_split(TASK, config(folder), tokenizer, split)
    assert len(alone) == {"train": 40, "validation": 12, "test": 8}[split]
    other = "test" if split == "train" else "train"
    with pytest.raises(DataError, match=f"found {split}; train and at least one of validation"):
        load_split(TASK, config(folder), tokenizer, other)


@pytest.mark.parametrize("processes", [None, 2])
def test_tokenising_shows_a_bar(folder, tokenizer, capfd, processes):
    datasets.enable_progress_bars()  # a test before this one may have made a run, which is quiet in files
    load_task_data(TASK, config(folder, preprocessing_num_workers=processes), tokenizer)
    shown = capfd.readouterr().err
    assert "tokenising" in shown
    assert "40/40" in shown
    assert "100%" in shown


def test_the_hub_is_asked_for_the_splits_of_the_table(folder, tokenizer, monkeypatch):
    asked = []

    def load(path, name, *, split, revision, streaming):
        assert not streaming
        asked.append((path, name, split, revision))
        rows = [{"text": f"w{i}", "label": i % 2 if i else -1} for i in range(9)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(examples_module, "load_dataset", load)
    hub = HubSource(path="a/b", config="c", validation="validation_matched", revision="v1")
    task = Task(**{**vars(TASK), "hub": hub, "no_label": ("-1",)})
    data = load_task_data(task, config(None), tokenizer)
    assert asked == [("a/b", "c", "train", "v1"), ("a/b", "c", "validation_matched", "v1")]
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 4, 4]
    assert data.notes[0] == "loading, train: left out 1 rows without gold label"


def test_an_unreachable_hub_points_at_data_dir(tokenizer):
    task = Task(**{**vars(TASK), "hub": HubSource(path="nobody/nothing")})
    with pytest.raises(
        DataError, match=r"nobody/nothing .* could not be loaded: .*data_dir"
    ) as caught:
        load_task_data(task, config(None), tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no data set on the hub; give data_dir"):
        load_task_data(TASK, config(None), tokenizer)


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer_name: nothing could be loaded from"):
        load_tokenizer(str(tmp_path))
    # Of a base model alone transformers would make a tokenizer that knows special tokens only.
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="there are no tokenizer's files"):
        load_tokenizer(str(tmp_path))


READ_MANY = """
import resource, sys
from pathlib import Path
from pemt.data.examples import locate_data
from pemt.tasks import Task
task = Task(
    name="big", description="D.", template="{text}", labels=("no", "yes"), metrics=("accuracy",)
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
examples = locate_data(task, sys.argv[1]).examples("train")
print(len(examples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_reading_does_not_hold_the_data_in_memory(tmp_path):
    row = json.dumps({"text": "many words " * 1_000, "label": 1}) + "\n"
    with (tmp_path / "train.jsonl").open("w") as file:
        for _ in range(10_000):
            file.write(row)
    size = (tmp_path / "train.jsonl").stat().st_size // 1024
    arguments = ("-c", READ_MANY, str(tmp_path))
    result = python(*arguments, check=True, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    rows, grown = map(int, result.stdout.split())
    assert rows == 10_000
    assert grown < size / 2, f"{grown} KiB more for a file of {size} KiB"
