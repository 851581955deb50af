"""Imported before anything else of DeepSpeed.

DeepSpeed logs for ever to what stdout is when it is first imported; ours is for answers, so that is stderr.
"""

import contextlib
import logging
import sys

# Before DeepSpeed looks for a GPU: that each rank runs on a CPU is no news, pemt tells it of them all.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed

deepspeed.utils.logger.setLevel("WARNING")
# On a CPU DeepSpeed would compile an all-reduce for inference at a machine's first start: for a minute, in silence, and
# nothing calls it (a private corner of DeepSpeed 0.19).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
