"""`pemt evaluate` and `pemt predict`: what a finished run scores, and what it answers."""

from __future__ import annotations

import contextlib
import sys

from pemt.commands.parsers import Parser, command_parser

FIELDS = (
    "\nAny field of the run's configuration may be given too, as on the command line of `pemt adapt`:\n"
    "--model_name_or_path and --bank_dir where these lie elsewhere now, --bf16 false on an old GPU, ..."
)


def evaluate(arguments: list[str]) -> None:
    """`pemt evaluate`."""
    options, overrides = evaluate_parser().parse_known_args(arguments)
    from pemt.evaluate_run import evaluate_run

    evaluate_run(**vars(options), overrides=overrides)


def evaluate_parser() -> Parser:
    """The command line of `pemt evaluate`."""
    parser = command_parser(
        "evaluate",
        "Score a finished run's best weights on a split of its task, or of another." + FIELDS,
        "pemt evaluate runs/cb --split validation --num_beams 4",
        "pemt evaluate runs/cb --task_name rte --data_dir data/RTE",
    )
    parser.add_argument("run_dir", help="output_dir of the run")
    parser.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help="default: test"
    )
    parser.add_argument("--output_file", help="JSON; default: <split>_results.json in run_dir")
    return parser


def predict(arguments: list[str]) -> None:
    """`pemt predict`."""
    options, overrides = predict_parser().parse_known_args(arguments)
    given = vars(options)
    # Fields of the run, under the names that generation goes by.
    for name, field in (
        ("batch_size", "per_device_eval_batch_size"),
        ("max_new_tokens", "max_target_length"),
        ("num_beams", "num_beams"),
    ):
        value = given.pop(name)
        overrides += [] if value is None else [f"--{field}", value]
    # DeepSpeed's log goes to what stdout was when it was imported; here that is for predictions alone.
    with contextlib.redirect_stdout(sys.stderr):
        from pemt.predict import predict_file

    predict_file(**given, overrides=overrides)


def predict_parser() -> Parser:
    """The command line of `pemt predict`."""
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
    parser.add_argument("--batch_size", metavar="N", help="inputs at a time; default: as the run's")
    parser.add_argument("--max_new_tokens", metavar="N", help="default: the task's longest answer")
    parser.add_argument("--num_beams", metavar="N", help="default: as the run was scored")
    return parser
