from .checkpoint import Checkpoints as Checkpoints
from .choose import Checkpoint as Checkpoint
from .folder import (
    CONFIG as CONFIG,
    GIVEN_TASK as GIVEN_TASK,
    PREDICTIONS as PREDICTIONS,
    RESULTS as RESULTS,
    RunFolderError as RunFolderError,
    begun_config as begun_config,
    plain_values as plain_values,
    start_run_folder as start_run_folder,
)
from .load import load_into_model as load_into_model, load_trained as load_trained
from .lock import LockError as LockError, RunLock as RunLock, check_lock as check_lock
from .names import checkpoint_folders as checkpoint_folders
from .resume import (
    Config as Config,
    Finished as Finished,
    Fresh as Fresh,
    Resume as Resume,
    resolve_run as resolve_run,
    warmup_notes as warmup_notes,
)
from .status import (
    STATUS as STATUS,
    State as State,
    saved_checkpoint as saved_checkpoint,
    write_status as write_status,
)
from .train_state import (
    WEIGHTS as WEIGHTS,
    TrainState as TrainState,
    train_state_of as train_state_of,
    trained_count as trained_count,
)
