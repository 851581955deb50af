"""Kernels are built once by one of many processes; a failed build falls back, or stops the run."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from pemt import ops
from pemt.ops import OpsError, build, library, select
from pemt.ops.select import kernels_for
from tests.support.child import in_a_child, start_child


def build_slowly(log: Path) -> None:
    def compile_slowly(found):
        with log.open("a") as file:
            file.write("compiled\n")
        time.sleep(0.5)

    library._compile = compile_slowly
    library.build(library.cpu_library())
    assert library.cpu_library().built.exists()


def use() -> None:
    """The op twice, in a process that has not looked for kernels yet."""
    for cache in (select._best, select.compiled):
        cache.cache_clear()
    one = torch.ones(1, 1)
    given = (torch.ones(1, 1, 2), torch.ones(4, 2), torch.ones(3, 1), one, [1.0], [1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y, _ = ops.ffn_output(*given, sparsity=False)
    print(y.flatten().tolist())
    for warning in caught:
        if warning.category is RuntimeWarning:
            print(warning.message)


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    monkeypatch.delenv("PEMT_OPS", raising=False)


def test_one_process_of_many_builds(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    log, outs = tmp_path / "log", [tmp_path / f"out-{number}" for number in range(3)]
    started = [start_child(out, lambda: build_slowly(log)) for out in outs]
    ended = [os.waitpid(child, 0)[1] for child in started]
    assert ended == [0, 0, 0], "".join(out.read_text() for out in outs)
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


@pytest.mark.usefixtures("without_compiler")
def test_a_failed_build_warns_once_and_plain_pytorch_runs(tmp_path):
    out = tmp_path / "out"
    assert in_a_child(out, use) == 0, out.read_text()
    told, numbers, warning = out.read_text().splitlines()
    assert told.startswith("pemt: compiling the cpu kernel")
    assert numbers == "[4.0, 4.0, 4.0]"
    assert warning.startswith("the cpu kernel does not build: ")
    assert warning.endswith("; plain PyTorch runs instead")


@pytest.mark.usefixtures("without_compiler")
def test_a_failed_build_is_an_error_where_the_kernel_is_forced(tmp_path, monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "cpu")
    assert in_a_child(tmp_path / "out", use) != 0
    assert "BuildError: the cpu kernel does not build: " in (tmp_path / "out").read_text()


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
