"""`pemt` and `python -m pemt`: a table of contents, no logic."""

from __future__ import annotations

import os
import sys
import time

from pemt.arguments import nearest
from pemt.commands import COMMANDS
from pemt.config import PemtError

USAGE = """\
usage: pemt COMMAND [--config FILE] [--field value ...]

Adapt a frozen T5 to a new task by mixing experts learned on other tasks (PEMT, arXiv 2402.15082).

the two stages:
  source   train one source task's expert and prompt, into a bank
             pemt source --config source --task_name mnli --output_dir runs/mnli --bank_dir bank
  adapt    adapt to a target task over the bank's frozen experts
             pemt adapt --config adapt --task_name superglue-cb --output_dir runs/cb --bank_dir bank

around them:
  demo     both stages on a small world that fits a laptop
  bank     list a bank, or import the published code's experts
  tasks    list the tasks
  ops      build the fused op ahead of a run, or tell what is built
  bench    time the op

`pemt COMMAND --help` lists a command's fields. On several ranks:
  accelerate launch --config_file launchers/accelerate/cpu.yaml \\
      --deepspeed_config_file ds_configs/zero2.json -m pemt adapt --config ...
"""


def main() -> None:
    """Run one command; a user's error is one line on stderr, from one rank, and exit code 2."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print(USAGE, end="")
        return
    try:
        if name not in COMMANDS:
            hint = nearest(name, list(COMMANDS), what=f"there are {', '.join(COMMANDS)}")
            raise PemtError(f"pemt {name}: no such command{hint}")
        COMMANDS[name](arguments)
    except PemtError as error:
        complain(error)
        # Not sys.exit: a rank that waits for the others at exit would hold the job up.
        os._exit(2)
    if "pemt.engine" in sys.modules:
        sys.modules["pemt.engine"].shut_down()


def complain(error: PemtError) -> None:
    """Print the error on rank 0; another rank prints only if rank 0 has not ended the job by then."""
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(5)
    print(f"pemt: error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
