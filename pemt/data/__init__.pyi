from .batching import (
    IGNORED_LABEL as IGNORED_LABEL,
    TrainBatches as TrainBatches,
    collate as collate,
    eval_batches as eval_batches,
    to_device as to_device,
)
from .encoding import label_ids as label_ids
from .errors import DataError as DataError
from .in_memory import (
    MemoryData as MemoryData,
    Rows as Rows,
    memory_data as memory_data,
)
from .loading import (
    TaskData as TaskData,
    lengths_of as lengths_of,
    load_split as load_split,
    load_task_data as load_task_data,
)
from .local_files import task_files as task_files
from .streaming import StreamBatches as StreamBatches, TrainStream as TrainStream
from .to_predict import (
    note_on_inputs as note_on_inputs,
    read_inputs as read_inputs,
    sources_of as sources_of,
)
from .vocabulary import (
    encode_sources as encode_sources,
    encode_targets as encode_targets,
    unknown as unknown,
)
