"""`pemt evaluate`: what a finished run scores."""

from __future__ import annotations

from pemt.commands.fields import split_fields
from pemt.config import Parser, command_parser
from pemt.engine import importing_libraries

FIELDS = (
    "\nAny field of the run's configuration may be given too, as on the command line of `pemt adapt`:\n"
    "--model_name_or_path and --bank_dir where these lie elsewhere now, --bf16 false on an old GPU, ..."
)


def run(arguments: list[str]) -> None:
    """`pemt evaluate`."""
    options, overrides = split_fields(make_parser(), arguments)
    with importing_libraries():
        from pemt.run import check_finished
    check_finished(options["run_dir"], overrides)
    with importing_libraries():
        from pemt.run import evaluate_run
    options["constrain_labels"] = options["constrain_labels"] == "true"
    evaluate_run(**options, overrides=overrides)


def make_parser() -> Parser:
    """The command line of `pemt evaluate`, less the run's fields."""
    from pemt.tasks import SPLITS

    parser = command_parser(
        "evaluate",
        "Score a finished run's best weights on a split of its task, or of another." + FIELDS,
        "pemt evaluate runs/cb --split validation --num_beams 4",
        "pemt evaluate runs/cb --task_name rte --data_dir data/RTE",
    )
    parser.add_argument("run_dir", help="output_dir of the run")
    parser.add_argument("--split", default="test", choices=SPLITS, help="default: test")
    parser.add_argument("--output_file", help="JSON; default: <split>_results.json in run_dir")
    parser.add_argument(
        "--constrain_labels",
        choices=("true", "false"),
        default="false",
        help="score the most likely label too, as *_by_likelihood; default: false",
    )
    return parser
