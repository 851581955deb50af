from .plan import Run as Run, Sweep as Sweep, read_sweep as read_sweep
from .run import run_sweep as run_sweep
