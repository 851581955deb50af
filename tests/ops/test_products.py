"""Which library multiplies: measured once a machine, the same in every process, and then taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pemt.ops import build, products
from pemt.ops.products import BLAS, ONEDNN, OWN, Product, choose, rows_like
from pemt.ops.select import compiled, kernels_for
from tests.ops.op_cases import make_case, relative_error, results
from tests.support.child import in_a_child

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing has been measured; the file of its choices."""
    compiled("cpu")  # before there is another folder to build it in
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    caches = (products._chosen, products._pass_choices)
    for cache in caches:
        cache.cache_clear()
    yield products.cache_file()
    for cache in caches:
        cache.cache_clear()  # the kernels are told again


def fixed(monkeypatch: pytest.MonkeyPatch, **times: float) -> list[Product]:
    """These are what is measured; returns of which products it was asked."""
    asked: list[Product] = []

    def measure(product: Product, few_rows: object) -> dict[str, float]:
        asked.append(product)
        return {
            {"mm": BLAS, "onednn": ONEDNN, "own": OWN}[way]: each for way, each in times.items()
        }

    monkeypatch.setattr(products, "measure", measure)
    return asked


@needs_onednn
def test_the_fastest_is_taken_and_measured_once(machine, monkeypatch):
    asked = fixed(monkeypatch, mm=2.0, onednn=1.0)
    assert choose(300, 6, 7, transposed=True) == ONEDNN
    assert choose(4000, 6, 7, transposed=True) == ONEDNN
    assert len(asked) == 1, "many rows are alike"
    choose(300, 6, 7, transposed=False)
    choose(100, 6, 7, transposed=True)
    assert [(each.rows, each.transposed) for each in asked] == [
        (256, True),
        (256, False),
        (128, True),
    ]


@needs_onednn
def test_every_process_takes_what_the_first_has_found(machine, tmp_path, monkeypatch):
    found = []
    for inputs, times in ((6, {"mm": 1.0, "onednn": 9.0}), (8, {"mm": 9.0, "onednn": 1.0})):
        fixed(monkeypatch, **times)
        found.append(choose(5, inputs, 7, transposed=True))
    assert found == [BLAS, ONEDNN]

    def choose_anew() -> None:
        products._chosen.cache_clear()
        products.measure = None  # nothing is measured again
        print(*(choose(5, inputs, 7, transposed=True) for inputs in (6, 8)))

    out = tmp_path / "out"
    assert in_a_child(out, choose_anew) == 0, out.read_text()
    assert out.read_text().split() == found


def test_a_damaged_file_is_measured_anew(machine, monkeypatch):
    asked = fixed(monkeypatch, mm=1.0)
    machine.write_text("{")
    assert choose(5, 6, 7, transposed=True) == BLAS
    assert (
        list(json.loads(machine.read_text())) == [asked[0].name]
        if asked
        else not products.has_onednn()
    )


@needs_onednn
def test_a_folder_that_cannot_be_written_is_told_of(machine, monkeypatch):
    machine.parent.joinpath("file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine.parent / "file" / "below"))
    fixed(monkeypatch, mm=2.0, onednn=1.0)
    with pytest.warns(RuntimeWarning, match=r"cannot be written .*, so torch.mm multiplies"):
        assert choose(5, 6, 7, transposed=True) == BLAS, "one rank may measure what another cannot"


@needs_onednn
def test_a_slower_way_is_measured_as_slower(machine, monkeypatch):
    plain = products.onednn
    monkeypatch.setattr(products, "onednn", lambda *each: [plain(*each) for _ in range(20)])
    product = Product(rows=64, inputs=256, outputs=256, transposed=True, threads=1)
    times = products.measure(product, None)
    assert set(times) == {BLAS, ONEDNN}
    assert times[BLAS] < times[ONEDNN]


@needs_onednn
def test_what_is_alike_stays_with_torch(machine, monkeypatch):
    fixed(monkeypatch, mm=1.05, onednn=1.0)
    assert choose(5, 6, 7, transposed=True) == BLAS


@needs_onednn
def test_a_way_that_fails_is_left_out(machine, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("another signature")

    monkeypatch.setattr(products, "onednn", broken)
    assert choose(64, 8, 8, transposed=True) == BLAS
    (times,) = json.loads(machine.read_text()).values()
    assert list(times) == [BLAS]


def test_our_kernel_takes_part_where_it_is_offered(machine, monkeypatch):
    few_rows = compiled("cpu").few_rows
    assert OWN in products.measure(
        Product(rows=8, inputs=64, outputs=64, transposed=True, threads=1, own=True), few_rows
    )
    fixed(monkeypatch, mm=2.0, own=1.0)
    assert choose(8, 64, 64, transposed=True, few_rows=few_rows) == OWN


@needs_onednn
@pytest.mark.parametrize("implementation", ["cpu", "cuda on the host"], indirect=True)
@pytest.mark.parametrize("rows", [1, 3, 64, 65, 257, 600])
def test_kernels_multiply_as_they_are_told(implementation, rows, machine, monkeypatch):
    case = make_case(
        batch=1, tokens=rows, d_ff=300, d_model=130, ranks=(20, 30), inner=0, dtype=torch.float32
    )
    kernels = kernels_for(case.x)
    assert kernels.choose_onednn is not None
    still = replace(case, gates=torch.zeros_like(case.gates))
    key = [rows_like(rows), 300, 130, 1, torch.get_num_threads()]
    expected = {
        True: products.onednn(case.x[0], case.weight),
        False: torch.mm(case.x[0], case.weight.T),
    }
    for onednn, product in expected.items():
        kernels.choose_onednn(key, onednn)
        assert torch.equal(kernels.ffn_output(*still.arguments)[0][0], product)
    if rows > 1:
        assert not torch.equal(*expected.values()), "one of the two did not run"


@needs_onednn
@pytest.mark.parametrize("onednn", [1.0, 3.0], ids=["oneDNN", "mm"])
def test_both_libraries_give_the_same_numbers(onednn, machine, monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "cpu")
    case = make_case(
        batch=4, tokens=40, d_ff=256, d_model=128, ranks=(64, 64, 32), dtype=torch.float32
    )
    asked = fixed(monkeypatch, mm=2.0, onednn=onednn)
    found = results(case, through="ops")
    assert len(asked) == 3, "wo and the latent in one, the projection, and back"
    expected = results(case, through="reference")
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-5, name


@needs_onednn
def test_info_tells_what_was_measured(machine, monkeypatch):
    assert any("products: none measured yet" in line for line in build.describe())
    fixed(monkeypatch, mm=2.0, onednn=1.0)
    choose(300, 6, 7, transposed=False)
    (line,) = [line for line in build.describe() if line.startswith("  ")]
    assert line.startswith("  256 rows and more, weight 6 x 7, ")
    assert line.endswith("oneDNN (torch.mm 2 ms, oneDNN 1 ms)")
