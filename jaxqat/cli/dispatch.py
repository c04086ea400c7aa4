"""One call of the command line: parse the options, call the command, return the exit status."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
from rich.console import Console
from rich.logging import RichHandler

from jaxqat.cli import presets
from jaxqat.cli.parser import BAD_INPUT, OPTION_NAMES, SUPPLIED, make_parser
from jaxqat.cli.signatures import load_command, signature
from jaxqat.errors import InputError, RunError, Stopped
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.terminal import QuietConsole

DONE, FAILED = 0, 1


def run(argv: Sequence[str]) -> int:
    """Run the command.

    Returns:
        Exit status: 0 if all was done, 2 for bad input, 130 or 143 after a signal, 1 otherwise.
    """
    argv = list(argv)
    _set_up_logging()
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        _complain("interrupted.")
        return 130
    except (RunError, OSError, ImportError) as error:  # Damage is bad input, too, and a failure.
        _complain(f"error: {error}")
        return FAILED
    except InputError as error:
        _complain(f"error: {error}")
        return BAD_INPUT


def _dispatch(argv: list[str]) -> int:
    arguments = presets.with_paths(argv)
    _check_config_files(arguments)
    parsed = make_parser().parse_args(arguments)
    name, options = parsed.command, parsed[parsed.command]
    stderr = options.get("json") is True  # What people read goes beside the JSON.
    console = QuietConsole(stderr=stderr) if options["quiet"] else Console(stderr=stderr)
    if options["quiet"]:
        logging.getLogger("jaxqat").setLevel(logging.WARNING)
    supplied = {"console": console, "command": shlex.join(["jaxqat", *argv])}
    values = {}
    for parameter, hint in signature(name).hints.items():
        if hint is Experiment:
            _check_recipe(argv, options)
            values[parameter] = _experiment(options)
        elif parameter in SUPPLIED:
            values[parameter] = supplied[parameter]
        else:
            values[parameter] = options[OPTION_NAMES.get(parameter, parameter)]
    return _call(name, values)


def _call(name: str, values: dict[str, Any]) -> int:
    function = load_command(name)  # This imports JAX, except for `doctor`.
    try:
        result = function(**values)
    except Stopped as stopped:
        _complain(f"stopped by {stopped}; the state is saved. Run the same command to resume.")
        return 128 + stopped.signum
    # A comparison that found too many differences returns them as its `failures`.
    return FAILED if getattr(result, "failures", ()) else DONE


def _experiment(options: jsonargparse.Namespace) -> Experiment:
    """Return the experiment of a config; nobody should train the defaults by accident."""
    if not options["config"]:
        own = Path(options["workdir"]) / "config.yaml"
        resume = f" To resume the run in {own.parent}, pass --config {own}." if own.exists() else ""
        names = ", ".join(presets.presets()) or "none is installed"
        raise InputError(
            "train needs --config: the path of a YAML file, or the name of a preset "
            f"({names}).{resume}"
        )
    return configs.build(options)


def _check_recipe(argv: Sequence[str], options: jsonargparse.Namespace) -> None:
    """Refuse a whole recipe beside single settings of one."""
    single = [a.partition("=")[0] for a in argv if a.startswith(("--quant.", "--quant="))]
    if options["recipe"] is not None and single:
        raise InputError(
            f"--recipe replaces all settings of quant, so {single[0]} would have no effect: put "
            "them into a file, and pass it as --recipe."
        )


def _check_config_files(argv: list[str]) -> None:
    """Check the keys of config files first: jsonargparse would not name the nearest right one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].config:
        configs.read_yaml(Path(path), also=("workdir", "from", "recipe", "repair", "quiet"))


def _set_up_logging() -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("jaxqat").setLevel(logging.INFO)
    # Orbax warns of what is meant here, and logs whole tracebacks of errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _complain(message: str) -> None:
    print(f"jaxqat: {message}", file=sys.stderr)
