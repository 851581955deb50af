"""`pemt completion`: what a shell needs to complete pemt's commands, fields, tasks and recipes."""

from __future__ import annotations

from pemt.commands import COMMANDS
from pemt.config import Parser, command_parser

# By shell, what completes `--config`: recipes and files (`RECIPE_OR_FILE` in fields.py names them).
FUNCTIONS = {
    "bash": '_pemt_recipes() {{ compgen -W "{recipes}" -- $1; compgen -f -- $1; }}',
    "zsh": "_pemt_recipes() {{ _alternative 'recipes:recipe:({recipes})' 'files:file:_files' }}",
}


def run(arguments: list[str]) -> None:
    """`pemt completion`."""
    shell = make_parser().parse_args(arguments).shell
    import shtab

    from pemt.config import recipe_names

    root = Parser(prog="pemt", allow_abbrev=False)
    root.add_argument("--version", action="store_true", help="pemt's version")
    commands = root.add_subparsers(metavar="COMMAND")
    for name, command in COMMANDS.items():
        parser = command.make_parser()
        about = (parser.description or name).split("\n")[0]
        commands.add_parser(name, parents=[parser], add_help=False, help=about, description=about)
    function = FUNCTIONS[shell].format(recipes=" ".join(recipe_names()))
    print(shtab.complete(root, shell, preamble=function))


def make_parser() -> Parser:
    """The command line of `pemt completion`."""
    parser = command_parser(
        "completion",
        "Print a completion script, for a file that the shell reads.",
        "pemt completion bash > ~/.local/share/bash-completion/completions/pemt",
        "pemt completion zsh > ~/.zfunc/_pemt          # with fpath+=~/.zfunc before compinit",
    )
    parser.add_argument("shell", choices=list(FUNCTIONS))
    return parser
