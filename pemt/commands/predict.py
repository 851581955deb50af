"""`pemt predict`: what a finished run answers."""

from __future__ import annotations

from pemt.commands.evaluate import FIELDS
from pemt.config import Parser, command_parser, count

# Fields of the run, under the names that generation goes by.
NAMES = {
    "batch_size": "per_device_eval_batch_size",
    "max_new_tokens": "max_target_length",
    "num_beams": "num_beams",
}


def run(arguments: list[str]) -> None:
    """`pemt predict`."""
    from pemt.commands.fields import split_fields

    options, overrides = split_fields(_own_parser(), arguments)
    for name, field in NAMES.items():
        value = options.pop(name)
        overrides += [] if value is None else [f"--{field}", str(value)]
    from pemt.run import check_finished

    check_finished(options["run_dir"], overrides)
    from pemt.run import predict_file  # with all the libraries

    predict_file(**options, overrides=overrides)


def make_parser() -> Parser:
    """Its own options and the run's fields: what a shell can complete behind it."""
    from pemt.commands.fields import add_fields

    return add_fields(_own_parser())


def _own_parser() -> Parser:
    parser = command_parser(
        "predict",
        "Answer inputs with a finished run: a line of JSON each, in their order, with `input`, `prediction` and\n"
        "`gates`, the weight of every source task in every FFN. Behind a launcher give --output_file."
        + FIELDS,
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
    for name, about in (
        ("batch_size", "inputs at a time; default: as the run's"),
        ("max_new_tokens", "default: the task's longest answer"),
        ("num_beams", "default: as the run was scored"),
    ):
        parser.add_argument(f"--{name}", type=count, metavar="N", help=about)
    return parser
