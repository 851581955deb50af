"""Kernels are built once by one of many processes; a failed build falls back, or stops the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pemt.ops import OpsError, build, library, select
from pemt.ops.select import kernels_for

BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from pemt.ops import library
def compile_slowly(found):
    with open(sys.argv[1], "a") as log:
        log.write("compiled\\n")
    time.sleep(0.5)
library._compile = compile_slowly
library.build(library.cpu_library())
assert library.cpu_library().built.exists()
"""
USE = """
import warnings, torch
from pemt import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y, _ = ops.ffn_output(torch.ones(1, 1, 2), torch.ones(4, 2), torch.ones(3, 1), torch.ones(1, 1),
                              [1.0], [1], sparsity=False)
print(y.flatten().tolist())
print(*[warning.message for warning in caught if warning.category is RuntimeWarning], sep="\\n")
"""


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if name != "PEMT_OPS"}
    return {**without, "TORCH_EXTENSIONS_DIR": str(tmp_path), **extra}


def test_one_process_of_many_builds(tmp_path):
    log = tmp_path / "log"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_SLOWLY, str(log)],
            env=environment(tmp_path), stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert log.read_text() == "compiled\n"


def test_what_a_killed_build_left_does_not_block_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    found = library.cpu_library()
    found.folder.mkdir(parents=True)
    (found.folder / "lock").touch()
    (found.folder / "build.lock").touch()
    seen = []
    monkeypatch.setattr(
        library, "_compile", lambda found: seen.append((found.folder / "lock").exists())
    )
    library.build(found)
    assert seen == [False]
    assert found.built.exists()


def test_a_changed_source_gets_its_own_folder(tmp_path):
    source = tmp_path / "one.cpp"
    folders = set()
    for text in ("int one;", "int two;"):
        source.write_text(text)
        folders.add(library.Library(name="x", sources=(source,), machines="", flags=()).folder)
    assert len(folders) == 2


def test_a_failed_build_warns_once_and_plain_pytorch_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment(tmp_path, CXX="false"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers, warning = done.stdout.strip().splitlines()
    assert numbers == "[4.0, 4.0, 4.0]"
    assert warning.startswith("the cpu kernel does not build: ")
    assert warning.endswith("; plain PyTorch runs instead")


def test_a_failed_build_is_an_error_where_the_kernel_is_forced(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment(tmp_path, CXX="false", PEMT_OPS="cpu"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "BuildError: the cpu kernel does not build: " in done.stderr


def test_a_kernel_of_another_device_cannot_be_forced(monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "cuda")
    with pytest.raises(OpsError, match="PEMT_OPS: 'cuda' cannot run tensors on cpu"):
        kernels_for(torch.empty(0))
    assert "cpu tensors: an error: PEMT_OPS: 'cuda' cannot run" in build.describe()[-1]


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 1), True)])
def test_a_gpu_that_is_too_old_gets_plain_pytorch(capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cuda = library.Library(name="cpu", sources=(), machines="", flags=())
    monkeypatch.setitem(library.LIBRARIES, "cuda", lambda: cuda)
    monkeypatch.setattr(library, "load", lambda found: None)
    compiled_kernels = select.Kernels.of(torch.ops.pemt)
    monkeypatch.setattr(select.Kernels, "of", lambda namespace: compiled_kernels)
    for cache in (select._best, select.compiled):
        cache.cache_clear()
    try:
        if runs:
            assert select._best("cuda") is compiled_kernels
            return
        with pytest.warns(
            RuntimeWarning, match=r"capability 7\.5, needed is 8\.0; plain PyTorch runs"
        ):
            assert select._best("cuda") is select.PACKED
        with pytest.raises(OpsError, match=r"needed is 8\.0"):
            select.compiled("cuda")
    finally:
        for cache in (select._best, select.compiled):
            cache.cache_clear()


def test_info_tells_what_is_built_and_what_would_run(tmp_path, monkeypatch):
    monkeypatch.delenv("PEMT_OPS", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    before = build.describe()
    assert any(line.startswith("cpu library: not built yet") for line in before)
    assert before[-1] == "cpu tensors: cpu kernels, to be built at first use"
    monkeypatch.setattr(library, "_compile", lambda found: None)
    lines = build.build_all()
    assert lines[0].startswith("cpu: built for ")
    if torch.version.cuda is None:
        assert lines[1] == "cuda: skipped, this PyTorch has no CUDA"
    assert build.describe()[-1] == "cpu tensors: cpu kernels, built"
    monkeypatch.setenv("PEMT_OPS", "packed")
    assert build.describe()[-1] == "cpu tensors: packed, forced by PEMT_OPS"


def test_a_cuda_home_without_headers_is_looked_for_elsewhere(tmp_path, monkeypatch):
    """That of an nvcc in /usr/bin or /usr/local/bin is the folder above, where no header is."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = {path: tmp_path / path for path in ("nvcc alone", "wheels/nvidia/cu13")}
    for folder in found.values():
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "nvcc").touch()
    monkeypatch.setattr(library.cpp_extension, "CUDA_HOME", str(found["nvcc alone"]))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "wheels")])
    monkeypatch.setattr(Path, "is_dir", lambda folder: folder.is_relative_to(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    with pytest.raises(
        library.BuildError, match=r"no folder with .*cuda_runtime\.h, tried .*alone"
    ):
        library.cuda_library()
    (found["wheels/nvidia/cu13"] / "include").mkdir()
    (found["wheels/nvidia/cu13"] / "include" / "cuda_runtime.h").touch()
    assert library.cuda_toolkit() == found["wheels/nvidia/cu13"]
    built = library.cuda_library().built
    monkeypatch.setattr(sys, "path", [])
    built.parent.mkdir(parents=True)
    built.touch()
    assert library.cuda_library().built == built, "carried here: no toolkit is needed"
