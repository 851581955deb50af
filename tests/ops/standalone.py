"""The op's checks on a GPU with torch alone: neither pytest nor any other package, and nothing installed.

    python -m tests.ops.standalone [--brief] [--device cpu]

One line a check; one that fails does not stop the next. The exit status tells whether any did.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--brief", action="store_true", help="a few, as under a sanitizer")
    options = parser.parse_args(arguments)
    package_alone()
    import torch

    from pemt.ops import OpsError
    from pemt.ops.select import prepare
    from tests.ops.gpu_checks import BRIEF, CHECKS

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: --device cpu runs the C++ kernels")
        return 1
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    print(f"torch {torch.__version__} on {name}")
    os.environ["PEMT_OPS"] = options.device
    began = time.monotonic()
    try:
        prepare(options.device)
    except OpsError as error:
        print(f"FAILED  {error}")
        return 1
    print(f"kernels: built or loaded in {time.monotonic() - began:.1f} s")
    checks = BRIEF if options.brief else CHECKS
    failed = 0
    for name, check in checks.items():
        began = time.monotonic()
        try:
            check(options.device)
        except Exception:  # noqa: BLE001, whatever it was, the next is tried
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"passed  {name} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)


def package_alone() -> None:
    """`pemt` without its `__init__`, which wants lazy_loader: pemt.ops is found in it, and knows torch alone."""
    package = ModuleType("pemt")
    package.__path__ = [str(ROOT / "pemt")]
    sys.modules["pemt"] = package


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
