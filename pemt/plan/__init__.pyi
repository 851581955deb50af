from .batch import Division as Division, divide as divide
from .examples import examples_of as examples_of
from .hours import (
    Hours as Hours,
    PlannedRun as PlannedRun,
    added as added,
    fp32_bytes as fp32_bytes,
    hours_of as hours_of,
)
from .job import (
    CHIPS as CHIPS,
    MOST_EXPERTS as MOST_EXPERTS,
    Cluster as Cluster,
    Job as Job,
    PlanError as PlanError,
    Zero as Zero,
    read_zero as read_zero,
)
from .report import describe as describe, figures as figures
from .shapes import KNOWN as KNOWN, Shape as Shape, read_shape as read_shape
from .speed import flops as flops
