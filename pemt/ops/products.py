"""Which library multiplies on a CPU in float32: measured once per product on the machine at hand, and kept.

Neither wins everywhere: oneDNN takes 0.8 of the time of the BLAS behind `torch.mm` for one product and 2.2 times it
for the next, as the weight lies and as the processor is. So both run once, and what was found goes into a file that
all processes of this machine read: the choice, and with it every bit of a result, is the same on every rank and in
every later run. Delete the file to measure anew.

Shapes: N rows, I input width, O output width.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .library import build_root, locked
from .select import Kernels

FEW_ROWS = 32  # up to so many a kernel of our own is tried as well (csrc/cpu_few_rows.cpp)
MOST_ROWS = 256  # more are taken to be alike: so the largest weight takes half a second, once
ONEDNN, BLAS, OWN = "oneDNN", "torch.mm", "few_rows"
Way = Callable[[Tensor, Tensor], Tensor]
_COLD_BYTES = 2**26  # weights of an answer's next token are in no cache
_ROUNDS = 3
_CLEARLY = 1.1  # so many times as fast as the BLAS, or it stays: what is alike shall not change from machine to machine


@dataclass(frozen=True, kw_only=True)
class Product:
    """x [N, I] times a frozen weight.

    Args:
        rows: as `rows_like` rounds them.
        inputs, outputs: I and O.
        transposed: the weight lies as a linear layer's, [O, I]; else as [I, O], as in a layer's backward pass.
        threads: of this process.
        own: our own kernel for few rows is there too.
    """

    rows: int
    inputs: int
    outputs: int
    transposed: bool
    threads: int
    own: bool = False

    @property
    def name(self) -> str:
        """As in the file, and for people."""
        rows = f"{self.rows} rows" + (" and more" if self.rows == MOST_ROWS else "")
        weight = f"{self.outputs} x {self.inputs}, transposed" if self.transposed else (
            f"{self.inputs} x {self.outputs}")  # fmt: skip
        own = ", own kernel" if self.own else ""
        return f"{rows}, weight {weight}, {self.threads} threads{own}"


def rows_like(rows: int) -> int:
    """The next power of two: batches differ in width, and each width would be measured."""
    return min(MOST_ROWS, 1 << max(0, rows - 1).bit_length())


def choose(
    rows: int, inputs: int, outputs: int, *, transposed: bool, few_rows: Way | None = None
) -> str:
    """The fastest way for this product: a name in `ways`; measured where nobody has yet.

    `few_rows` is our own kernel, where it may be called: up to FEW_ROWS rows, weights as a linear layer's.
    """
    product = Product(
        rows=rows_like(rows),
        inputs=inputs,
        outputs=outputs,
        transposed=transposed,
        threads=torch.get_num_threads(),
        own=few_rows is not None,
    )
    return _chosen(product, few_rows)


def choose_libraries(kernels: Kernels, x: Tensor, *weights: tuple[int, int, bool]) -> None:
    """Tell compiled kernels which library multiplies x [B, S, ...] with weights of these I, O and `transposed`."""
    if kernels.choose_onednn is not None and x.dtype == torch.float32 and x.numel() > 0:
        rows = rows_like(x.shape[0] * x.shape[1])
        _pass_choices(kernels.choose_onednn, rows, torch.get_num_threads(), weights)


@functools.cache
def _pass_choices(
    pass_choice: Callable[[list[int], bool], None],
    rows: int,
    threads: int,
    weights: tuple[tuple[int, int, bool], ...],
) -> None:
    for inputs, outputs, transposed in weights:
        way = choose(rows, inputs, outputs, transposed=transposed)
        pass_choice([rows, inputs, outputs, int(transposed), threads], way == ONEDNN)


def has_onednn() -> bool:
    """Whether oneDNN may multiply; its product is a private op of PyTorch's, which may go or be left out."""
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """oneDNN's x weightᵀ [..., O], the weight with any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], None)


def ways(product: Product, few_rows: Way | None) -> dict[str, Way]:
    """What can multiply, by name; each takes x [N, I] and the weight as it lies."""
    found: dict[str, Way] = {BLAS: lambda x, w: torch.mm(x, w.t() if product.transposed else w)}
    if has_onednn():
        found[ONEDNN] = lambda x, w: onednn(x, w if product.transposed else w.t())
    if few_rows is not None:
        found[OWN] = few_rows
    return found


def cache_file() -> Path:
    """Where this machine's choices are: beside the compiled libraries, by processor and PyTorch."""
    made_of = (
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
        _processor(),
    )
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return build_root() / f"pemt_products_{digest}.json"


def describe() -> list[str]:
    """What has been measured here, a line each, for people."""
    found = _read(cache_file())
    if not found:
        return [f"products: none measured yet; the first use does, into {cache_file()}"]
    lines = [f"products: {len(found)} measured, in {cache_file()}"]
    for name, times in found.items():
        times_text = ", ".join(f"{way} {value:.3g} ms" for way, value in times.items())
        lines.append(f"  {name}: {_fastest(times)} ({times_text})")
    return lines


@functools.cache
def _chosen(product: Product, few_rows: Way | None) -> str:
    tried = ways(product, few_rows)
    if len(tried) == 1:
        return next(iter(tried))
    file = cache_file()
    times = _read(file).get(product.name)
    if times is None:
        try:
            times = _measure_once(product, few_rows, file)
        except OSError as error:
            warnings.warn(
                f"{file}: cannot be written ({error.strerror}), so {BLAS} multiplies, the fastest or not;"
                " set TORCH_EXTENSIONS_DIR to a folder that can",
                RuntimeWarning,
                stacklevel=2,
            )
            return BLAS
    return _fastest({way: value for way, value in times.items() if way in tried})


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=lambda way: times[way] * (1 if way == BLAS else _CLEARLY), default=BLAS)


def _measure_once(product: Product, few_rows: Way | None, file: Path) -> dict[str, float]:
    """Milliseconds of each way: another process's, if one has been faster, so that all have the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_suffix(".lock")):
        known = _read(file)
        if product.name not in known:
            known[product.name] = measure(product, few_rows)
            written = file.with_suffix(".new")
            written.write_text(json.dumps(known, indent=0))
            written.replace(file)
        return known[product.name]


@torch.no_grad()
def measure(product: Product, few_rows: Way | None) -> dict[str, float]:
    """Milliseconds of each way, the least of a few rounds; of few rows with weights that are in no cache."""
    bytes_each = 4 * product.inputs * product.outputs
    copies = max(1, _COLD_BYTES // max(1, bytes_each)) if product.rows <= FEW_ROWS else 1
    shape = (product.outputs, product.inputs) if product.transposed else (
        product.inputs, product.outputs)  # fmt: skip
    weights = torch.ones(min(copies, 256), *shape)
    x_NI = torch.ones(product.rows, product.inputs)
    # one thread's own time is right on a busy machine too
    clock = time.process_time if product.threads == 1 else time.perf_counter
    times: dict[str, float] = {}
    usable = dict(ways(product, few_rows))
    for number in range(_ROUNDS + 1):
        for name, way in list(usable.items()):
            began = clock()
            try:
                for weight in weights:
                    way(x_NI, weight)
            except (RuntimeError, TypeError):  # oneDNN's is a private op of PyTorch's
                del usable[name]
                continue
            taken = 1e3 * (clock() - began) / len(weights)
            if number > 0:  # the first sets up
                times[name] = min(taken, times.get(name, taken))
    return times


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found: Any = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    kept = ("model name", "cpu family", "model\t", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
