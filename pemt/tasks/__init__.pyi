from .registry import register_task as register_task, task_names as task_names
from .scoring import example_scores as example_scores, score as score
from .task import (
    SPLITS as SPLITS,
    HubSource as HubSource,
    RowError as RowError,
    Task as Task,
    TaskError as TaskError,
    class_name as class_name,
    encodable as encodable,
    example_of as example_of,
    has_label as has_label,
    label_name as label_name,
    source_of as source_of,
)
from .task_file import get_task as get_task, load_task_file as load_task_file
