from .batch import Division as Division, Wanted as Wanted, divide as divide
from .job import (
    CHIPS as CHIPS,
    Cluster as Cluster,
    Job as Job,
    PlanError as PlanError,
    Zero as Zero,
    read_zero as read_zero,
)
from .report import describe as describe, figures as figures
from .shapes import KNOWN as KNOWN, Shape as Shape, read_shape as read_shape
from .speed import flops as flops
