"""Memory, traffic and time of a run before it is paid for: formulas held against real runs by the tests."""

from pemt.plan.job import Cluster, Job, PlanError, Zero, read_zero
from pemt.plan.report import describe, figures

__all__ = ["Cluster", "Job", "PlanError", "Zero", "describe", "figures", "read_zero"]
