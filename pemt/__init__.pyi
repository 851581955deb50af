from .config import (
    AdaptConfig as AdaptConfig,
    PemtError as PemtError,
    SourceConfig as SourceConfig,
)
from .publish import (
    PemtModel as PemtModel,
    SourceModel as SourceModel,
    TargetModel as TargetModel,
    export_run as export_run,
    source_model as source_model,
    target_model as target_model,
)
from .run import (
    Predictor as Predictor,
    RunResults as RunResults,
    SourceResults as SourceResults,
    evaluate_run as evaluate_run,
    run_adapt as run_adapt,
    run_source as run_source,
)
