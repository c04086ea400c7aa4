"""The `jaxqat` command: parse, call one function of the library, print."""

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from rich.console import Console
from rich.logging import RichHandler

from jaxqat import config as configs
from jaxqat import experiment
from jaxqat.checkpoint import CheckpointError
from jaxqat.config import ConfigError, Experiment
from jaxqat.data import DataError
from jaxqat.quant import QuantizationError, RecipeError
from jaxqat.report import ReportError
from jaxqat.runfolder import RunFolderError
from jaxqat.training import DivergedError, Stopped

BAD_INPUT, FAILED = 2, 1

_BAD_INPUT_ERRORS = (ConfigError, DataError, RecipeError, QuantizationError, RunFolderError)
_FAILURES = (CheckpointError, DivergedError, ReportError, OSError)


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one message, with the nearest right option, and exits with 2."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit."""
        del ex
        unknown = re.search(r"unrecognized arguments: (--[\w.-]+)", message)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings]
            message += f"; the nearest right one is {configs.nearest(unknown[1], options)}"
        # jsonargparse names a missing argument by its place in the namespace.
        message = message.replace("train.workdir", "--workdir")
        message = re.sub(r"\b(evaluate|report)\.run\b", "the run folder", message)
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        print(f"All options: {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def make_parser() -> Parser:
    """The command's options, typed by the config dataclasses."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="jaxqat", description="int8 quantization-aware training for JAX.")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, add in (
        ("train", add_train_arguments),
        ("evaluate", add_evaluate_arguments),
        ("report", add_report_arguments),
    ):
        subparser = Parser(prog=f"jaxqat {name}", description=(add.__doc__ or "").strip())
        add(subparser)
        commands.add_subcommand(name, subparser, help=(add.__doc__ or "").strip())
        subparser.prog = f"jaxqat {name}"  # jsonargparse makes it 'jaxqat [options] train'.
    return parser


def add_train_arguments(parser: Parser) -> None:
    """Train FP32, then QAT; evaluate and report. Run it again to resume."""
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--workdir", type=Path, required=True, help="The run folder.")
    parser.add_class_arguments(Experiment, help="The experiment")


def add_evaluate_arguments(parser: Parser) -> None:
    """Evaluate a run from its folder alone; writes RUN/evaluations/ only."""
    parser.add_argument("run", type=Path, help="The run folder.")
    parser.add_argument("--stage", choices=("fp32", "qat"), default="qat", help="Which network.")
    parser.add_argument("--split", choices=experiment.SPLITS, default="test", help="Which images.")


def add_report_arguments(parser: Parser) -> None:
    """Write RUN/report.html again from the run folder alone."""
    parser.add_argument("run", type=Path, help="The run folder.")


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
        _complain(f"stopped by {stopped}; the state is saved. Run the same command to go on.")
        return 128 + stopped.signum
    except KeyboardInterrupt:
        _complain("interrupted.")
        return 130
    except _BAD_INPUT_ERRORS as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except _FAILURES as error:
        _complain(f"error: {error}")
        return FAILED


def _dispatch(argv: list[str], console: Console) -> int:
    _check_config_files(argv)
    options = make_parser().parse_args(argv)
    chosen = options[options.command]
    if options.command == "train":
        command = shlex.join(["jaxqat", *argv])
        experiment.train(configs.build(chosen), chosen.workdir, command=command, console=console)
    elif options.command == "evaluate":
        experiment.evaluate(chosen.run, stage=chosen.stage, split=chosen.split, console=console)
    else:
        console.print(f"report: {experiment.report(chosen.run)}", highlight=False)
    return 0


def _check_config_files(argv: list[str]) -> None:
    """Look at the config files' keys first: jsonargparse would not name the nearest right one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].config:
        configs.read_yaml(Path(path), also=("workdir",))


def _set_up_logging() -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("jaxqat").setLevel(logging.INFO)
    # Orbax warns of its own deprecations and of what is meant here (read-only folders).
    logging.getLogger("absl").setLevel(logging.ERROR)


def _complain(message: str) -> None:
    print(f"jaxqat: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
