"""`target_model` and `source_model` in transformers' own trainer and in a loop: the losses of `pemt adapt`, small
checkpoints, what is saved and loaded again."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    set_seed,
)

import pemt
from pemt.bank import read_entry
from pemt.config import AdapterConfig, ExpertConfig, MixtureConfig, PemtError
from tests.conftest import ROOT
from tests.support.tiny import (
    adapt_config,
    losses,
    make_base,
    source_config,
    tiny_task,
    write_task_files,
)
from tests.support.tiny_t5 import tiny_base, tiny_batch, tiny_sources

SOURCE, TARGET = "tiny-module-a", "tiny-module-target"
MIXTURE = MixtureConfig(prompt_dropout=0.0, sparsity_over_padding=True)
STEPS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a bank of one real expert and one of another seed, and a run of `pemt adapt` on four examples."""
    folder = tmp_path_factory.mktemp("module")
    make_base(folder / "base")
    for seed, task in enumerate((SOURCE, TARGET)):
        tiny_task(task)
        write_task_files(folder / task, seed=seed, rows=4)
    for entry, seed in (("a", 1), ("b", 2)):
        tiny_task(f"tiny-module-{entry}")
        config = source_config(
            folder / "base", folder / SOURCE, folder / f"source-{entry}", folder / "bank",
            f"tiny-module-{entry}", expert=ExpertConfig(rank=2), seed=seed, max_steps=3,
        )  # fmt: skip
        pemt.run_source(config)
    return folder


def rows_of(world: Path) -> list[dict[str, Any]]:
    lines = (world / TARGET / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tokenised(world: Path) -> tuple[Any, Dataset]:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    encoded = [
        {
            "input_ids": tokenizer(f"text : {row['text']}").input_ids,
            "attention_mask": [1] * len(tokenizer(f"text : {row['text']}").input_ids),
            "labels": tokenizer(("no", "yes")[row["label"]]).input_ids,
        }
        for row in rows_of(world)
    ]
    return tokenizer, Dataset.from_list(encoded)


def trainer_of(world: Path, model: torch.nn.Module, folder: Path, **given: Any) -> Seq2SeqTrainer:
    tokenizer, data = tokenised(world)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **given,
    }
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **settings),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def target(world: Path) -> pemt.TargetModel:
    set_seed(42)
    return pemt.target_model(str(world / "base"), world / "bank", task=TARGET, mixture=MIXTURE)


def logged(trainer: Seq2SeqTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_seq2seq_trainer_gives_the_losses_of_pemt_adapt(world: Path, tmp_path: Path) -> None:
    config = adapt_config(
        world / "base", world / TARGET, tmp_path / "run", world / "bank", TARGET,
        mixture=MIXTURE, max_steps=STEPS, eval_strategy="no",
    )  # fmt: skip
    pemt.run_adapt(config)
    ours = losses(tmp_path / "run")
    trainer = trainer_of(world, target(world), tmp_path / "trainer")
    trainer.train()
    # the same four examples in each step, in another order within the batch; Trainer rounds what it logs
    assert logged(trainer) == pytest.approx(list(ours.values()), rel=1e-4, abs=1e-4)
    assert abs(ours[1] - ours[STEPS]) > 0.05, "it has learned something"
    scores = trainer.evaluate()
    assert scores["eval_loss"] < ours[1]


def test_trainers_accumulation_is_a_mean(world: Path, tmp_path: Path) -> None:
    """With `accepts_loss_kwargs` it would be a sum: Trainer asks the model who divides."""
    halves: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model = target(world)
    trainer = trainer_of(world, model, tmp_path, max_steps=1, **halves)
    assert trainer.model_accepts_loss_kwargs is False
    trainer.train()
    whole = trainer_of(world, target(world), tmp_path / "whole", max_steps=1)
    whole.train()
    assert logged(trainer) == pytest.approx(logged(whole), rel=0.05)


def test_only_what_is_trained_wants_gradients_and_is_saved(world: Path, tmp_path: Path) -> None:
    model = target(world)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {f"pemt.{name}" for name, _ in model.pemt.trainable_parameters()}
    assert model.state_dict().keys() == trained
    assert all(module.training for module in model.modules())
    trainer = trainer_of(world, model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == trained
    again = trainer_of(world, target(world), tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(again)[-1] == pytest.approx(logged(trainer)[-1], rel=1e-3)
    with pytest.raises(RuntimeError, match=r"Missing key.*prompt"):
        model.load_state_dict({})
    # as a part of another module, as in Lightning
    both = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "model": model})
    state = both.state_dict()
    assert state.keys() == {"head.weight", "head.bias", *(f"model.{name}" for name in trained)}
    both.load_state_dict(state)
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"head.bias\"\."):
        both.load_state_dict(state)


def test_it_takes_and_gives_what_t5_does(world: Path) -> None:
    base, tokenizer = tiny_base(), AutoTokenizer.from_pretrained(world / "base")
    model = pemt.target_model(base, tiny_sources(), tokenizer=tokenizer, description="the box")
    model.eval()
    batch = tiny_batch()
    out = model(**batch)
    plain = T5ForConditionalGeneration(base.config)(**batch)
    assert [*out] == [key for key in plain if key in out]
    assert out.logits.shape == plain.logits.shape
    shifted = base.prepare_decoder_input_ids_from_labels(batch["labels"])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    without = model(**inputs, decoder_input_ids=shifted)
    assert without.loss is None
    torch.testing.assert_close(without.logits, out.logits)
    as_tuple = model(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)
    torch.testing.assert_close(as_tuple[1], out.logits)
    told = model.pemt(**batch)
    assert out.loss == told.ce_loss + 0.1 * told.sparsity_loss
    generated = model.generate(**inputs, max_new_tokens=3, labels=batch["labels"])
    assert generated.shape[0] == len(batch["input_ids"])


def test_what_is_saved_answers_and_goes_on(world: Path, tmp_path: Path) -> None:
    model = target(world)
    trainer_of(world, model, tmp_path / "run").train()
    model.save_pretrained(tmp_path / "saved")
    again = pemt.TargetModel.from_pretrained(tmp_path / "saved")
    _, data = tokenised(world)
    batch = DataCollatorForSeq2Seq(model.tokenizer)([*data])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    model.eval()
    torch.testing.assert_close(again.eval()(**inputs).loss, model(**inputs).loss)
    assert again.pemt.mixture == MIXTURE
    assert {n for n, p in again.named_parameters() if p.requires_grad} == model.state_dict().keys()
    asked = pemt.PemtModel.from_pretrained(tmp_path / "saved")
    (answer,) = asked.classify([f"text : {rows_of(world)[0]['text']}"])
    assert answer.label in ("no", "yes")
    assert sum(answer.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("modules", [["wo"], ["q", "v"]], ids=" ".join)
def test_a_source_model_fills_the_bank_and_goes_on(
    world: Path, tmp_path: Path, modules: list[str]
) -> None:
    set_seed(1)
    expert = ExpertConfig(rank=2, alpha=2.0, target_modules=modules)
    model = pemt.source_model(str(world / "base"), task=TARGET, expert=expert)
    trainer_of(world, model, tmp_path / "run").train()
    model.save_pretrained(tmp_path / "bank" / "mine")
    manifest, _ = read_entry(tmp_path / "bank" / "mine")
    assert (manifest.task, manifest.rank, manifest.alpha) == ("mine", 2, 2.0)
    again = pemt.SourceModel.from_pretrained(tmp_path / "bank" / "mine")
    for (name, theirs), ours in zip(
        again.pemt.trainable_parameters(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(theirs.data, ours, msg=name)
    over = pemt.target_model(
        str(world / "base"),
        tmp_path / "bank",
        task=TARGET,
        adapter=AdapterConfig(reduction_factor=4),
    )
    assert over.state_dict()


def test_what_is_missing_is_told(world: Path) -> None:
    with pytest.raises(PemtError, match="description: missing; give one sentence"):
        pemt.target_model(str(world / "base"), None)
    with pytest.raises(PemtError, match="tokenizer: give the base model's own"):
        pemt.source_model(tiny_base(), description="a")


EXAMPLES = {
    "seq2seq_trainer": ("--max_steps", "2"),
    "accelerate_loop": ("--epochs", "2"),
    "lightning_module": ("--epochs", "2"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = ROOT / "docs" / "examples" / f"{name}.py"
    bank = () if name == "seq2seq_trainer" else ("--bank", str(world / "bank"))
    places = ("--base", str(world / "base"), "--folder", str(tmp_path), *bank)
    arguments = [*places, *EXAMPLES[name]]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out
    folder = tmp_path / ("adapter" if name == "seq2seq_trainer" else "")
    assert pemt.PemtModel.from_pretrained(folder).generate("text : the box is wet")


def test_every_example_is_tried() -> None:
    scripts = {path.stem for path in (ROOT / "docs" / "examples").glob("*.py")}
    assert scripts == EXAMPLES.keys()
