"""What a run tells while it trains, from rank 0: TensorBoard, log.jsonl and one progress bar."""

from pemt.monitor.bars import EvaluationBar, ProgressBar, quiet_libraries
from pemt.monitor.board import TENSORBOARD_FOLDER, record_outcome
from pemt.monitor.gates import GateNames, entropy_NL
from pemt.monitor.log_file import LOG_FILE, read_log
from pemt.monitor.monitor import Monitor

__all__ = [
    "LOG_FILE",
    "TENSORBOARD_FOLDER",
    "EvaluationBar",
    "GateNames",
    "Monitor",
    "ProgressBar",
    "entropy_NL",
    "quiet_libraries",
    "read_log",
    "record_outcome",
]
