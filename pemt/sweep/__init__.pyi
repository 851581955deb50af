from .plan import read_sweep as read_sweep
from .run import run_sweep as run_sweep
