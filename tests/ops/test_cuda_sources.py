"""The CUDA sources compile without a GPU and without spills; their emulation catches mistakes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from pemt.ops.library import BINDING, CSRC, CUDA_ARCHITECTURES

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
KERNELS = {  # by source: their names and how many of them there are, with all dtypes
    "cuda_mixture.cu": (
        {
            "gate_latent_kernel",
            "mixture_backward_kernel",
            "sum_chunks_kernel",
        },
        2 * 4 + 2,
    ),
    "cuda_sparsity.cu": (
        {"sparsity_forward_kernel", "sum_distances_kernel", "sparsity_backward_kernel"},
        2 * 4 + 2,
    ),
}


@needs_nvcc
@pytest.mark.soak  # that they compile is seen by test_planted_faults.py, in half of the time
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_compile_without_register_spills(source, architecture, tmp_path):
    assert NVCC is not None
    done = subprocess.run(
        [NVCC, *cpp_extension.COMMON_NVCC_FLAGS, "-std=c++20", "-O3", f"-arch={architecture}",
         "-Xptxas", "-v", "-c", str(CSRC / source), "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    names, count = KERNELS[source]
    assert len(spills) == len(registers) == count
    assert all(name in report for name in names)
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 128  # two blocks of 256 threads on a multiprocessor


@needs_nvcc
@pytest.mark.soak  # without what is for CUDA alone it is compiled for the CPU
def test_the_binding_compiles_against_cuda_headers(tmp_path):
    """Syntax and types alone; a PyTorch without CUDA lacks one generated header, empty here.

    Both files as one: PyTorch's headers take most of the time.
    """
    assert NVCC is not None
    done = subprocess.run([NVCC, "-E", "-Xcompiler", "-v", "-x", "cu", "/dev/null"],
                          capture_output=True, text=True)  # fmt: skip
    includes = re.findall(r"^ (/\S*/(?:include|targets/\S+))$", done.stderr, re.MULTILINE)
    toolkit = [path for path in includes if (Path(path) / "cuda_runtime_api.h").exists()]
    assert toolkit, done.stderr
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    folders = [tmp_path, *cpp_extension.include_paths(), toolkit[0], CSRC]
    flags = [f"-I{folder}" for folder in folders]
    done = subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", "-DPEMT_CUDA", "-DPEMT_LIBRARY=pemt_cuda", *flags,
         "-x", "c++", "-"], capture_output=True, text=True,
        input="".join(f'#include "{source}"\n' for source in BINDING),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 7) __syncthreads();", "threads wait at a barrier"),
        ("if (threadIdx.x % 32 < 5) shuffle_xor(1.0f, 1);", "threads wait at a barrier"),
        ("__shared__ int seen; if (threadIdx.x == 31) seen = 5; __syncthreads();"
         "if (seen == 5) __syncthreads();", ""),
    ],
    ids=["block barrier", "shuffle", "sound"],
)  # fmt: skip
def test_the_emulation_stops_at_a_barrier_some_threads_miss(body, message, tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(
        '#include "cuda_emulation.h"\nusing namespace pemt;\n'
        f"void kernel(int) {{ {body} }}\n"
        "int main() { launch(kernel, dim3(2), 64, nullptr, 1); }\n"
    )
    program = tmp_path / "program"
    subprocess.run(["c++", "-std=c++20", f"-I{HERE}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode != 0) == bool(message)
    assert message in done.stderr
