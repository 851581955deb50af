"""`linear`: the sums of `F.linear`, by our kernel for few rows, by oneDNN for many."""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt.ops import OpsError, library
from pemt.ops import linear as module
from pemt.ops.library import CSRC
from pemt.ops.linear import FEW_ROWS, linear
from pemt.ops.select import compiled

FEW = [(1, 1), (3, 8), (1, 2, 33), (8, 16), (2, 4, 70)]  # the last is the width
MANY = [(9, 8), (3, 5, 33), (40, 16)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each way was taken."""
    taken: Counter[str] = Counter()

    def counted(name, function):
        def call(*arguments, **options):
            taken[name] += 1
            return function(*arguments, **options)

        return call

    kernels = compiled("cpu")
    assert kernels.few_rows is not None
    known = {**vars(kernels), "few_rows": counted("few_rows", kernels.few_rows)}
    monkeypatch.setattr(module, "kernels_for", lambda x: type(kernels)(**known))
    onednn = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted("onednn", onednn))
    return taken


def check(x: Tensor, layer: nn.Linear) -> None:
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", FEW + MANY, ids=str)
def test_the_product_is_that_of_a_linear_layer(shape, bias, calls):
    layer = nn.Linear(shape[-1], 7, bias=bias)
    check(torch.randn(shape), layer)
    check(torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], layer)
    assert calls == {"few_rows" if shape in FEW else "onednn": 2}


@torch.no_grad()
def test_no_rows_give_none(calls):
    layer = nn.Linear(4, 3)
    check(torch.randn(0, 5, 4), layer)
    assert linear(torch.randn(0, 4), layer.weight).shape == (0, 3)


def test_where_it_does_not_serve(calls):
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None, "a gradient is wanted"
    with torch.no_grad():
        linear(x.double(), layer.weight.double())
        linear(x.bfloat16(), layer.weight.bfloat16())
        linear(x.to("meta"), layer.weight.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, layer.weight.bfloat16()).dtype == torch.bfloat16
            assert linear(x, layer.weight).dtype == torch.bfloat16
        torch.compile(linear, backend="eager")(x, layer.weight)
    assert not calls


@torch.no_grad()
def test_without_onednn(calls, monkeypatch):
    layer = nn.Linear(4, 3)
    with torch.backends.mkldnn.flags(enabled=False):
        check(torch.randn(9, 4), layer)
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    check(torch.randn(9, 4), layer)
    assert not calls


@torch.no_grad()
def test_pemt_ops_chooses(monkeypatch):
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)

    def few_rows(*_: Tensor) -> Tensor:
        raise AssertionError("plain PyTorch was asked for")

    monkeypatch.setenv("PEMT_OPS", "packed")
    monkeypatch.setattr(torch.ops.pemt_cpu, "few_rows", few_rows)
    check(x, layer)
    monkeypatch.setenv("PEMT_OPS", "cuda")
    with pytest.raises(OpsError, match="cannot run tensors on cpu"):
        linear(x, layer.weight)


@pytest.mark.parametrize("rows", [1, 4, 5, FEW_ROWS, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 100), (3072, 5), (1023, 2), (5, 64)])
def test_the_kernel_is_as_exact_as_pytorch(rows, inputs, outputs):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    truth = x.double() @ weight.double().T

    def error(y: Tensor) -> float:
        return float((y - truth).norm() / truth.norm())

    found = torch.ops.pemt_cpu.few_rows(x, weight)
    # a mean of few sums can be lucky
    assert error(found) <= max(2 * error(F.linear(x, weight)), torch.finfo(x.dtype).eps)


def test_the_same_bits_in_any_company_and_with_any_number_of_threads():
    compiled("cpu")
    x, weight = torch.randn(7, 200), torch.randn(33, 200)
    together = torch.ops.pemt_cpu.few_rows(x, weight)
    alone = [torch.ops.pemt_cpu.few_rows(row, weight) for row in x.split(1)]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(together, torch.ops.pemt_cpu.few_rows(x, weight))
    finally:
        torch.set_num_threads(threads)


def test_a_row_with_nan_spoils_no_other():
    compiled("cpu")
    x, weight = torch.randn(6, 40), torch.randn(5, 40)
    x[5], weight[4] = torch.nan, torch.inf
    y = torch.ops.pemt_cpu.few_rows(x, weight)
    assert y[5].isnan().all()
    assert y[:5, :4].isfinite().all()


@pytest.mark.parametrize(
    "weight", [torch.ones(3, 5), torch.ones(3, 4).double(), torch.ones(4)], ids=["width", "dtype", "dims"]
)  # fmt: skip
def test_the_kernel_refuses_what_it_cannot_read(weight):
    compiled("cpu")
    with pytest.raises(RuntimeError, match="few_rows takes float"):
        torch.ops.pemt_cpu.few_rows(torch.ones(2, 4), weight)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_other_instruction_sets(capability, tmp_path: Path):
    """What runs on machines without this one's vectors, with guards behind the output."""
    flags = library._VECTOR_FLAGS.get(capability, [])
    if not set(flags) <= set(library.cpu_library().flags) | {"-mavx2"}:
        pytest.skip(f"this processor has no {capability}")
    built = tmp_path / "few_rows.so"
    command = ["c++", "-std=c++20", "-O2", "-fopenmp", *flags, "-shared", "-fPIC", "-o", str(built)]
    subprocess.run([*command, str(CSRC / "cpu_few_rows.cpp")], check=True)
    few_rows = ctypes.CDLL(str(built))["_ZN4pemt8few_rowsEPKfS1_Pflll"]
    for rows, inputs, outputs in [(1, 3, 1), (5, 70, 9), (8, 64, 6)]:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        y = torch.full((rows + 1, outputs), 7.0)
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (x, weight, y)]
        few_rows(*pointers, *[ctypes.c_int64(size) for size in (rows, inputs, outputs)])
        torch.testing.assert_close(y[:rows], x @ weight.T)
        assert (y[rows] == 7).all(), "written past the end"
