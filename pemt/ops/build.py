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
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils import cpp_extension

from .checks import OpsError

CSRC = Path(__file__).parent / "csrc"
CUDA_ARCHITECTURES = ("80", "90a")
_VECTOR_FLAGS = {  # by the instruction sets PyTorch tells apart: nodes can share a cache
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
               "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}  # fmt: skip


class BuildError(OpsError):
    """A kernel cannot be compiled or loaded here."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """One shared library: `ops.cpp` and an implementation of `kernels.h`."""

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    cuda_flags: tuple[str, ...] = ()
    headers: tuple[Path, ...] = field(default=(CSRC / "kernels.h",))

    @property
    def namespace(self) -> str:
        """Where its ops are found: torch.ops.<namespace>."""
        return f"pemt_{self.name}"

    @property
    def folder(self) -> Path:
        made_of = [torch.__version__, *self.flags, *self.cuda_flags]
        digest = hashlib.sha256("\n".join(made_of).encode())
        for path in (*self.sources, *self.headers):
            digest.update(path.read_bytes())
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        return Path(root) / f"{self.namespace}_{digest.hexdigest()[:12]}"

    @property
    def built(self) -> Path:
        return self.folder / "built.json"


def cpu_library() -> Library:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ("-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
    return Library(
        name="cpu",
        sources=(CSRC / "ops.cpp", CSRC / "cpu_kernels.cpp"),
        flags=(*flags, *_VECTOR_FLAGS.get(capability, []), "-DPEMT_LIBRARY=pemt_cpu"),
    )


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
        with _locked(library.folder / "build.lock"):
            if library.built.exists():
                return
            started = time.monotonic()
            # a killed build leaves cpp_extension's own lock, which would be waited on forever
            (library.folder / "lock").unlink(missing_ok=True)
            with _ninja_on_path():
                _compile(library)
            seconds = round(time.monotonic() - started, 1)
            library.built.write_text(json.dumps({"seconds": seconds, "flags": library.flags}))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error" in line.lower()), lines[0])
        raise BuildError(f"the {library.name} kernel does not build: {reason.strip()}") from error


def _compile(library: Library) -> None:
    cpp_extension.load(
        name=library.namespace,
        sources=[str(path) for path in library.sources],
        extra_cflags=list(library.flags),
        extra_cuda_cflags=list(library.cuda_flags),
        extra_include_paths=[str(CSRC)],
        extra_ldflags=["-fopenmp"],
        build_directory=str(library.folder),
        is_python_module=False,
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """pip puts `ninja` beside `python`, which need not be on PATH."""
    before = os.environ["PATH"]
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
