from .config import (
    AdaptConfig as AdaptConfig,
    PemtError as PemtError,
    SourceConfig as SourceConfig,
)
from .publish import PemtModel as PemtModel, export_run as export_run
from .run import Predictor as Predictor, run_adapt as run_adapt, run_source as run_source
