"""`pemt adapt --help`: a configuration's fields in groups, those of the published recipe first."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import docstring_parser

from pemt.config.command_line import epilog

GROUPS: dict[str, tuple[str, ...]] = {
    "base model": (
        *("model_name_or_path", "tokenizer_name", "bf16", "fp16"),
        *("gradient_checkpointing", "torch_compile"),
    ),
    "data": (
        *("task_name", "task_file", "data_dir", "validation_split", "few_shot"),
        *("max_source_length", "max_target_length", "max_train_samples", "max_eval_samples"),
        *("data_seed", "skip_bad_rows", "streaming", "shuffle_buffer_size"),
        *("preprocessing_num_workers", "data_fingerprint"),
    ),
    "batch": (
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
        *("gradient_accumulation_steps", "pad_to_multiple_of"),
    ),
    "optimizer": (
        *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "max_skipped_steps", "seed"),
    ),
    "saving, validating and logging": (
        *("output_dir", "eval_strategy", "eval_steps", "num_beams", "logging_steps", "report_to"),
        *("save_steps", "save_total_limit", "save_errors", "resume_from_checkpoint"),
        *("overwrite_output_dir", "ddp_timeout"),
    ),
}
REST = "experts and mixture"  # what a stage has of its own: sections, bank, method
_SHOWN = "# --print_config behind it shows the whole configuration, and nothing runs"
_EXAMPLES = {
    "source": (
        "pemt source --config source --task_name mnli \\",
        "    --output_dir runs/mnli --bank_dir bank",
    ),
    "adapt": (
        "pemt adapt --config adapt --task_name superglue-cb \\",
        "    --output_dir runs/cb --bank_dir bank",
    ),
}
_METAVARS = {str: "TEXT", int: "INT", float: "FLOAT", bool: "{true,false}"}


@dataclass(frozen=True)
class Described:
    """A field as help shows it: its name on the command line, type, meaning, and default (MISSING: required)."""

    key: str
    type: Any
    about: str
    default: Any


def help_text(kind: type[Any], prog: str, recipe: Mapping[str, Any], recipes: list[str]) -> str:
    """The help of `pemt source` or `pemt adapt`, given the values of its own recipe and the names of all recipes."""
    name = prog.rpartition(" ")[2]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--field value ...]",
        description=f"{(kind.__doc__ or '').split(chr(10), 1)[0]} In each group the fields of the published recipe "
        f"(--config {name}) come first.",
        epilog=epilog(*_EXAMPLES[name], _SHOWN) if name in _EXAMPLES else None,
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML file, or a recipe's name ({', '.join(recipes)}); may be given more than once",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="the whole configuration; nothing runs"
    )
    for title, fields in grouped(kind).items():
        group = parser.add_argument_group(title)
        # required ones, then the recipe's
        for each in sorted(
            fields, key=lambda field: (not _required(field), field.key not in recipe)
        ):
            about = f"{each.about.rstrip('.')} ({_values(each, recipe)})"
            metavar = _metavar(each.type)
            group.add_argument(f"--{each.key}", metavar=metavar, help=about.replace("%", "%%"))
    return parser.format_help()


def grouped(kind: type[Any]) -> dict[str, list[Described]]:
    """All fields of a configuration by their group."""
    found = {title: list[Described]() for title in (*GROUPS, REST)}
    place = {key: title for title, keys in GROUPS.items() for key in keys}
    for each in described(kind):
        found[place.get(each.key, REST)].append(each)
    for title, keys in GROUPS.items():
        found[title].sort(key=lambda field: keys.index(field.key))
    return found


def described(kind: type[Any], prefix: str = "") -> Iterator[Described]:
    """Every field, those of sections with dots, in the dataclass's order."""
    parsed = docstring_parser.parse(kind.__doc__ or "")
    about = {each.arg_name: " ".join((each.description or "").split()) for each in parsed.params}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        section: Any = field.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            yield from described(section, f"{prefix}{field.name}.")
            continue
        default = field.default if section is dataclasses.MISSING else section()
        yield Described(f"{prefix}{field.name}", hints[field.name], about[field.name], default)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """An example keeps its lines, all else is wrapped; what a field means stands below its name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _required(field: Described) -> bool:
    return field.default is dataclasses.MISSING


def _values(field: Described, recipe: Mapping[str, Any]) -> str:
    notes = [f"recipe: {_yaml(recipe[field.key])}"] if field.key in recipe else []
    return ", ".join(
        [*notes, "required" if _required(field) else f"default: {_yaml(field.default)}"]
    )


def _yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_yaml, value))}]"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _metavar(hint: Any) -> str:
    """A type in a word, or what is allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [each for each in typing.get_args(hint) if each is not type(None)]
        return _metavar(kinds[-1] if str in kinds else kinds[0])
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) in (list, tuple):
        return "[A,B,...]"
    return _METAVARS.get(hint, "MAPPING")
