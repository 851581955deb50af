"""What `pemt --help` shows: a screen of 24 lines of 80 columns, the two stages first."""

from __future__ import annotations

from pemt.commands import COMMANDS

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

END = """\

`pemt COMMAND --help` has its fields and an example. On several ranks:
  accelerate launch --config_file launchers/accelerate/cpu.yaml \\
      --deepspeed_config_file ds_configs/zero2.json -m pemt adapt --config ...
"""


def overview() -> str:
    """The help of `pemt` itself."""
    around = [each for each in COMMANDS.values() if each.name not in ("source", "adapt")]
    cells = [f"{each.name:<11}{each.about:<28}" for each in around]
    half = (len(cells) + 1) // 2
    pairs = zip(cells[:half], [*cells[half:], ""][:half], strict=True)
    return MAIN_ROAD + "".join(f"  {left}{right}".rstrip() + "\n" for left, right in pairs) + END
