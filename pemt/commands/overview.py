"""What `pemt --help` shows: a screen of 24 lines of 80 columns, the two stages first."""

from __future__ import annotations

MAIN_ROAD = """\
usage: pemt COMMAND [--config FILE] [--field value ...]

Adapt a frozen T5 to a new task by mixing experts learned on other tasks.

the two stages:
  source    train a source task's expert and prompt, into a bank
              pemt source --config source --task_name mnli \\
                  --output_dir runs/mnli --bank_dir bank
  adapt     adapt to a target task over the bank's frozen experts
              pemt adapt --config adapt --task_name superglue-cb \\
                  --output_dir runs/cb --bank_dir bank
around them:
"""

# command -> what it does, in at most 26 characters: two of them stand side by side
AROUND = {
    "evaluate": "score a finished run",
    "predict": "answer a jsonl or stdin",
    "report": "a page about runs",
    "sweep": "methods, tasks, seeds",
    "bank": "list, add, export experts",
    "demo": "both stages on a laptop",
    "export": "a run, for others",
    "push": "an export to the hub",
    "pull": "an export from the hub",
    "tasks": "the tasks there are",
    "plan": "memory, traffic, time",
    "doctor": "is this machine ready",
    "ops": "build the fused op",
    "bench": "time the op",
    "completion": "for bash and zsh",
}

END = """\

`pemt COMMAND --help` has its fields and an example. On several ranks:
  accelerate launch --config_file launchers/accelerate/cpu.yaml \\
      --deepspeed_config_file ds_configs/zero2.json -m pemt adapt --config ...
"""


def overview() -> str:
    """The help of `pemt` itself."""
    cells = [f"{name:<11}{about:<28}" for name, about in AROUND.items()]
    half = (len(cells) + 1) // 2
    pairs = zip(cells[:half], [*cells[half:], ""][:half], strict=True)
    return MAIN_ROAD + "".join(f"  {left}{right}".rstrip() + "\n" for left, right in pairs) + END
