"""The `jaxqat` command line: parse the options, call one command, return the exit status.

Each command is a function in `jaxqat.commands`. The signature of the function gives the options of
the command, their types and defaults; its docstring gives the help. The parameter `run` is
positional, every other parameter is an option of the same name. Bad input ends with the exit status
2, a failure on valid input with 1.
"""

import argparse
import inspect
import logging
import re
import shlex
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import docstring_parser
import jsonargparse
from rich.console import Console
from rich.logging import RichHandler

from jaxqat.commands import (
    analyze,
    benchmark,
    evaluate,
    export,
    lowering,
    quantize,
    report,
    train,
    verify,
)
from jaxqat.errors import InputError, RunError
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.training import Stopped

DONE, FAILED, BAD_INPUT = 0, 1, 2

# Each module holds the function of the same name.
_MODULES = (train, quantize, evaluate, analyze, verify, export, benchmark, lowering, report)
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
SUPPLIED = ("console", "command")  # Parameters that `main` fills in; they are no options.
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
        message = re.sub(rf"\b({commands})\.run\b", "the run folder", message)
        message = re.sub(rf"\b({commands})\.(workdir|format|output|target)\b", r"--\2", message)
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        print(f"All options: {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def make_parser() -> Parser:
    """Return the parser of all commands."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="jaxqat", description="Quantization-aware training for JAX.")
    commands = parser.add_subcommands(
        dest="command", required=True, description="`jaxqat COMMAND --help` lists the options."
    )
    for name, module in COMMANDS.items():
        summary, description, helps = _documentation(getattr(module, name))
        subparser = Parser(prog=f"jaxqat {name}", description=description)
        _add_options(subparser, module, getattr(module, name), helps)
        commands.add_subcommand(name, subparser, help=summary)
        subparser.prog = f"jaxqat {name}"  # jsonargparse makes it 'jaxqat [options] train'.
    return parser


def _documentation(function: Any) -> tuple[str, str, dict[str, str]]:
    """Summary, description and help of each parameter, from a command's docstring."""
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    summary = parsed.short_description or ""
    description = "\n\n".join(filter(None, (summary, parsed.long_description)))
    # argparse formats a help with %, so that a plain one is doubled.
    helps = {p.arg_name: (p.description or "").replace("%", "%%") for p in parsed.params}
    return summary, description, helps


def _add_options(
    parser: Parser, module: types.ModuleType, function: Any, helps: Mapping[str, str]
) -> None:
    """Add an argument for each parameter of a command's function."""
    hints = typing.get_type_hints(function)
    choices = getattr(module, "CHOICES", {})
    for name, parameter in inspect.signature(function).parameters.items():
        if name in SUPPLIED:
            continue
        if hints[name] is Experiment:
            parser.add_argument("--config", action="config", help=helps[name])
            continue
        required = parameter.default is parameter.empty
        settings: dict[str, Any] = _type_settings(hints[name], choices.get(name))
        settings["help"] = helps[name]
        if not required and "action" not in settings:
            settings["default"] = parameter.default
        if name != "run":
            option = OPTION_NAMES.get(name, name)
            parser.add_argument(f"--{option}", **settings, required=required)
        elif required:
            parser.add_argument(name, **settings)
        else:
            parser.add_argument(name, **settings, nargs="?")
    if Experiment in hints.values():
        parser.add_class_arguments(Experiment, help="The experiment")


def _type_settings(hint: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """What `add_argument` is told of a parameter's type."""
    parts = typing.get_args(hint)
    inner = parts[0] if parts[1:] == (types.NoneType,) else hint  # T of `T | None`.
    if choices is not None:
        return {"choices": tuple(choices)}
    if typing.get_origin(inner) is Literal:
        return {"choices": typing.get_args(inner)}
    if inner is bool:
        return {"action": "store_true"}
    if typing.get_origin(inner) is Sequence:
        return {"type": typing.get_args(inner)[0], "nargs": "+"}
    return {"type": hint}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0 if all was done, 2 for bad input, 130 or 143 after a signal, 1 otherwise.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    _set_up_logging()
    try:
        return _dispatch(argv, console)
    except Stopped as stopped:
        _complain(f"stopped by {stopped}; the state is saved. Run the same command to resume.")
        return 128 + stopped.signum
    except KeyboardInterrupt:
        _complain("interrupted.")
        return 130
    except InputError as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except (RunError, OSError, ImportError) as error:
        _complain(f"error: {error}")
        return FAILED


def _dispatch(argv: list[str], console: Console) -> int:
    _check_config_files(argv)
    parsed = make_parser().parse_args(argv)
    name, options = parsed.command, parsed[parsed.command]
    function = getattr(COMMANDS[name], name)
    supplied = {"console": console, "command": shlex.join(["jaxqat", *argv])}
    hints = typing.get_type_hints(function)
    arguments = {}
    for parameter in inspect.signature(function).parameters:
        if hints[parameter] is Experiment:
            arguments[parameter] = configs.build(options)
        elif parameter in SUPPLIED:
            arguments[parameter] = supplied[parameter]
        else:
            arguments[parameter] = options[OPTION_NAMES.get(parameter, parameter)]
    # A comparison that found too many differences returns them as its `failures`.
    return FAILED if getattr(function(**arguments), "failures", ()) else DONE


def _check_config_files(argv: list[str]) -> None:
    """Check the keys of config files first: jsonargparse would not name the nearest right one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].config:
        configs.read_yaml(Path(path), also=("workdir", "from"))


def _set_up_logging() -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("jaxqat").setLevel(logging.INFO)
    # Orbax warns of what is meant here, and logs whole tracebacks of errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _complain(message: str) -> None:
    print(f"jaxqat: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
