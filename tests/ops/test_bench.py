"""`pemt bench op` compares like with like, and prints what it measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pemt.bench import op
from pemt.commands import COMMANDS
from pemt.plan.shapes import KNOWN


@pytest.fixture
def small(monkeypatch):
    small = replace(KNOWN["t5-small"], d_model=64, d_ff=256)
    monkeypatch.setitem(KNOWN, "t5-small", small)
    return op.OpBench(shape="t5-small", batch=2, tokens=8, rounds=2)


@pytest.mark.parametrize("forward", [op.forward_stacked, op.forward_ops], ids=lambda f: f.__name__)
def test_variants_do_the_same_work(small, forward):
    layer = op.Layer(small)
    gradients = []
    for variant in (op.forward_loop, forward):
        z, sparsity = variant(layer)
        layer.backward(z, sparsity)
        gradients.append([z.detach(), sparsity.detach(), *(t.grad for t in layer.trainable)])
        for tensor in layer.trainable:
            tensor.grad = None
    for ours, loops in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, loops, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("forward_only", [False, True])
def test_every_variant_is_measured(small, forward_only, capsys):
    arguments = ["--shape", "t5-small", "--batch", "2", "--tokens", "8", "--rounds", "2", "--json"]
    COMMANDS["bench"](["op", *arguments, *(["--forward_only"] if forward_only else [])])
    result = json.loads(capsys.readouterr().out)
    assert set(result["milliseconds"]) == set(op.VARIANTS)
    assert all(value > 0 for value in result["milliseconds"].values())
    assert result["ratios"]["loop/fused"] > 0
    assert result["floor_tflops"] > 0


def test_the_floor_counts_the_products_of_the_identities(small):
    d_model, d_ff, total, inner, tokens = 64, 256, 384, 4, 16
    forward = d_model * d_ff + total * d_ff + d_model * total
    adapter = 3 * 2 * d_model * inner  # forward, to the input, to the weights
    sparsity = 2 * d_model * total
    assert op.Floor(op.Layer(small)).flops == 2 * tokens * (2 * forward + sparsity + adapter)


def test_a_forced_implementation_is_forced_for_a_while(monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "packed")
    with op.forced("reference"):
        assert op.os.environ["PEMT_OPS"] == "reference"
    assert op.os.environ["PEMT_OPS"] == "packed"
    monkeypatch.delenv("PEMT_OPS")
    with op.forced("reference"):
        pass
    assert "PEMT_OPS" not in op.os.environ
