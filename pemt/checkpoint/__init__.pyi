from .checkpoint import Checkpoints as Checkpoints, load_lazily as load_lazily
from .choose import Checkpoint as Checkpoint
from .folder import (
    CONFIG as CONFIG,
    GIVEN_TASK as GIVEN_TASK,
    PREDICTIONS as PREDICTIONS,
    RESULTS as RESULTS,
    RunFolderError as RunFolderError,
    plain_values as plain_values,
    saved_config as saved_config,
    start_run_folder as start_run_folder,
    tracker_runs as tracker_runs,
    write_tracker_runs as write_tracker_runs,
)
from .lock import LockError as LockError, RunLock as RunLock, check_lock as check_lock
from .names import checkpoint_folders as checkpoint_folders
from .resume import (
    Config as Config,
    Finished as Finished,
    Fresh as Fresh,
    Resume as Resume,
    resolve_run as resolve_run,
)
from .status import (
    STATUS as STATUS,
    RunStatus as RunStatus,
    finished_status as finished_status,
    saved_checkpoint as saved_checkpoint,
    write_status as write_status,
)
from .train_state import (
    WEIGHTS as WEIGHTS,
    TrainState as TrainState,
    merit_of as merit_of,
    train_state_of as train_state_of,
    trained_count as trained_count,
)
