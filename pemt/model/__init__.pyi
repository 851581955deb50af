from .base import (
    bars_on_terminals_alone as bars_on_terminals_alone,
    fetch_base as fetch_base,
    load_config as load_config,
    load_pretrained as load_pretrained,
    precision_warning as precision_warning,
)
from .base_files import refusal as refusal
from .baselines import BitFitT5 as BitFitT5, FullT5 as FullT5
from .experts import (
    ExpertSource as ExpertSource,
    ModelError as ModelError,
    expert_shapes as expert_shapes,
)
from .families import (
    FAMILIES as FAMILIES,
    Family as Family,
    family_of as family_of,
    is_gated as is_gated,
    stack_size as stack_size,
)
from .inject import checked_base as checked_base
from .lazy import (
    make_lazy as make_lazy,
    materialize_all as materialize_all,
    read_lazy as read_lazy,
)
from .mixture import MIXTURES as MIXTURES, LoraMixture as LoraMixture
from .peft_model import (
    PREFIXES as PREFIXES,
    PeftT5 as PeftT5,
    peft_settings as peft_settings,
    starts_from_text as starts_from_text,
)
from .pemt_t5 import PemtT5 as PemtT5, check_weights as check_weights
from .prompts import (
    description_prompt as description_prompt,
    rank_by_prompt as rank_by_prompt,
    top_sources as top_sources,
)
from .shape import base_digest as base_digest, base_shape as base_shape
from .sites import (
    Site as Site,
    absent_sites as absent_sites,
    is_linear as is_linear,
    projections_of as projections_of,
    sites_of as sites_of,
    target_sites as target_sites,
)
from .trained_t5 import PemtOutput as PemtOutput, TrainedT5 as TrainedT5
