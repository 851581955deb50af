from .evidence import run_evidence as run_evidence
from .run import run_demo as run_demo
