"""`pemt predict`: what a finished run answers."""

from __future__ import annotations

from pemt.commands.evaluate import FIELDS
from pemt.commands.fields import split_fields
from pemt.config import Parser, PemtError, command_parser, count
from pemt.engine import importing_libraries

# Fields of the run under the names that generation goes by, and what `--help` says of them.
NAMES = {
    "batch_size": ("per_device_eval_batch_size", "inputs at a time; default: as the run's"),
    "max_new_tokens": ("max_target_length", "default: the task's longest answer"),
    "num_beams": ("num_beams", "default: as the run was scored"),
}


def run(arguments: list[str]) -> None:
    """`pemt predict`."""
    options, overrides = split_fields(make_parser(), arguments)
    asked = options.pop("constrain_labels")
    constrain = None if asked is None else asked == "true"
    generating = [name for name in ("max_new_tokens", "num_beams") if options[name] is not None]
    if generating:
        if constrain:
            raise PemtError(
                f"--constrain_labels true: --{generating[0]} is for generated answers; leave one of them out"
            )
        constrain = False
    for name, (field, _) in NAMES.items():
        value = options.pop(name)
        overrides += [] if value is None else [f"--{field}", str(value)]
    with importing_libraries():
        from pemt.run import check_finished
    check_finished(options["run_dir"], overrides)
    with importing_libraries():
        from pemt.run import predict_file
    predict_file(**options, constrain_labels=constrain, overrides=overrides)


def make_parser() -> Parser:
    """The command line of `pemt predict`, less the run's fields."""
    parser = command_parser(
        "predict",
        "Answer inputs with a finished run: a line of JSON each, in their order, with `input`, `prediction` and\n"
        "`gates`, the weight of every source task in every FFN; of a task with labels also `label`, its name, and\n"
        "`probabilities`, how likely each label is. Behind a launcher give --output_file." + FIELDS,
        "pemt predict runs/cb --input_file new.jsonl --output_file answers.jsonl",
        """echo '{"premise": "It rains.", "hypothesis": "It is wet."}' | pemt predict runs/cb""",
    )
    parser.add_argument("run_dir", help="output_dir of the run")
    parser.add_argument(
        "--input_file",
        default="-",
        metavar="FILE",
        help='jsonl: rows with the task\'s fields, without a label, or {"input": text}; default: stdin',
    )
    parser.add_argument("--output_file", metavar="FILE", help="jsonl; default: stdout")
    for name, (_, about) in NAMES.items():
        parser.add_argument(f"--{name}", type=count, metavar="N", help=about)
    parser.add_argument(
        "--constrain_labels",
        choices=("true", "false"),
        help="answer with the most likely label, or generate; default: true for a task with labels,\n"
        "unless --num_beams or --max_new_tokens is given",
    )
    return parser
