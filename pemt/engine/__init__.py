"""A job's processes: the only package that imports accelerate or deepspeed."""

import contextlib
import sys

# DeepSpeed logs to what stdout is when it is first imported, for ever; ours is for results.
with contextlib.redirect_stdout(sys.stderr):
    from pemt.engine.engine import Engine
    from pemt.engine.job import EngineError, check_world_size, shut_down
    from pemt.engine.trained_state import MOMENTS, TrainedState, full_size

__all__ = [
    "MOMENTS",
    "Engine",
    "EngineError",
    "TrainedState",
    "check_world_size",
    "full_size",
    "shut_down",
]
