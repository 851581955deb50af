"""bf16 by the device: what is native, what a run takes by default and keeps, what emulation is said to cost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from pemt.checkpoint.folder import RunFolderError, check_run_folder, start_run_folder
from pemt.checkpoint.resume import resolve_run
from pemt.commands import doctor
from pemt.config.parse import parse_config
from pemt.config.schema import AdaptConfig, RunConfig
from pemt.engine import Engine, launcher, precision
from pemt.run.train import run_adapt
from tests.conftest import python
from tests.support.tiny import adapt_config, make_base, tiny_task, write_task_files

CPU = torch.device("cpu")
TASK = "tiny-precision"


def machine(monkeypatch: pytest.MonkeyPatch, *, native: bool) -> None:
    """From now on the CPU has bf16, or has it not; nobody has asked before."""
    monkeypatch.setattr(launcher, "bf16_is_native", lambda device: native)
    launcher.bf16_is_native_everywhere.cache_clear()
    precision.warn_of_emulation.cache_clear()


@pytest.fixture(autouse=True)
def asked_anew() -> object:
    yield
    launcher.bf16_is_native_everywhere.cache_clear()


@pytest.mark.parametrize(
    ("flags", "capability", "isa", "native"),
    [
        ({"avx2", "avx512_bf16"}, "AVX512", "", True),
        ({"amx_bf16"}, "AVX512", "all", True),
        ({"avx512_bf16"}, "AVX512", "avx512_core_amx", True),
        ({"avx512_bf16"}, "AVX512", "no such word", True),
        ({"avx512f"}, "AVX512", "", False),
        ({"avx2"}, "AVX2", "", False),
        (set(), "DEFAULT", "", False),
        ({"avx512_bf16", "amx_bf16"}, "AVX2", "", False),
        ({"avx512_bf16", "amx_bf16"}, "AVX512", "AVX2", False),
        ({"avx512_bf16"}, "AVX512", "avx512_core_vnni", False),
    ],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_cpu_is_what_its_flags_and_the_two_variables_allow(
    monkeypatch: pytest.MonkeyPatch,
    flags: set[str],
    capability: str,
    isa: str,
    native: bool,
    variable: str,
) -> None:
    monkeypatch.setattr(precision, "_flags_of_cpu", lambda: flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(variable, isa)
    assert precision.bf16_is_native(CPU) == native


@pytest.mark.parametrize(
    ("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_a_gpu_is_native_from_sm_80_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.bf16_is_native(torch.device("cuda:0")) == native


@pytest.mark.parametrize(
    ("given", "native", "bf16"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"fp16": True}, True, False),
        ({"bf16": True}, False, True),
        ({"bf16": False}, True, False),
    ],
)
def test_a_field_that_is_not_set_is_the_devices(
    tmp_path: Path, given: dict[str, bool], native: bool, bf16: bool
) -> None:
    config = AdaptConfig(**{**plain(tmp_path), **given})
    assert precision.resolve_precision(config, native=native).bf16 is bf16


def plain(folder: Path) -> dict[str, str]:
    return {
        "model_name_or_path": str(folder),
        "output_dir": str(folder / "run"),
        "bank_dir": str(folder),
        "task_name": TASK,
    }


def test_both_variables_show_on_any_machine_what_avx2_sees() -> None:
    program = "import torch; from pemt.engine.precision import *; print(bf16_is_native(torch.device('cpu')))"
    done = python("-c", program, check=True, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert done.stdout.split() == ["False"]


VOTE = """
import os, sys, torch
from pemt.engine import launcher
rank = int(os.fork() > 0)
store = torch.distributed.FileStore(sys.argv[1], 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
launcher.bf16_is_native = lambda device: rank == 1
# In one write, since both processes have this pipe.
os.write(1, b"native " if launcher.bf16_is_native_everywhere(torch.device("cpu")) else b"emulated ")
"""


def test_one_rank_without_bf16_is_enough_for_all(tmp_path: Path) -> None:
    done = python("-c", VOTE, str(tmp_path / "store"), check=True, GLOO_SOCKET_IFNAME="lo")
    assert done.stdout.split() == ["emulated", "emulated"], done.stderr


def test_yaml_takes_null_true_and_false(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for value in (None, True, False):
        file.write_text(yaml.safe_dump({**plain(tmp_path), "bf16": value}))
        assert parse_config(AdaptConfig, ["--config", str(file)], prog="pemt adapt").bf16 is value
    assert RunConfig.bf16 is None


@pytest.fixture
def config(tmp_path: Path) -> AdaptConfig:
    make_base(tmp_path / "base")
    write_task_files(tmp_path / "data", seed=0)
    tiny_task(TASK)
    paths = (tmp_path / "base", tmp_path / "data", tmp_path / "run", tmp_path)
    return adapt_config(*paths, TASK, method="adapter", bf16=None, max_steps=1)


def precision_of(config: AdaptConfig) -> bool | None:
    """Whether a run of this configuration would compute in bf16 now."""
    return Engine(resolve_run(config, world_size=1).config).config.bf16


@pytest.mark.parametrize("native", [True, False])
def test_a_run_tells_what_it_has_taken_and_keeps_it_on_another_machine(
    config: AdaptConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    native: bool,
) -> None:
    folder = Path(config.output_dir)
    machine(monkeypatch, native=native)
    run_adapt(config)
    told = capsys.readouterr()
    first = told.out.splitlines()[0]
    assert ("bf16 (native here)" if native else "fp32 (bf16 would be emulated here)") in first
    assert "emulates it" not in told.err
    assert yaml.safe_load((folder / "config.yaml").read_text())["bf16"] is native

    machine(monkeypatch, native=not native)
    run_adapt(config)
    assert "this run is finished" in capsys.readouterr().out
    (folder / "all_results.json").unlink()
    assert precision_of(config) is native, "from the checkpoint"
    assert ("emulates it" in capsys.readouterr().err) == native
    for checkpoint in folder.glob("checkpoint-*"):
        checkpoint.rename(folder / f"away-{checkpoint.name}")
    assert precision_of(config) is native, "from config.yaml"
    assert precision_of(replace(config, overwrite_output_dir=True)) is not native
    assert precision_of(replace(config, output_dir=f"{folder}-2")) is not native


def test_a_run_of_another_precision_is_still_another_run(config: AdaptConfig) -> None:
    start_run_folder(replace(config, bf16=True), fresh=True)
    check_run_folder(config)
    check_run_folder(replace(config, bf16=True))
    with pytest.raises(RunFolderError, match="with bf16 True, not False"):
        check_run_folder(replace(config, bf16=False))


def test_emulation_is_warned_of_once_with_measured_milliseconds(
    config: AdaptConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = iter((90.04, 7.2))
    monkeypatch.setattr(precision, "product_ms", lambda *_: next(measured))
    machine(monkeypatch, native=False)
    wanted = replace(config, bf16=True)
    precision_of(wanted)
    precision_of(wanted)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "emulates" in line]
    assert "takes 90.0 ms in bf16 and 7.2 ms in fp32" in warning
    assert "--bf16 false" in warning


def test_the_product_is_really_taken() -> None:
    with FlopCounterMode(display=False) as counter:
        assert precision.product_ms(CPU, torch.bfloat16, 5) > 0
    assert counter.get_total_flops() == 3 * 2 * 5 * 768 * 3072


@pytest.mark.parametrize("native", [True, False])
def test_doctor_tells_the_default(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr("pemt.engine.bf16_is_native", lambda device: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = doctor.precision()
    assert found.found.startswith("bf16" if native else "fp32")
    assert found.state == ("ok" if native else "note")
    assert re.search("avx512_bf16", found.advice) is None or not native
