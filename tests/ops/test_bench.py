"""`pemt bench op` compares like with like, and prints what it measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pemt.bench import layer, op
from pemt.commands import COMMANDS
from pemt.plan.shapes import KNOWN


@pytest.fixture
def small(monkeypatch):
    small = replace(KNOWN["t5-small"], d_model=64, d_ff=256)
    monkeypatch.setitem(KNOWN, "t5-small", small)
    return layer.OpBench(shape="t5-small", batch=2, tokens=8, rounds=2)


@pytest.mark.parametrize(
    "forward", [layer.forward_stacked, layer.forward_ops], ids=lambda f: f.__name__
)
def test_variants_do_the_same_work(small, forward):
    ffn = layer.Layer(small)
    gradients = []
    for variant in (layer.forward_loop, forward):
        z, sparsity = variant(ffn)
        ffn.backward(z, sparsity)
        gradients.append([z.detach(), sparsity.detach(), *(t.grad for t in ffn.trainable)])
        for tensor in ffn.trainable:
            tensor.grad = None
    for ours, loops in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, loops, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_gradients_it_is_what_an_answers_step_calls(small, monkeypatch):
    ffn = layer.Layer(replace(small, forward_only=True))
    expected, _ = layer.forward_loop(ffn)
    monkeypatch.setattr(layer.ops, "ffn_output", None)
    torch.testing.assert_close(layer.forward_ops(ffn)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("forward_only", [False, True])
def test_every_variant_is_measured(small, forward_only, capsys):
    arguments = ["--shape", "t5-small", "--batch", "2", "--tokens", "8", "--rounds", "2", "--json"]
    COMMANDS["bench"](["op", *arguments, *(["--forward_only"] if forward_only else [])])
    result = json.loads(capsys.readouterr().out)
    assert set(result["milliseconds"]) == set(op.VARIANTS)
    assert all(value > 0 for value in result["milliseconds"].values())
    assert result["ratios"]["loop/fused"] > 0
    assert result["floor_tflops"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("forward_only", [False, True])
def test_every_variant_can_be_captured(small, forward_only):
    """None of them waits for the device: a host synchronisation ends a capture with an error."""
    bench = replace(small, device="cuda", forward_only=forward_only, cuda_graph=True)
    assert all(value > 0 for value in op.measure(bench)["milliseconds"].values())


def test_the_floor_counts_the_products_of_the_identities(small):
    d_model, d_ff, total, inner, tokens = 64, 256, 384, 4, 16
    forward = d_model * d_ff + total * d_ff + d_model * total
    adapter = 3 * 2 * d_model * inner  # forward, to the input, to the weights
    sparsity = 2 * d_model * total
    assert layer.Floor(layer.Layer(small)).flops == 2 * tokens * (2 * forward + sparsity + adapter)


def test_a_forced_implementation_is_forced_for_a_while(monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "packed")
    with layer.forced("reference"):
        assert layer.os.environ["PEMT_OPS"] == "reference"
    assert layer.os.environ["PEMT_OPS"] == "packed"
    monkeypatch.delenv("PEMT_OPS")
    with layer.forced("reference"):
        pass
    assert "PEMT_OPS" not in layer.os.environ
