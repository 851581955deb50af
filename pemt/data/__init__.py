"""Data: files or the hub in, tokenised sets and batches out."""

from pemt.data.batching import EvalBatches, TrainBatches, collate
from pemt.data.errors import DataError
from pemt.data.loading import TaskData, lengths_of, load_task_data
from pemt.data.tokenizer import load_tokenizer

__all__ = [
    "DataError",
    "EvalBatches",
    "TaskData",
    "TrainBatches",
    "collate",
    "lengths_of",
    "load_task_data",
    "load_tokenizer",
]
