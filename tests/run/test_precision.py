"""In a bf16 or fp16 model gate, softmax, norms and losses are computed in fp32; fp16 is warned of in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from pemt.checkpoint import Fresh
from pemt.config.deepspeed import DeepSpeedConfigError, fill_deepspeed_json, read_deepspeed_json
from pemt.model import FullT5
from pemt.model.base import precision_warning
from pemt.model.families import FAMILIES
from pemt.run.caller_inputs import CallerInputs
from pemt.run.train import set_up
from tests.conftest import ROOT
from tests.support.tiny import adapt_config, make_base, tiny_task
from tests.support.tiny_t5 import FFNS, target_model, tiny_base, tiny_batch

TASK = "tiny-fp16"
HALVES = (torch.bfloat16, torch.float16)
# The overloads that decide whether a number survives, by what they serve.
LOSS = ("_log_softmax", "nll_loss_forward", "nll_loss2d_forward")
NORM = ("rsqrt",)


class Dtypes(TorchDispatchMode):
    """The dtypes and shapes of the first argument of every operation, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[torch.dtype, torch.Size]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            name = func.overloadpacket.__name__
            self.seen.setdefault(name, []).append((args[0].dtype, args[0].shape))
        return func(*args, **(kwargs or {}))

    def of(self, *names: str) -> list[torch.dtype]:
        return [dtype for name in names for dtype, _ in self.seen.get(name, [])]


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_and_norms_are_in_fp32(dtype: torch.dtype) -> None:
    for model in (target_model(), FullT5(tiny_base())):
        model = model.to(dtype)
        with Dtypes() as dtypes, torch.no_grad():
            out = model(**tiny_batch())
        assert out.logits.dtype == dtype, "the model itself is in half precision"
        assert set(dtypes.of(*LOSS)) == {torch.float32}
        assert len(dtypes.of(*NORM)) >= 15
        assert set(dtypes.of(*NORM)) == {torch.float32}
        assert out.loss.dtype == out.ce_loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_gates_and_sparsity_are_in_fp32(dtype: torch.dtype) -> None:
    model = target_model().to(dtype).train()
    batch = tiny_batch()
    with Dtypes() as dtypes:
        out = model(**batch)
    # the gates' softmax is the only one over [B, K]; attention is [.., queries, keys]
    rows, experts = len(batch["input_ids"]), 3
    gates = [kind for kind, shape in dtypes.seen["_softmax"] if shape == (rows, experts)]
    assert gates == [torch.float32] * FFNS
    assert out.gates_BLK is not None
    assert out.gates_BLK.dtype == out.sparsity_loss.dtype == torch.float32
    assert out.loss.isfinite()


def test_a_small_preference_of_the_gate_survives_half_precision() -> None:
    """Two logits that fp16 cannot tell apart: in fp32 the gate can."""
    model = target_model().to(torch.float16)
    gate = next(module for module in model.modules() if type(module).__name__ == "Gate")
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[0, 1] = 1e-4
    context = torch.zeros(1, len(gate.weight), dtype=torch.float16)
    context[0, 0] = 1
    first, second, _ = gate(context)[0].tolist()
    assert 0 < second - first < 1e-4


@pytest.mark.parametrize(
    ("fp16", "d_model", "warned"),
    [(True, 1024, True), (True, 2048, True), (True, 768, False), (False, 1024, False)],
)
def test_fp16_is_warned_of_before_the_start(
    tmp_path: Path, fp16: bool, d_model: int, warned: bool
) -> None:
    base = T5ForConditionalGeneration(
        T5Config(d_model=d_model, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=8)
    )
    paths = (tmp_path / "t5", tmp_path, tmp_path, tmp_path)
    warning = precision_warning(adapt_config(*paths, "x", fp16=fp16), base)
    assert (warning is not None) == warned
    if warning:
        assert f"t5 (d_model {d_model})" in warning
        assert "--bf16 true" in warning


def test_the_warning_is_told_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    base = make_base(tmp_path / "base")
    monkeypatch.setitem(FAMILIES, "t5", replace(FAMILIES["t5"], fp16_overflows_from=16))
    monkeypatch.setattr("pemt.run.train.load_task_data", stop)
    config = adapt_config(base, tmp_path, tmp_path / "run", tmp_path, TASK, bf16=False, fp16=True)
    tiny_task(TASK)
    engine = mock.MagicMock(device=torch.device("cpu"))  # fp16 without DeepSpeed needs a GPU
    with pytest.raises(KeyboardInterrupt):
        set_up(config, engine, Fresh(config=config), CallerInputs())
    assert "pemt: warning: fp16: activations of a T5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "key"),
    [("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")],
)
def test_a_json_cannot_switch_the_guards_off(tmp_path: Path, section: str, key: str) -> None:
    path = ROOT / "ds_configs" / "zero2.json"
    content = read_deepspeed_json(path)
    config = adapt_config(tmp_path, tmp_path, tmp_path, tmp_path, "x")
    fill_deepspeed_json(content, config, world_size=2, path=path)
    content[section][key] = False
    with pytest.raises(DeepSpeedConfigError, match=rf"zero2\.json: {section}\.{key}: found false"):
        fill_deepspeed_json(content, config, world_size=2, path=path)
