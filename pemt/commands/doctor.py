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
    Parser,
    PemtError,
    command_parser,
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


def run(arguments: list[str]) -> None:
    """`pemt doctor`."""
    options = make_parser().parse_args(arguments)
    missing = []
    for finding in examine(probe=not options.no_launch):
        print(finding, flush=True)
        if finding.state == "missing":
            missing.append(finding.what)
    if missing:
        raise PemtError(
            f"a run cannot start here: {', '.join(missing)}; the lines above say what to do"
        )
    print("ready")


def make_parser() -> Parser:
    """The command line of `pemt doctor`."""
    parser = command_parser(
        "doctor",
        "Versions, devices, the fused op, and whether DeepSpeed really runs here;\n"
        "about each thing that is missing, what to do. Exit code 2 where a run could not start.",
        "pemt doctor",
    )
    parser.add_argument(
        "--no_launch", action="store_true", help="do not start DeepSpeed (it takes half a minute)"
    )
    return parser


@dataclass(frozen=True)
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

    def __str__(self) -> str:
        mark = {"ok": "ok  ", "note": "note", "missing": "MISS"}[self.state]
        advice = f"\n      -> {self.advice}" if self.advice else ""
        return f"{mark}  {self.what}: {self.found}{advice}"


def examine(*, probe: bool) -> Iterator[Finding]:
    """Every finding, as soon as it is known; `probe` also launches DeepSpeed."""
    yield from packages()
    yield machine()
    has_torch = importlib.util.find_spec("torch") is not None
    if has_torch:
        yield from devices()
        yield from precision()
        yield from ops()
    yield launcher()
    if probe and has_torch:
        yield deepspeed_runs()


def packages() -> Iterator[Finding]:
    """Python and the packages that pemt stands on, each against what pemt's metadata asks for."""
    yield Finding("python", "ok", platform.python_version())
    yield installation()
    needed = _needed()
    for name in PACKAGES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", f"pip install {name}")
            continue
        wanted = needed.get(name)
        if wanted is None or wanted.specifier.contains(found, prereleases=True):
            yield Finding(name, "ok", found)
        else:
            found = f"{found}, and pemt needs {wanted.specifier}"
            yield Finding(name, "missing", found, f"pip install '{wanted}'")


def installation() -> Finding:
    """Which distribution this program is, and whether the other one of its import name is there."""
    if other := other_distribution():
        return Finding("pemt", "note", version_line(), other)
    if installed_version() is None:
        return Finding("pemt", "note", version_line(), f"for the command: {how_to_install()}")
    return Finding("pemt", "ok", version_line())


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
    if _gpus() or "OMP_NUM_THREADS" in os.environ:
        return Finding("machine", "ok", found)
    return Finding(
        "machine",
        "note",
        f"{found}; OMP_NUM_THREADS is not set",
        "several ranks on these cores get in each other's way: export OMP_NUM_THREADS=1",
    )


def _gpus() -> int:
    """How many PyTorch sees; 0 where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def devices() -> Iterator[Finding]:
    """The accelerators that PyTorch sees."""
    import torch

    if not _gpus():
        found = "no GPU"
        advice = "nvidia-smi tells whether the driver sees one, CUDA_VISIBLE_DEVICES whether it is hidden"
        if torch.version.cuda is None:
            found = "no GPU, and this PyTorch is built without CUDA"
            advice = (
                "for the demo and small models CPU ranks do; for the rest install a CUDA build of PyTorch on a machine "
                "with GPUs"
            )
        yield Finding("devices", "note", found, advice)
    for index in range(_gpus()):
        about = torch.cuda.get_device_properties(index)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        if about.major >= 8:
            yield Finding(f"cuda:{index}", "ok", found)
        else:
            advice = "a run trains in fp32 on it, unless told otherwise (fp16 overflows in T5 from size large on)"
            yield Finding(f"cuda:{index}", "note", f"{found}, no bfloat16", advice)


def precision() -> Iterator[Finding]:
    """What a run on all of this machine's devices computes in, where its `bf16` is not set."""
    import torch

    try:
        from pemt.engine import bf16_is_native
    except ImportError:  # a package is missing, which has been reported
        return
    names = [f"cuda:{index}" for index in range(_gpus())] or ["cpu"]
    emulated = [name for name in names if not bf16_is_native(torch.device(name))]
    if not emulated:
        yield Finding("precision", "ok", "bf16, which is native here")
        return
    yield Finding(
        "precision",
        "note",
        f"fp32: {', '.join(emulated)} would emulate bf16",
        "bf16 is native on GPUs from sm_80 on and on CPUs with avx512_bf16 or amx_bf16; what --bf16 true costs "
        "here, a run measures and tells at its start",
    )


def ops() -> Iterator[Finding]:
    """Each library of the fused op: built, to be built, or why it cannot be."""
    import torch

    from pemt.ops import OpsError, library

    for name, make in library.LIBRARIES.items():
        what = f"ops, {name}"
        if name == "cuda" and torch.version.cuda is None:
            yield Finding(what, "ok", "not needed, PyTorch has no CUDA")
            continue
        try:
            found = make()
        except OpsError as error:
            yield Finding(
                what,
                "note",
                f"{error}; plain PyTorch runs instead",
                "`pemt ops info` tells the same for every device; needed are a C++17 compiler, ninja "
                "and, for GPUs, the CUDA toolkit's nvcc",
            )
            continue
        if found.built.exists():
            yield Finding(what, "ok", f"built for {found.machines}")
        else:
            advice = "build it ahead, once for all ranks: pemt ops build"
            yield Finding(what, "note", "not built yet; the first run builds it", advice)


def launcher() -> Finding:
    """The program that starts several ranks."""
    if shutil.which("accelerate"):
        return Finding("launcher", "ok", "accelerate launch")
    advice = "activate the environment, or write `python -m accelerate.commands.launch`"
    return Finding("launcher", "note", "`accelerate` is not on PATH", advice)


def deepspeed_runs() -> Finding:
    """Whether DeepSpeed trains here: a real engine, two steps, in processes of its own."""
    what, ranks = "deepspeed runs", min(2, _gpus()) or 2
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
                what,
                "missing",
                f"no: still not done after {PROBE_SECONDS} s",
                "the ranks do not find each other: look at the firewall, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
            )
    probed = re.search(r"^probe: (.*)$", done.stdout, flags=re.MULTILINE)
    if done.returncode == 0 and probed:
        return Finding(what, "ok", f"yes: {probed[1]}")
    return Finding(
        what,
        "missing",
        f"no: {_last_error(done.stderr + done.stdout)}",
        "see all it says: " + " ".join(command[:-4]) + " --deepspeed_config_file "
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
