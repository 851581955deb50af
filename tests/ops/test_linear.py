"""`linear`: the sums of `F.linear`, by whichever way is chosen."""

from __future__ import annotations

import ctypes
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt.ops import OpsError, linear as module, select
from pemt.ops.library import CSRC
from pemt.ops.linear import add_linear, linear
from pemt.ops.products import BLAS, FEW_ROWS, ONEDNN, OWN

FEW = [(1, 1), (3, 8), (1, 2, 33), (8, 16), (2, 4, 70), (2, 16, 9)]  # the last is the width
MANY = [(33, 8), (3, 15, 33), (40, 16)]
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)
Product = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def few_rows() -> Product:
    """The kernel itself."""
    kernel = select.compiled("cpu").few_rows
    assert kernel is not None
    return kernel


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, few_rows: Product) -> Counter[str]:
    """How often each way was taken; chosen is our kernel where it is offered, else oneDNN."""
    taken: Counter[str] = Counter()

    def counted(name, function):
        def call(*arguments, **options):
            taken[name] += 1
            return function(*arguments, **options)

        return call

    def choose(*sizes, transposed, few_rows):
        return OWN if few_rows is not None else ONEDNN

    monkeypatch.setattr(module, "choose", choose)
    monkeypatch.setenv("PEMT_OPS", "counted")
    kernels = replace(select.PACKED, few_rows=counted("few_rows", few_rows))
    monkeypatch.setitem(select.ANY_DEVICE, "counted", kernels)
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted("onednn", onednn))
    return taken


def check(x: Tensor, layer: nn.Linear) -> None:
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", FEW + MANY, ids=str)
def test_the_product_is_that_of_a_linear_layer(shape, bias, calls):
    layer = nn.Linear(shape[-1], 7, bias=bias)
    check(torch.randn(shape), layer)
    check(torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], layer)
    layer.weight = nn.Parameter(torch.randn(shape[-1], 7).T)
    check(torch.randn(shape), layer)
    assert calls == {"few_rows" if shape in FEW else "onednn": 3}


@torch.no_grad()
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 4, 3), (3, 0, 5), (3, 4, 0)])
def test_sizes_of_zero(rows, inputs, outputs, calls, few_rows):
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(few_rows(x, weight), F.linear(x, weight))
    assert not calls, "nothing to choose from"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_adding_a_product(dtype, calls):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 40).to(dtype), torch.randn(50, 40).to(dtype)
    y = -1.01 * F.linear(x, weight)
    exact = y.double() + x.double() @ weight.double().T
    found = add_linear(y, x, weight)
    # the terms cancel: a sum rounded twice would be further off
    error, eps = (found.double() - exact).abs(), torch.finfo(dtype).eps
    assert (error <= eps * exact.abs() + 1e-5).all()
    assert calls == ({"few_rows": 1} if dtype == torch.float32 else {})


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
        torch.compile(linear, backend="eager", fullgraph=True)(x, layer.weight)
    assert not calls


@torch.no_grad()
def test_by_the_blas(calls, monkeypatch):
    monkeypatch.setattr(module, "choose", lambda *sizes, **options: BLAS)
    check(torch.randn(33, 4), nn.Linear(4, 3))
    check(torch.randn(2, 4), nn.Linear(4, 3))
    assert not calls


@torch.no_grad()
def test_without_the_kernel(calls, monkeypatch):
    """As where nothing compiles, or PEMT_OPS says so."""
    monkeypatch.setenv("PEMT_OPS", "packed")
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    check(x, layer)
    assert not calls["few_rows"]
    monkeypatch.setenv("PEMT_OPS", "cuda")
    with pytest.raises(OpsError, match="cannot run tensors on cpu"):
        linear(x, layer.weight)


@pytest.mark.parametrize("rows", [1, 4, 6, 8, 13, FEW_ROWS])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(512, 100), (3072, 5), (1039, 6), (5, 63), (16, 31)]
)
def test_the_kernel_is_as_exact_as_pytorch(rows, inputs, outputs, few_rows):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    truth = x.double() @ weight.double().T

    def error(y: Tensor) -> float:
        return float((y - truth).norm() / truth.norm())

    # a mean of few sums can be lucky
    assert error(few_rows(x, weight)) <= max(2 * error(F.linear(x, weight)), torch.finfo(x.dtype).eps)  # fmt: skip


def test_up_to_8_rows_have_the_same_bits_in_any_company_and_with_any_number_of_threads(few_rows):
    x, weight = torch.randn(7, 1100), torch.randn(99, 1100)
    together = few_rows(x, weight)
    assert torch.equal(together, torch.cat([few_rows(row, weight) for row in x.split(1)]))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(together, few_rows(x, weight))
    finally:
        torch.set_num_threads(threads)


def test_a_row_with_nan_spoils_no_other(few_rows):
    x, weight = torch.randn(6, 40), torch.randn(5, 40)
    x[5], weight[4] = torch.nan, torch.inf
    y = few_rows(x, weight)
    assert y[5].isnan().all()
    assert y[:5, :4].isfinite().all()


@pytest.mark.parametrize(
    "weight", [torch.ones(3, 5), torch.ones(3, 4).double(), torch.ones(4)], ids=["width", "dtype", "dims"]
)  # fmt: skip
def test_the_kernel_refuses_what_it_cannot_read(weight, few_rows):
    with pytest.raises(RuntimeError, match="few_rows takes float"):
        few_rows(torch.ones(2, 4), weight)


@pytest.mark.parametrize(
    "shuffle", ["__has_builtin(__builtin_shufflevector)", "0"], ids=["", "old GCC"]
)
@pytest.mark.parametrize("flags", [[], ["-mavx2", "-mfma"]], ids=["any processor", "AVX2"])
def test_other_instruction_sets(flags, shuffle, tmp_path: Path):
    """What runs on other processors and by older compilers, with guards behind the output."""
    if flags and torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}:
        pytest.skip("this processor has no AVX2")
    built = tmp_path / "few_rows.so"
    source = (CSRC / "cpu_few_rows.cpp").read_text()
    assert "__has_builtin(__builtin_shufflevector)" in source
    (tmp_path / "called.cpp").write_text(
        source.replace("__has_builtin(__builtin_shufflevector)", shuffle) + "\n"
        'extern "C" void call(const float* x, const float* w, float* y, const int64_t* sizes) {\n'
        "  pemt::few_rows(x, w, y, sizes[0], sizes[1], sizes[2]);\n}\n"
    )
    command = ["c++", "-std=c++20", "-O2", "-fopenmp", *flags, "-I", str(CSRC), "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(built), str(tmp_path / "called.cpp")], check=True)
    call = ctypes.CDLL(str(built)).call
    for sizes in [(1, 3, 1), (3, 0, 5), (5, 70, 9), (8, 64, 6), (9, 1100, 35)]:
        rows, inputs, outputs = sizes
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        y = torch.full((rows + 1, outputs), 7.0)
        arguments = [ctypes.c_void_p(each.data_ptr()) for each in (x, weight, y)]
        call(*arguments, (ctypes.c_int64 * 3)(*sizes))
        torch.testing.assert_close(y[:rows], x @ weight.T, rtol=1e-5, atol=1e-4)
        assert (y[rows] == 7).all(), "written past the end"
