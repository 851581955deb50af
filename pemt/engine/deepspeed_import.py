"""Imported before anything else of DeepSpeed.

DeepSpeed logs for ever to what stdout is when it is first imported; ours is for answers, so that is stderr.
"""

import contextlib
import sys

with contextlib.redirect_stdout(sys.stderr):
    import deepspeed

deepspeed.utils.logger.setLevel("WARNING")
