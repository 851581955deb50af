"""What a base model says of generation never changes a score or an answer, and is told once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from pemt.model import FullT5
from pemt.model.base import load_pretrained
from pemt.publish.export import export_run
from pemt.publish.pemt_model import PemtModel
from pemt.run.finished import finished_config, load_finished
from pemt.run.predict import Predictor
from pemt.run.train import run_adapt
from tests.support.tiny import adapt_config, make_base, tiny_task, write_task_files

TARGET = "tiny-generation"
TEXTS = ["text : the box is red", "text : the lid is white and the box is blue"]
YES, NO = 11, 12
# As they stand in a file; what transformers' own `generate` would make of them is another answer or an error.
SETTINGS: dict[str, dict[str, Any]] = {
    "generation_config.json": {
        "min_length": 8,
        "max_length": 2,
        "no_repeat_ngram_size": 1,
        "num_return_sequences": 2,
        "num_beams": 4,
        "do_sample": True,
        "suppress_tokens": [YES, NO],
        "begin_suppress_tokens": [1],
        "bad_words_ids": [[YES]],
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 5,
        "repetition_penalty": 9.0,
        "eos_token_id": [1, YES],
        "decoder_start_token_id": 9,
        "return_dict_in_generate": True,
        "max_time": 1e-9,
        "sequence_bias": [[[YES], -100.0]],
        "exponential_decay_length_penalty": [1, 5.0],
    },
    "config.json": {
        "min_length": 8,
        "max_length": 2,
        "no_repeat_ngram_size": 1,
        "num_beams": 4,
        "num_return_sequences": 2,
        "forced_bos_token_id": 9,
        "bad_words_ids": [[NO]],
        "suppress_tokens": [YES],
        "task_specific_params": {"summarization": {"min_length": 30}},
    },
}


def noisy_copy(base: Path, folder: Path, file: str, settings: dict[str, Any]) -> Path:
    """The base with settings in one of its files; an old one has no generation_config.json."""
    shutil.copytree(base, folder)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("generation") / "base")


def answers(name: Path, **given: Any) -> Tensor:
    loaded, tokenizer = load_pretrained(str(name), str(name))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return FullT5(loaded).generate(
            batch["input_ids"], batch["attention_mask"], max_new_tokens=5, **given
        )


@pytest.mark.parametrize(
    ("file", "key"), [(file, key) for file, settings in SETTINGS.items() for key in settings]
)
def test_one_setting(
    base: Path, tmp_path: Path, file: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = noisy_copy(base, tmp_path / "noisy", file, {key: SETTINGS[file][key]})
    assert torch.equal(answers(noisy), answers(base))
    told = capsys.readouterr().err
    assert told.count("are not used") == 1
    assert f"generation settings of {noisy} are not used: {key} " in told


def test_what_is_asked_for_is_done(base: Path, tmp_path: Path) -> None:
    noisy = noisy_copy(base, tmp_path / "noisy", *next(iter(SETTINGS.items())))
    assert answers(noisy, num_beams=3, num_return_sequences=2).shape[0] == 2 * len(TEXTS)
    assert answers(noisy, min_new_tokens=5).shape[1] == 6


def test_a_base_that_says_nothing_is_told_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"num_beams": 1, "do_sample": False, "min_length": 0, "top_k": 50, "eos_token_id": 1}
    answers(noisy_copy(base, tmp_path / "quiet", "generation_config.json", nothing))
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken" / "generation_config.json").write_text("{")
    answers(tmp_path / "broken")
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def world(base: Path) -> Path:
    """A run of two methods on a base whose files say much."""
    folder = base.parent
    tiny_task(TARGET)
    write_task_files(folder / TARGET, seed=0)
    for file, settings in SETTINGS.items():
        noisy_copy(base, folder / f"noisy-{file}", file, settings)
    for method in ("full", "lora"):
        config = adapt_config(
            folder / "noisy-generation_config.json", folder / TARGET, folder / method, folder, TARGET,
            method=method, max_steps=4, num_beams=2, eval_strategy="no",
        )  # fmt: skip
        run_adapt(config)
    return folder


@pytest.mark.parametrize("name", ["base", *(f"noisy-{file}" for file in SETTINGS)])
def test_a_run_answers_alike_on_every_copy_of_its_base(world: Path, name: str) -> None:
    config = finished_config(world / "full", ["--model_name_or_path", str(world / name)])
    predictor = Predictor(load_finished(world / "full", config))
    own = [json.loads(line) for line in (world / "full" / "predictions.jsonl").open()]
    found = predictor([line["input"] for line in own], constrain_labels=False)
    assert [each.prediction for each in found] == [line["prediction"] for line in own]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_export_answers_by_transformers_as_the_run_was_scored(
    world: Path, tmp_path: Path, method: str
) -> None:
    folder = export_run(world / method, tmp_path / "export")
    text = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(text.replace("path/to/this/folder", str(folder)), names)
    model = names["model"].eval()
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.num_beams, settings.max_new_tokens) == (2, 4)
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    own = [json.loads(line) for line in (world / method / "predictions.jsonl").open()]
    batch = tokenizer([line["input"] for line in own], padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch)
    found = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert found == [line["prediction"] for line in own]
    assert not any("task_specific" in each.read_text() for each in folder.glob("*.json"))


def test_serving(world: Path, tmp_path: Path) -> None:
    run_adapt(
        adapt_config(
            world / "base",
            world / TARGET,
            tmp_path / "run",
            world,
            TARGET,
            method="adapter",
            max_steps=2,
            eval_strategy="no",
        )
    )
    folder = export_run(tmp_path / "run", tmp_path / "export")
    told = [
        PemtModel.from_pretrained(folder, base_model=str(world / name), device="cpu").generate(
            TEXTS
        )
        for name in ("base", *(f"noisy-{file}" for file in SETTINGS))
    ]
    assert told[0] == told[1] == told[2]


def test_transformers_alone_would_have_answered_otherwise(world: Path) -> None:
    """Or these tests show nothing."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    asked = {"do_sample": False, "num_beams": 1, "max_new_tokens": 5, "num_return_sequences": 1}
    clean, old = (
        AutoModelForSeq2SeqLM.from_pretrained(world / name).eval().generate(**batch, **asked)
        for name in ("base", "noisy-config.json")
    )
    assert clean.shape != old.shape or not torch.equal(clean, old)
