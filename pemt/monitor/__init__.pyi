from .bars import EvaluationBar as EvaluationBar, quiet_libraries as quiet_libraries
from .board import record_outcome as record_outcome
from .gates import GateNames as GateNames, entropy_NL as entropy_NL
from .log_file import (
    LOG_FILE as LOG_FILE,
    TENSORBOARD_FOLDER as TENSORBOARD_FOLDER,
    read_log as read_log,
)
from .monitor import Monitor as Monitor
