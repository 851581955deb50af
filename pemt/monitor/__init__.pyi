from .bars import (
    EvaluationBar as EvaluationBar,
    ProgressBar as ProgressBar,
    quiet_libraries as quiet_libraries,
)
from .board import record_outcome as record_outcome
from .figures import gate_map as gate_map, save_gate_map as save_gate_map
from .gates import (
    MOST_TAGS as MOST_TAGS,
    GateNames as GateNames,
    NamedGates as NamedGates,
    gates_in as gates_in,
    mean_by_source as mean_by_source,
)
from .log_file import (
    LOG_FILE as LOG_FILE,
    TENSORBOARD_FOLDER as TENSORBOARD_FOLDER,
    read_log as read_log,
)
from .monitor import Monitor as Monitor
from .progress import log_on_stderr as log_on_stderr, progress_logger as progress_logger
