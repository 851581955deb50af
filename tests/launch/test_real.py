"""Real data and the real T5 vocabulary through both stages on 2 ranks, by the published commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import T5Config, T5ForConditionalGeneration

from tests.conftest import Launch
from tests.support.tiny import losses

pytestmark = [pytest.mark.real, pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A small random T5 behind the real SentencePiece model."""
    folder = tmp_path_factory.mktemp("real") / "base"
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    shutil.copy(shared / "data" / "t5_tokenizer" / "spiece.model", folder)
    return folder


def falls(output_dir: Path, tag: str) -> bool:
    values = list(losses(output_dir, tag).values())
    return mean(values[-3:]) < 0.9 * mean(values[:3])


def test_sst2_to_bank_to_cb(base: Path, shared: Path, launch: Launch) -> None:
    world = base.parent
    common = [
        *("--model_name_or_path", str(base), "--bf16", "false", "--logging_steps", "1"),
        *("--bank_dir", str(world / "bank"), "--max_source_length", "64", "--warmup_steps", "2"),
        *("--learning_rate", "1e-2", "--per_device_train_batch_size", "8"),
        *("--max_eval_samples", "16"),  # under ZeRO-3 each token of an answer gathers all weights
    ]
    source = ["--config", "source", "--task_name", "sst2"]
    source += ["--data_dir", str(shared / "data/glue/SST-2")]
    source += ["--output_dir", str(world / "sst2"), "--num_train_epochs", "1"]
    source += ["--max_train_samples", "256", "--report_to", "[]"]
    launch("-m", "pemt", "source", *source, *common, zero=2)
    assert falls(world / "sst2", "train/ce_loss")
    assert sorted(path.name for path in (world / "bank" / "sst2").iterdir()) == [
        "expert.safetensors",
        "manifest.json",
    ]

    adapt = ["--config", "adapt", "--task_name", "superglue-cb"]
    adapt += ["--data_dir", str(shared / "data/superglue/CB")]
    adapt += ["--output_dir", str(world / "cb"), "--num_train_epochs", "1"]
    launched = launch("-m", "pemt", "adapt", *adapt, *common, zero=3)
    assert falls(world / "cb", "train/ce_loss")
    check_report(launched.output, world / "cb")
    check_tensorboard(world / "cb")


def check_report(output: str, run: Path) -> None:
    results = json.loads((run / "all_results.json").read_text())
    published = [
        "epoch",
        "test_macro_f1",
        "test_accuracy",
        "test_average_metrics",
        "test_loss",
        "test_moe_weight_0",
        "test_runtime",
        "test_samples_per_second",
    ]
    assert [key for key in results if key == "epoch" or key.startswith("test_")] == published
    assert results["sources"] == ["sst2"]
    assert results["test_moe_weight_0"] == pytest.approx(1.0)
    block = output.split("***** test metrics *****\n")[1].splitlines()
    assert [line.split("=")[0].strip() for line in block[: len(published)]] == published
    assert re.search(r"test_moe_weight_0 += +1\.0000  sst2\n", output)
    assert output.count("] sst2 is the only expert") == 1
    assert output.count("***** test metrics *****") == 1, "a rank besides the first one reports"


def reported(run: Path) -> list[str]:
    """Names of the test set's numbers in the final report."""
    results = json.loads((run / "all_results.json").read_text())
    return [key.removeprefix("test_") for key in results if key.startswith("test_")]


def check_tensorboard(run: Path) -> None:
    """Flat tags, the same in TensorBoard and in log.jsonl, in one run folder."""
    folder = run / "tensorboard"
    assert all(path.name.startswith("events.out.tfevents.") for path in folder.iterdir())
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    outcome = {f"test/{name}" for name in reported(run)}
    assert tags == {key for line in lines for key in line} - {"step", "time", "elapsed"} | outcome
    rates = ("learning_rate", "grad_norm", "samples_per_second", "tokens_per_second")
    wanted = {f"train/{name}" for name in ("loss", "ce_loss", "sparsity_loss", *rates)}
    wanted |= {"eval/superglue-cb/accuracy", "eval/superglue-cb/average_metrics"}
    wanted |= {f"gate/{stack}/{layer}/sst2" for stack in ("encoder", "decoder") for layer in (0, 1)}
    assert wanted <= tags
