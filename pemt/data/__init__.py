"""Data: files or the hub in, tokenised sets and batches out."""

from pemt.data.batching import EvalBatches, TrainBatches, collate
from pemt.data.errors import DataError
from pemt.data.loading import TaskData, encode_sources, lengths_of, load_split, load_task_data
from pemt.data.streaming import StreamBatches, TrainStream
from pemt.data.to_predict import read_inputs, sources_of
from pemt.data.vocabulary import unknown
from pemt.model import load_tokenizer

__all__ = [
    "DataError",
    "EvalBatches",
    "StreamBatches",
    "TaskData",
    "TrainBatches",
    "TrainStream",
    "collate",
    "encode_sources",
    "lengths_of",
    "load_split",
    "load_task_data",
    "load_tokenizer",
    "read_inputs",
    "sources_of",
    "unknown",
]
