"""TensorBoard's HPARAMS table: a run's configuration beside what it reached.

Written into the run's own folder. `SummaryWriter.add_hparams` would make a second run of it.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from pemt.config import AdaptConfig, RunConfig, SourceConfig, described, field_keys, flatten

# Where files lie and how often something is written do not tell two runs apart.
LEFT_OUT = {
    *("output_dir", "bank_dir", "data_dir", "task_file", "tokenizer_name", "description"),
    *("resume_from_checkpoint", "overwrite_output_dir", "skip_bad_rows", "logging_steps"),
    *("report_to", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
}
# The page shows five columns unasked, those first that are said to differ between runs; the score after
# them is in view from a window of 1500 pixels on.
SHOWN_FIRST = {"few_shot", "learning_rate", "method", "seed", "task_name"}


def hparams_summaries(config: RunConfig, metrics: Sequence[str]) -> Iterator[Summary]:
    """The three records that the plugin reads; `metrics` are the tags of the scalars to show."""
    kinds = columns()
    # Of several runs the plugin takes the columns of any one: they must be the same in all.
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=kind, differs=name in SHOWN_FIRST)
            for name, kind in kinds.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag)
            for tag in metrics
        ],
    )
    started = plugin_data_pb2.SessionStartInfo()
    for name, value in plain_fields(config).items():
        if name in LEFT_OUT:
            continue
        if kinds[name] == api_pb2.DATA_TYPE_FLOAT64:
            started.hparams[name].number_value = value
        elif kinds[name] == api_pb2.DATA_TYPE_BOOL:
            started.hparams[name].bool_value = value
        else:
            started.hparams[name].string_value = value
    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    data = plugin_data_pb2.HParamsPluginData
    yield _summary(metadata.EXPERIMENT_TAG, data(experiment=experiment))
    yield _summary(metadata.SESSION_START_INFO_TAG, data(session_start_info=started))
    yield _summary(metadata.SESSION_END_INFO_TAG, data(session_end_info=ended))


def columns() -> dict[str, int]:
    """Every column's name and type: the fields of both stages, nested ones with dots."""
    return {
        each.key: _type(each.type)
        for kind in (RunConfig, AdaptConfig, SourceConfig)
        for each in described(kind)
        if each.key not in LEFT_OUT
    }


def plain_fields(config: RunConfig) -> dict[str, Any]:
    """All that is set of a configuration, sections by dots, as trackers take it: no lists, no mappings."""
    found = flatten(asdict(config), field_keys(type(config)))
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in found.items()
        if value is not None
    }


def _type(hint: Any) -> int:
    kinds = {*(typing.get_args(hint) or [hint])} - {type(None)}
    if kinds == {bool}:
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_FLOAT64 if kinds <= {int, float} else api_pb2.DATA_TYPE_STRING


def _summary(tag: str, content: plugin_data_pb2.HParamsPluginData) -> Summary:
    content.version = metadata.PLUGIN_DATA_VERSION
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString()
    )
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])
