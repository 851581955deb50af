"""What a run leaves and prints holds no environment variable and no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pemt.config import ExpertConfig, PemtError
from pemt.run.train import run_adapt, run_source
from pemt.storage.manifest import read_manifest
from tests.support.tiny import adapt_config, make_base, source_config, tiny_task, write_task_files

TASK = "tiny-secrets"
SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "HUGGING_FACE_HUB_TOKEN": "hf_zyxwvutsrqponmlkjihgfedcba9876",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "SOME_VARIABLE_OF_MINE": "a-value-that-is-nobodys-business",
}


def test_every_file_and_line_of_both_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    base = make_base(tmp_path / "base")
    tiny_task(TASK)
    data = write_task_files(tmp_path / "data", seed=0)
    runs, bank = tmp_path / "runs", tmp_path / "runs" / "bank"
    seen: dict[str, Any] = {"report_to": ["tensorboard"]}
    expert = ExpertConfig(rank=2)
    run_source(source_config(base, data, runs / "source", bank, TASK, expert=expert, **seen))
    config = adapt_config(base, data, runs / "adapt", bank, TASK, **seen)
    run_adapt(config)
    (bank / TASK / "expert.safetensors").write_bytes(b"damaged")
    with pytest.raises(PemtError) as raised:
        run_adapt(adapt_config(base, data, runs / "fails", bank, TASK))
    printed = capfd.readouterr()
    files = {str(path): path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert any("events.out.tfevents" in name for name in files), "TensorBoard was not looked at"
    assert any(name.endswith("log.jsonl") for name in files)
    texts = {**files, "stdout": printed.out.encode(), "stderr": printed.err.encode()}
    texts["error"] = str(raised.value).encode()
    for where, content in texts.items():
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{name} in {where}"
            assert name.encode() not in content, f"{name} in {where}"
    folder = next((runs / "adapt").glob("checkpoint-*"))
    assert read_manifest(folder)["config"]["task_name"] == TASK, "the manifest was looked at"
