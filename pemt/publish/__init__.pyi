from .adapter_format import CONFIG as CONFIG
from .bank_transfer import pull_bank as pull_bank, push_bank as push_bank
from .export import export_run as export_run
from .for_trainers import (
    SourceModel as SourceModel,
    TargetModel as TargetModel,
    source_model as source_model,
    target_model as target_model,
)
from .pemt_model import PemtModel as PemtModel
