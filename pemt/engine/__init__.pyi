from .engine import Engine as Engine
from .exit import finish as finish, run_and_exit as run_and_exit
from .job import (
    EngineError as EngineError,
    check_world_size as check_world_size,
    shut_down as shut_down,
)
from .process import peak as peak, start_ticks as start_ticks, watch_peak as watch_peak
from .signals import (
    INTERRUPTED_STATUS as INTERRUPTED_STATUS,
    Interrupted as Interrupted,
    StopSignals as StopSignals,
)
from .trained_state import MOMENTS as MOMENTS, full_size as full_size
from .watchdog import Watchdog as Watchdog
