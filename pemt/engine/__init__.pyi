from .engine import Engine as Engine
from .environment import (
    leave_working_folder as leave_working_folder,
    open_streams as open_streams,
    own_cache as own_cache,
    use_writable_caches as use_writable_caches,
)
from .exit import finish as finish, run_and_exit as run_and_exit
from .job import Job as Job
from .launcher import EngineError as EngineError, shut_down as shut_down
from .optimizer_state import full_size as full_size
from .precision import bf16_is_native as bf16_is_native
from .process import (
    ProcessId as ProcessId,
    launcher_began as launcher_began,
    peak as peak,
    this_process as this_process,
    watch_peak as watch_peak,
)
from .signals import (
    INTERRUPTED_STATUS as INTERRUPTED_STATUS,
    KILLED_STATUS as KILLED_STATUS,
    Interrupted as Interrupted,
    StopSignals as StopSignals,
    is_interactive as is_interactive,
)
from .status_lines import LIBRARIES as LIBRARIES, importing_libraries as importing_libraries
from .trackers import Tracker as Tracker, open_trackers as open_trackers
from .watchdog import Watchdog as Watchdog
