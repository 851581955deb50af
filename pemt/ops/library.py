"""Compiles the kernels with torch.utils.cpp_extension: once per machine type, kept in its cache.

The cache is TORCH_EXTENSIONS_DIR, or PyTorch's default folder. A library's folder is named by a
digest of all that it was made of, and is complete when it holds `built.json`. A file lock lets
one process of many (also on other nodes, where the file system carries locks) do the work; it
falls with its process, so a killed build blocks nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from .checks import OpsError

CSRC = Path(__file__).parent / "csrc"
BINDING = (CSRC / "binding.cpp", CSRC / "ops.cpp")  # of every implementation
CUDA_ARCHITECTURES = ("sm_80", "sm_90a")
_VECTOR_FLAGS = {  # by the instruction sets PyTorch tells apart: nodes can share a cache
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
               "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}  # fmt: skip


class BuildError(OpsError):
    """A kernel cannot be compiled or loaded here."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """One shared library: `BINDING` and an implementation of `kernels.h`."""

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    machines: str  # what it runs on, for people
    cuda_flags: tuple[str, ...] = ()
    include_paths: tuple[Path, ...] = (CSRC,)

    @property
    def namespace(self) -> str:
        """Where its ops are found: torch.ops.<namespace>."""
        return f"pemt_{self.name}"

    @property
    def folder(self) -> Path:
        """Where it is built; named by sources, headers, flags and torch, so that a change builds anew."""
        made_of = [torch.__version__, *self.flags, *self.cuda_flags]
        digest = hashlib.sha256("\n".join(made_of).encode())
        headers = [path for folder in self.include_paths for path in sorted(folder.glob("*.*h"))]
        for path in (*self.sources, *headers):
            digest.update(path.read_bytes())
        return build_root() / f"{self.namespace}_{digest.hexdigest()[:12]}"

    @property
    def built(self) -> Path:
        """The file that tells of a finished build."""
        return self.folder / "built.json"


def build_root() -> Path:
    """Where all is kept that is made for this machine."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root).expanduser()


def cpu_library() -> Library:
    """The C++ kernels for this machine's CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ("-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
    return Library(
        name="cpu",
        sources=(*BINDING, CSRC / "cpu_kernels.cpp", CSRC / "cpu_few_rows.cpp"),
        machines=capability,
        flags=(*flags, *_VECTOR_FLAGS.get(capability, []), "-DPEMT_LIBRARY=pemt_cpu"),
    )


def cuda_library() -> Library:
    """Machine code for CUDA_ARCHITECTURES, and PTX for what comes after them.

    Raises:
        BuildError: this PyTorch has no CUDA; or nobody has built it, and there is no toolkit to do it with.
    """
    if torch.version.cuda is None:
        raise BuildError("the cuda kernel does not build: this PyTorch has no CUDA")
    numbers = [name.removeprefix("sm_") for name in CUDA_ARCHITECTURES]
    binaries = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    library = Library(
        name="cuda",
        sources=(*BINDING, CSRC / "cuda_mixture.cu", CSRC / "cuda_sparsity.cu"),
        machines=", ".join([*CUDA_ARCHITECTURES, "PTX of compute_90"]),
        flags=("-O3", "-DPEMT_CUDA", "-DPEMT_LIBRARY=pemt_cuda"),
        cuda_flags=("-O3", *binaries, "-gencode=arch=compute_90,code=compute_90"),
    )
    if not library.built.exists():  # one that was built elsewhere and carried here needs no toolkit
        cuda_toolkit()
    return library


def cuda_toolkit() -> Path:
    """A folder with nvcc and CUDA's headers: PyTorch's CUDA_HOME, which may be that of an nvcc alone, or a usual one.

    Raises:
        BuildError: there is none.
    """
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    wheels = [
        Path(folder, "nvidia", f"cu{torch.version.cuda}".split(".")[0]) for folder in sys.path
    ]
    tried = [Path(cpp_extension.CUDA_HOME)] if cpp_extension.CUDA_HOME else []
    tried += [folder for folder in (*usual, *wheels) if folder.is_dir()]
    for folder in tried:
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder
    raise BuildError(
        "the cuda kernel does not build: no folder with bin/nvcc and include/cuda_runtime.h, tried"
        f" {', '.join(map(str, tried)) or '/usr/local/cuda'}; set CUDA_HOME"
    )


def check_capability() -> None:
    """Raise BuildError where the current GPU is older than the oldest that machine code is made for."""
    oldest = (int(CUDA_ARCHITECTURES[0].removeprefix("sm_")[0]), 0)
    found = torch.cuda.get_device_capability()
    if found < oldest:
        raise BuildError(
            f"the cuda kernel does not run: this GPU is of compute capability {found[0]}.{found[1]},"
            f" needed is {oldest[0]}.{oldest[1]}"
        )


LIBRARIES = {"cpu": cpu_library, "cuda": cuda_library}  # by the device type that they serve


def load(library: Library) -> None:
    """Builds the library if nobody has, and loads it into this process.

    Raises:
        BuildError: no compiler, a failed compilation, or a library that does not load.
    """
    if not library.built.exists():
        build(library)
    try:
        torch.ops.load_library(str(library.folder / f"{library.namespace}.so"))
    except OSError as error:
        raise BuildError(f"the {library.name} kernel does not load: {error}") from error


def build(library: Library) -> None:
    """Compiles the library into its folder, unless another process does so meanwhile."""
    try:
        library.folder.mkdir(parents=True, exist_ok=True)
        with locked(library.folder / "build.lock"):
            if library.built.exists():
                return
            started = time.monotonic()
            print(
                f"pemt: compiling the {library.name} kernel for {library.machines}, which takes a minute or more, "
                f"once: it is kept in {library.folder}",
                file=sys.stderr,
                flush=True,
            )
            # a killed build leaves cpp_extension's own lock, which would be waited on forever
            (library.folder / "lock").unlink(missing_ok=True)
            _compile(library)
            seconds = round(time.monotonic() - started, 1)
            written = library.built.with_suffix(".new")
            written.write_text(json.dumps({"seconds": seconds}))
            written.replace(library.built)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error: " in line), lines[0])
        if library.cuda_flags:
            reason += f" (CUDA_HOME is {cpp_extension.CUDA_HOME})"
        raise BuildError(f"the {library.name} kernel does not build: {reason.strip()}") from error


def _compile(library: Library) -> None:
    # pip puts `ninja` beside `python`, which need not be on PATH
    folders = os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join(folders)
    if library.cuda_flags:
        cpp_extension.CUDA_HOME = str(cuda_toolkit())
    cpp_extension.load(
        name=library.namespace,
        sources=[str(path) for path in library.sources],
        extra_cflags=list(library.flags),
        extra_cuda_cflags=list(library.cuda_flags),
        extra_include_paths=[str(path) for path in library.include_paths],
        extra_ldflags=["-fopenmp"],
        build_directory=str(library.folder),
        is_python_module=False,
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is within the block; the lock falls with its process."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
