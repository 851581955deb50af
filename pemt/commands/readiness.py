"""`pemt doctor`: what is installed, what is built, what runs here, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pemt.config import (
    DISTRIBUTION,
    how_to_install,
    installed_version,
    other_distribution,
    version_line,
)

# What pemt stands on is imported where it is looked at: any of it may be what is missing.
if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGES = (
    *("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers"),
    *("safetensors", "evaluate", "jsonargparse", "tensorboard", "huggingface_hub", "packaging"),
)
PROBE_SECONDS = 180
_PROBE_JSON = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Args:
        what: what was looked at.
        state: `ok`; `note`, which is slower or poorer but works; `missing`, which stops a run.
        found: what is there.
        advice: what to do about it; empty where nothing needs doing.
    """

    what: str
    state: Literal["ok", "note", "missing"]
    found: str
    advice: str = ""

    def lines(self) -> list[str]:
        """As printed: a mark, the finding, and below it the advice."""
        mark = {"ok": "ok  ", "note": "note", "missing": "MISS"}[self.state]
        first = f"{mark}  {self.what}: {self.found}"
        return [first, *([f"      -> {self.advice}"] if self.advice else [])]


def examine(*, probe: bool = True) -> Iterator[Finding]:
    """Every finding, as soon as it is known; `probe` also launches DeepSpeed."""
    yield from packages()
    has_torch = importlib.util.find_spec("torch") is not None
    yield machine()
    if has_torch:
        yield from devices()
        yield from precision()
        yield from ops()
    yield launcher()
    if probe and has_torch:
        yield deepspeed_runs()


def packages() -> Iterator[Finding]:
    """Python and the packages that pemt stands on, each against what pemt's metadata asks for."""
    yield Finding(what="python", state="ok", found=platform.python_version())
    yield installation()
    needed = _needed()
    for name in PACKAGES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                what=name, state="missing", found="not installed", advice=f"pip install {name}"
            )
            continue
        wanted = needed.get(name)
        if wanted is not None and not wanted.specifier.contains(found, prereleases=True):
            yield Finding(
                what=name,
                state="missing",
                found=f"{found}, and pemt needs {wanted.specifier}",
                advice=f"pip install '{wanted}'",
            )
        else:
            yield Finding(what=name, state="ok", found=found)


def installation() -> Finding:
    """Which distribution this program is, and whether the other one of its import name is there."""
    if other := other_distribution():
        return Finding(what="pemt", state="note", found=version_line(), advice=other)
    if installed_version() is None:
        return Finding(
            what="pemt",
            state="note",
            found=version_line(),
            advice=f"for the command: {how_to_install()}",
        )
    return Finding(what="pemt", state="ok", found=version_line())


def _needed() -> dict[str, Requirement]:
    """What pemt's metadata asks for, by name; empty where pemt or `packaging` is not installed."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except ImportError:  # PackageNotFoundError is one
        return {}
    needed = [Requirement(line) for line in lines]
    return {each.name: each for each in needed if each.marker is None or each.marker.evaluate()}


def machine() -> Finding:
    """Cores, memory, threads per process."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = f"{cores} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}"
    if not _has_gpu() and "OMP_NUM_THREADS" not in os.environ:
        return Finding(
            what="machine",
            state="note",
            found=f"{found}; OMP_NUM_THREADS is not set",
            advice="several ranks on these cores get in each other's way: export OMP_NUM_THREADS=1",
        )
    return Finding(what="machine", state="ok", found=found)


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def devices() -> Iterator[Finding]:
    """The accelerators that PyTorch sees."""
    import torch

    if not torch.cuda.is_available():
        no_cuda = torch.version.cuda is None
        yield Finding(
            what="devices",
            state="note",
            found="no GPU" + (", and this PyTorch is built without CUDA" if no_cuda else ""),
            advice="for the demo and small models CPU ranks do; for the rest install a CUDA build of "
            "PyTorch on a machine with GPUs"
            if no_cuda
            else "nvidia-smi tells whether the driver sees one, CUDA_VISIBLE_DEVICES whether it is hidden",
        )
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        if about.major >= 8:
            yield Finding(what=f"cuda:{index}", state="ok", found=found)
        else:
            yield Finding(
                what=f"cuda:{index}",
                state="note",
                found=f"{found}, no bfloat16",
                advice="a run trains in fp32 on it, unless told otherwise (fp16 overflows in T5 from size large on)",
            )


def precision() -> Iterator[Finding]:
    """What a run on all of this machine's devices computes in, where its `bf16` is not set."""
    import torch

    try:
        from pemt.engine import bf16_is_native
    except ImportError:  # a package is missing, which has been reported
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    emulated = [name for name in names if not bf16_is_native(torch.device(name))]
    if not emulated:
        yield Finding(what="precision", state="ok", found="bf16, which is native here")
        return
    yield Finding(
        what="precision",
        state="note",
        found=f"fp32: {', '.join(emulated)} would emulate bf16",
        advice="bf16 is native on GPUs from sm_80 on and on CPUs with avx512_bf16 or amx_bf16; what --bf16 true costs "
        "here, a run measures and tells at its start",
    )


def ops() -> Iterator[Finding]:
    """Each library of the fused op: built, to be built, or why it cannot be."""
    import torch

    from pemt.ops import OpsError, library

    for name, make in library.LIBRARIES.items():
        if name == "cuda" and torch.version.cuda is None:
            yield Finding(what="ops, cuda", state="ok", found="not needed, PyTorch has no CUDA")
            continue
        try:
            found = make()
        except OpsError as error:
            yield Finding(
                what=f"ops, {name}",
                state="note",
                found=f"{error}; plain PyTorch runs instead",
                advice="`pemt ops info` tells the same for every device; needed are a C++17 compiler, ninja "
                "and, for GPUs, the CUDA toolkit's nvcc",
            )
            continue
        if found.built.exists():
            yield Finding(what=f"ops, {name}", state="ok", found=f"built for {found.machines}")
        else:
            yield Finding(
                what=f"ops, {name}",
                state="note",
                found="not built yet; the first run builds it",
                advice="build it ahead, once for all ranks: pemt ops build",
            )


def launcher() -> Finding:
    """The program that starts several ranks."""
    if shutil.which("accelerate"):
        return Finding(what="launcher", state="ok", found="accelerate launch")
    return Finding(
        what="launcher",
        state="note",
        found="`accelerate` is not on PATH",
        advice="activate the environment, or write `python -m accelerate.commands.launch`",
    )


def deepspeed_runs() -> Finding:
    """Whether DeepSpeed trains here: a real engine, two steps, in processes of its own."""
    import torch

    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(_PROBE_JSON))
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed"),
            *("--num_machines", "1", "--num_processes", str(ranks), "--main_process_port", "0"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--zero3_init_flag", "false"),
            *("--deepspeed_config_file", str(path), "-m", "pemt.engine.probe"),
        ]
        try:
            done = subprocess.run(
                command,
                env=_probe_environment(),
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Finding(
                what="deepspeed runs",
                state="missing",
                found=f"no: still not done after {PROBE_SECONDS} s",
                advice="the ranks do not find each other: look at the firewall, NCCL_SOCKET_IFNAME and "
                "GLOO_SOCKET_IFNAME",
            )
    probed = re.search(r"^probe: (.*)$", done.stdout, flags=re.MULTILINE)
    if done.returncode == 0 and probed:
        return Finding(what="deepspeed runs", state="ok", found=f"yes: {probed[1]}")
    return Finding(
        what="deepspeed runs",
        state="missing",
        found=f"no: {_last_error(done.stderr + done.stdout)}",
        advice="see all it says: " + " ".join(command[:-4]) + " --deepspeed_config_file "
        "ds_configs/zero2.json -m pemt.engine.probe",
    )


def _probe_environment() -> dict[str, str]:
    """This process's, so that the ranks find pemt and ninja as it did, and one thread each."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    root = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path, "PYTHONPATH": python_path}


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b", line)
    ]
    named = [line for line in errors if "ChildFailedError" not in line]
    return (named or [line for line in lines if line] or ["it said nothing"])[-1][:200]
