from .registry import register_task as register_task, task_names as task_names
from .scoring import (
    Metric as Metric,
    check_metrics as check_metrics,
    example_scores as example_scores,
    metrics_of as metrics_of,
    score as score,
    without_redundant_mean as without_redundant_mean,
)
from .task import (
    DEFAULT_TARGET_LENGTH as DEFAULT_TARGET_LENGTH,
    SPLITS as SPLITS,
    HubSource as HubSource,
    Task as Task,
    TaskError as TaskError,
    example_of as example_of,
    has_label as has_label,
    label_with_name as label_with_name,
    longest_target as longest_target,
    source_of as source_of,
    text_of as text_of,
)
from .task_file import (
    get_task as get_task,
    load_task_file as load_task_file,
    task_text as task_text,
)
from .values import (
    ClassId as ClassId,
    RowError as RowError,
    encodable as encodable,
    has_numbers as has_numbers,
    plain as plain,
)
