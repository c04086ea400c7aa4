"""The options of every command, made from the signature and docstring of its function.

The signature gives options, types and defaults; the docstring gives the help (`signatures`). The
parameters in `POSITIONAL` are positional, every other one is an option of the same name.
"""

import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import docstring_parser
import jsonargparse

import jaxqat
from jaxqat.cli.signatures import COMMANDS, Signature, signature
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment

BAD_INPUT = 2

SUPPLIED = ("console", "command")  # Parameters that `dispatch` fills in; they are no options.
# Positional parameters, and what a message calls them.
POSITIONAL = {
    "run": "the run folder",
    "folder": "the folder of runs",
    "runs": "the run folders",
    "network": "the network",
    "paths": "the images",
}
OPTION_NAMES = {"from_run": "from"}  # A Python parameter cannot be called `from`.


class Parser(jsonargparse.ArgumentParser):
    """Reports what is wrong in one line, suggests the nearest option, and exits with status 2."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def format_help(self) -> str:
        """Return the help; jsonargparse writes `<class 'Path'>` where `Path` is meant."""
        return re.sub(r"<class\s+'(\w+)'>", r"\1", super().format_help())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit."""
        del ex
        unknown = re.search(r"unrecognized arguments: (--[\w.-]+)", message)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings]
            message += f"; the nearest right one is {configs.nearest(unknown[1], options)}"
        # jsonargparse names a missing argument by its place in the namespace.
        commands = "|".join(COMMANDS)
        for name, meaning in POSITIONAL.items():
            message = re.sub(rf"\b({commands})\.{name}\b", meaning, message)
        message = re.sub(rf"\b({commands})\.(workdir|format|output|target)\b", r"--\2", message)
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        print(f"All options: {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def make_parser() -> Parser:
    """Return the parser of all commands."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="jaxqat", description="Quantization-aware training for JAX.")
    parser.add_argument("--version", action="version", version=f"jaxqat {jaxqat.__version__}")
    commands = parser.add_subcommands(
        dest="command", required=True, description="`jaxqat COMMAND --help` lists the options."
    )
    for name in COMMANDS:
        summary, description, helps = _documentation(signature(name).doc)
        subparser = Parser(prog=f"jaxqat {name}", description=description)
        _add_options(subparser, signature(name), helps)
        subparser.add_argument(
            "--quiet",
            action="store_true",
            help="Print results, warnings and errors, but no progress.",
        )
        commands.add_subcommand(name, subparser, help=summary)
        subparser.prog = f"jaxqat {name}"  # jsonargparse makes it 'jaxqat [options] train'.
    return parser


def _documentation(doc: str) -> tuple[str, str, dict[str, str]]:
    """Summary, description and help of each parameter, from a command's docstring."""
    parsed = docstring_parser.parse(doc)
    summary = parsed.short_description or ""
    description = "\n\n".join(filter(None, (summary, parsed.long_description)))
    # argparse formats a help with %, so that a plain one is doubled.
    helps = {p.arg_name: (p.description or "").replace("%", "%%") for p in parsed.params}
    return summary, description, helps


def _add_options(parser: Parser, command: Signature, helps: Mapping[str, str]) -> None:
    """Add an argument for each parameter of a command's function."""
    for name, hint in command.hints.items():
        if name in SUPPLIED:
            continue
        if hint is Experiment:
            parser.add_argument("--config", action="config", help=helps[name])
            continue
        required = name not in command.defaults
        settings: dict[str, Any] = _type_settings(hint)
        settings["help"] = helps[name]
        if not required and "action" not in settings:
            settings["default"] = command.defaults[name]
        if name not in POSITIONAL:
            option = OPTION_NAMES.get(name, name)
            parser.add_argument(f"--{option}", **settings, required=required)
        elif required:
            parser.add_argument(name, **settings)
        else:
            parser.add_argument(name, **settings, nargs="?")
    if Experiment in command.hints.values():
        parser.add_class_arguments(Experiment, help="The experiment")


def _type_settings(hint: Any) -> dict[str, Any]:
    """What `add_argument` is told of a parameter's type."""
    parts = typing.get_args(hint)
    inner = parts[0] if parts[1:] == (types.NoneType,) else hint  # T of `T | None`.
    if typing.get_origin(inner) is Literal:
        return {"choices": typing.get_args(inner)}
    if inner is bool:
        return {"action": "store_true"}
    if typing.get_origin(inner) is Sequence:
        return {"type": typing.get_args(inner)[0], "nargs": "+"}
    return {"type": hint}
