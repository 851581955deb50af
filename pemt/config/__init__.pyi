from .command_line import (
    Parser as Parser,
    command_parser as command_parser,
    count as count,
    nearest as nearest,
    verb_parser as verb_parser,
)
from .deepspeed import (
    DeepSpeedConfigError as DeepSpeedConfigError,
    launched_deepspeed_json as launched_deepspeed_json,
    read_deepspeed_json as read_deepspeed_json,
)
from .distribution import (
    DISTRIBUTION as DISTRIBUTION,
    how_to_install as how_to_install,
    installed_version as installed_version,
    other_distribution as other_distribution,
    version_line as version_line,
)
from .errors import (
    ConfigError as ConfigError,
    PemtError as PemtError,
    flags_in_messages as flags_in_messages,
    spell_fields as spell_fields,
)
from .help import described as described
from .json_file import read_json_object as read_json_object
from .parse import (
    field_keys as field_keys,
    flatten as flatten,
    make_config as make_config,
    parse_config as parse_config,
    read_recipe as read_recipe,
    read_yaml_mapping as read_yaml_mapping,
    recipe_names as recipe_names,
    sweep_file as sweep_file,
    value_sources as value_sources,
)
from .parts import (
    TENSORBOARD as TENSORBOARD,
    TRACKER_RUNS as TRACKER_RUNS,
    AdapterConfig as AdapterConfig,
    ExpertConfig as ExpertConfig,
    MixtureConfig as MixtureConfig,
)
from .schema import (
    NON_IDENTITY_FIELDS as NON_IDENTITY_FIELDS,
    PEFT_METHODS as PEFT_METHODS,
    AdaptConfig as AdaptConfig,
    RunConfig as RunConfig,
    SourceConfig as SourceConfig,
)
from .yaml_file import load_yaml as load_yaml
