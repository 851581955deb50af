"""Faults planted into the CUDA sources, one at a time, and who notices each: the emulation, or what the compiler makes.

    python -m tests.ops.planted_faults [NAME ...]

The emulation runs `cuda_faults.cpp` over the kernels and over those of the CPU: another number, a crash or a message is
a fault seen. The device's own header is not in it, nor is what a launch promises the compiler: those are read from PTX.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

from pemt.ops.library import CSRC

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O1", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error")
TOLERANCE = 2e-2  # of the largest number of a line, in bfloat16; 1e-4 would do for float
DEVICE_USES = """
#include "cuda_device.cuh"
using namespace pemt;
__global__ void uses(float* x, double* y, bf16* b, f16* h) {
  x[0] = shuffle_xor(x[0], 4); y[0] = shuffle_xor(y[0], 8);
  b[0] = rounded<bf16>(x[0]); h[0] = rounded<f16>(x[0]);
}
"""
DEVICE_PTX = (  # all lanes take part, 32 to a warp; to nearest, ties to even
    r"shfl\.sync\.bfly\.b32\s+[^;]*, 4, 31, -1;",
    r"shfl\.sync\.bfly\.b32\s+[^;]*, 8, 31, -1;",
    r"cvt\.rn\.bf16\.f32",
    r"cvt\.rn\.f16\.f32",
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Texts of a source and what stands in their place."""

    name: str
    source: str
    changes: tuple[tuple[str, str], ...]


def fault(name: str, source: str, *changes: tuple[str, str]) -> Fault:
    """One more of them."""
    return Fault(name=name, source=source, changes=changes)


TILES, MIXTURE, SPARSITY = "cuda_tiles.cuh", "cuda_mixture.cu", "cuda_sparsity.cu"
DEVICE = "cuda_device.cuh"
FAULTS = [
    fault("a wide read beyond a row", TILES, ("valid[j] > 0 ? *reinterpret", "true ? *reinterpret")),
    fault("a narrow read beyond a row", TILES, ("i < valid[j] ? from", "true ? from")),
    fault("a wide write beyond a row", TILES, ("if (wide && valid >= kPack<T>)", "if (wide)")),
    fault("a narrow write beyond a row", TILES, ("if (i < valid) to[i]", "to[i]")),
    fault("tokens beyond the last", TILES, ("int(tokens - first < kTokens ? tokens - first : kTokens)", "kTokens")),
    fault("a gate's tokens beyond the last", MIXTURE, (" && token[j] < tokens", "")),
    fault("gates beyond the last", MIXTURE, ("if (at >= gates) return;", "")),
    fault("a chunk's tokens from the next sample", MIXTURE, (" && s < shape.tokens", "")),
    fault("statistics of no token", SPARSITY, ("if (present && place.column == 0)", "if (place.column == 0)")),
    fault("no pointer's alignment is asked for", TILES, ("% 16 == 0) && ...", "% 1 == 0) && ...")),
    fault("one pointer is forgotten", MIXTURE, (" && aligned(gated)", "")),
    fault("another pointer is forgotten", SPARSITY, ("aligned(args.z, args.dz)", "aligned(args.z)")),
    fault("ranks that begin no pack", TILES, ("offset % kPack<T> == 0", "offset % 1 == 0")),
    fault("rows that begin no pack", SPARSITY, (
        "kPack<T> == 0 && aligned(args.z);", "kPack<T> >= 0 && aligned(args.z);")),
    fault("a sum over blocks that is not atomic", MIXTURE, (
        "[int64_t(blockIdx.x) * experts.count + k] = sum",
        "[int64_t(blockIdx.x / chunks) * experts.count + k] += sum")),
    fault("every block writes the gates", SPARSITY, ("if (blockIdx.x == 0)", "if (true)")),
    fault("no barrier before norms are read", SPARSITY, (
        "norm_z[row] = sqrt(sum);\n  }\n  __syncthreads();", "norm_z[row] = sqrt(sum);\n  }")),
    fault("no barrier before a block's parts are summed", TILES, (
        "= value;\n  __syncthreads();\n  value = 0;", "= value;\n  value = 0;")),
    fault("a barrier for some threads", TILES, (
        "__syncthreads();\n  value = 0;", "if (threadIdx.x < 64) __syncthreads();\n  value = 0;")),
    fault("a host pointer in a kernel", MIXTURE,
          ("MixtureBackward args, int64_t chunks", "const MixtureBackward* at, int64_t chunks"),
          ("const int k = blockIdx.y, start = experts.offset[k], rank = experts.offset[k + 1] - start;\n"
           "  const int packs = (rank + kPack<T> - 1) / kPack<T>;\n  const int64_t b",
           "const MixtureBackward& args = *at;\n"
           "  const int k = blockIdx.y, start = experts.offset[k], rank = experts.offset[k + 1] - start;\n"
           "  const int packs = (rank + kPack<T> - 1) / kPack<T>;\n  const int64_t b"),
          ("experts, args, chunks, wide", "experts, &args, chunks, wide")),
    fault("a device pointer on the host", MIXTURE, (
        "const int64_t chunks = mixture_partials(shape), gates",
        "if (*static_cast<const R*>(args.gates) == R(12345)) return;\n"
        "    const int64_t chunks = mixture_partials(shape), gates")),
    fault("a launch larger than its bounds", SPARSITY, (
        "__launch_bounds__(kThreads, kSparsityBlocks) sparsity_backward",
        "__launch_bounds__(kThreads / 2) sparsity_backward")),
    fault("a shuffle of half a warp", DEVICE, ("0xffffffffu", "0xffffu")),
]  # fmt: skip


def planted(one: Fault | None, folder: Path) -> Path:
    """The sources with the fault in them."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    if one is not None:
        path = csrc / one.source
        text = path.read_text()
        for old, new in one.changes:
            assert text.count(old) == 1, (
                f"{one.name}: {old!r} is {text.count(old)} times in {one.source}"
            )
            text = text.replace(old, new)
        path.write_text(text)
    return csrc


def program(csrc: Path, folder: Path, *, emulated: bool) -> Path:
    """`cuda_faults.cpp` over the CUDA kernels, or over those of the CPU."""
    built = folder / ("emulated" if emulated else "on the CPU")
    kernels = HERE / "cuda_on_host.cpp" if emulated else csrc / "cpu_kernels.cpp"
    extra = ["-DPEMT_EMULATE_CUDA="] if emulated else []
    includes = [csrc, HERE, *cpp_extension.include_paths()]
    subprocess.run(
        ["c++", *FLAGS, *extra, *(f"-I{path}" for path in includes), HERE / "cuda_faults.cpp", kernels, "-o", built],
        check=True,
    )  # fmt: skip
    return built


def expected(folder: Path) -> str:
    """What the CPU's kernels print."""
    built = program(CSRC, folder, emulated=False)
    return subprocess.run([built], check=True, capture_output=True, text=True).stdout


def emulation_sees(csrc: Path, folder: Path, truth: str) -> str | None:
    """What is wrong with these sources, or None."""
    done = subprocess.run(
        [program(csrc, folder, emulated=True)], capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        return done.stderr.strip() or f"ended by signal {-done.returncode}"
    lines, true_lines = done.stdout.splitlines(), truth.splitlines()
    assert len(lines) == len(true_lines)
    for line, true_line in zip(lines, true_lines, strict=True):
        (name, *values), (_, *true_values) = line.split(), true_line.split()
        numbers = [(float(a), float(b)) for a, b in zip(values, true_values, strict=True)]
        largest = max(abs(b) for _, b in numbers if b == b)  # what is NaN is not to be written to
        for a, b in numbers:
            if (a == a) != (b == b) or abs(a - b) > TOLERANCE * largest:
                return f"{name}: {a:.6g} in place of {b:.6g}"
    return None


def compiler_sees(csrc: Path, folder: Path) -> str | None:
    """What PTX tells of the launch bounds and the device's own header; None where all is well."""
    uses = folder / "uses.cu"
    uses.write_text(DEVICE_USES)
    text = _ptx(uses, csrc)
    constants = dict(re.findall(r"mov\.u32\s+(%r\d+), (-?\d+);", text))
    text = re.sub(r"%r\d+\b", lambda found: constants.get(found[0], found[0]), text)
    for pattern in DEVICE_PTX:
        if re.search(pattern, text) is None:
            return f"cuda_device.cuh: no {pattern} in its PTX"
    found = re.search(r"kThreads = (\d+)", (csrc / TILES).read_text())
    assert found is not None
    for source in (MIXTURE, SPARSITY):
        bounds = set(re.findall(r"\.maxntid (\d+)", _ptx(csrc / source, csrc)))
        if bounds - {found[1]}:
            return f"{source}: bounds of {bounds} threads, launched are {found[1]}"
    return None


def _ptx(source: Path, csrc: Path) -> str:
    command = ["nvcc", "-ptx", "-std=c++20", "-O1", "-arch=sm_80", f"-I{csrc}", source, "-o", "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(names: list[str]) -> int:
    unseen = []
    with tempfile.TemporaryDirectory() as root:
        truth = expected(Path(root))
        for number, one in enumerate(each for each in FAULTS if not names or each.name in names):
            folder = Path(root) / str(number)
            folder.mkdir()
            csrc = planted(one, folder)
            by_ptx = one.source == DEVICE or "__launch_bounds__" in one.changes[0][0]
            seen = compiler_sees(csrc, folder) if by_ptx else emulation_sees(csrc, folder, truth)
            print(f"{'seen' if seen else 'UNSEEN':7} {one.name}: {seen}", flush=True)
            unseen += [one.name] if seen is None else []
    print(f"{len(unseen)} unseen")
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
