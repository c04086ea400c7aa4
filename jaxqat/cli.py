"""The `jaxqat` command: parse, call one function of the library, print."""

import argparse
import inspect
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.logging import RichHandler

from jaxqat.commands import analyze as diagnosis
from jaxqat.commands import benchmark as benchmark_command
from jaxqat.commands import evaluate as evaluate_command
from jaxqat.commands import export as export_command
from jaxqat.commands import lowering as lowering_command
from jaxqat.commands import quantize as quantize_command
from jaxqat.commands import report as report_command
from jaxqat.commands import train as train_command
from jaxqat.commands import verify as verify_command
from jaxqat.errors import (
    InputError,
    RunError,
)
from jaxqat.integer._execute.executor import PLATFORMS
from jaxqat.lowering import TARGETS
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.evaluation import SPLITS
from jaxqat.pipeline.results import INTEGER_STAGES, NETWORKS
from jaxqat.pipeline.training import Stopped

DONE, FAILED, BAD_INPUT = 0, 1, 2


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
        commands = "|".join(COMMANDS)
        message = re.sub(rf"\b({commands})\.run\b", "the run folder", message)
        message = re.sub(rf"\b({commands})\.(workdir|format|output|target)\b", r"--\2", message)
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        print(f"All options: {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def make_parser() -> Parser:
    """The command's options, typed by the config dataclasses."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="jaxqat", description="int8 quantization-aware training for JAX.")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, (add, _) in COMMANDS.items():
        description = inspect.cleandoc(add.__doc__ or "")
        subparser = Parser(prog=f"jaxqat {name}", description=description)
        add(subparser)
        commands.add_subcommand(name, subparser, help=description.splitlines()[0])
        subparser.prog = f"jaxqat {name}"  # jsonargparse makes it 'jaxqat [options] train'.
    return parser


def add_train_arguments(parser: Parser) -> None:
    """Train FP32, then QAT; convert, evaluate and report. Run it again to resume."""
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("--workdir", type=Path, required=True, help="The run folder.")
    help_from = "Another run, whose finished FP32 stage is taken over instead of trained here."
    parser.add_argument("--from", type=Path | None, default=None, help=help_from)
    parser.add_class_arguments(Experiment, help="The experiment")


def train(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `train`."""
    where: dict[str, Any] = {"workdir": options.workdir, "from_run": options["from"]}
    command = shlex.join(["jaxqat", *argv])
    train_command.train(configs.build(options), **where, command=command, console=console)
    return DONE


def add_quantize_arguments(parser: Parser) -> None:
    """Quantize a run's FP32 network without training; writes RUN/ptq, results and report."""
    parser.add_argument("run", type=Path, help="The run folder; its FP32 stage is finished.")
    parser.add_argument(
        "--method",
        choices=("ptq",),
        default="ptq",
        help="Post-training quantization: activation ranges of a few training batches.",
    )
    parser.add_argument(
        "--batches",
        type=PositiveInt,
        default=None,
        help="Training batches to calibrate on; by default, the run's qat.calibration_batches.",
    )
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="Preset such as int8_symmetric or w4a8; by default, the run's own recipe.",
    )


def quantize(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `quantize`."""
    command, chosen = shlex.join(["jaxqat", *argv]), _chosen(options, "batches", "recipe")
    quantize_command.quantize(options.run, **chosen, command=command, console=console)
    return DONE


def _chosen(options: Namespace, *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _add_network(parser: Parser) -> None:
    parser.add_argument(
        "--stage",
        choices=INTEGER_STAGES,
        default="qat",
        help="The integer network of QAT, RUN/integer, or of post-training quantization, RUN/ptq.",
    )


def add_evaluate_arguments(parser: Parser) -> None:
    """Evaluate a run from its folder alone; writes RUN/evaluations/ only."""
    parser.add_argument("run", type=Path, help="The run folder.")
    parser.add_argument(
        "--stage",
        choices=NETWORKS,
        default="integer",
        help="fp32 and qat from their checkpoints; the integer networks RUN/integer and RUN/ptq.",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="Which images.")


def evaluate(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `evaluate`."""
    del argv
    evaluate_command.evaluate(
        options.run, stage=options.stage, split=options.split, console=console
    )
    return DONE


def add_analyze_arguments(parser: Parser) -> None:
    """Find the layers at which the quantized network loses accuracy.

    Writes RUN/analysis.json and RUN/analysis.html. The network is run twice for each of its layers.
    """
    parser.add_argument("run", type=Path, help="The run folder.")
    parser.add_argument(
        "--stage",
        choices=diagnosis.STAGES,
        default="qat",
        help="Which weights: of QAT, or those of FP32, calibrated as QAT begins.",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="Which images.")
    parser.add_argument(
        "--images", type=PositiveInt, default=1000, help="How many of them, from the first on."
    )


def analyze(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `analyze`."""
    del argv
    chosen = _chosen(options, "stage", "split", "images")
    diagnosis.analyze(options.run, **chosen, console=console)
    return DONE


def add_export_arguments(parser: Parser) -> None:
    """Write the integer network of a run as a file for another runtime."""
    parser.add_argument("run", type=Path, help="The run folder.")
    _add_network(parser)
    parser.add_argument(
        "--format", choices=export_command.FORMATS, required=True, help="Of the file."
    )
    parser.add_argument("--output", type=Path, required=True, help="The file to write.")
    parser.add_argument(
        "--input",
        choices=export_command.INPUTS,
        default="uint8",
        help="What the file takes: images as they are, or normalized as in training.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that exists.")


def export(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `export`."""
    del argv
    chosen = _chosen(options, "stage", "format", "input", "overwrite")
    export_command.export(options.run, options.output, **chosen, console=console)
    return DONE


def add_verify_arguments(parser: Parser) -> None:
    """Compare every code of the integer network with the training graph's; writes RUN/evaluations/.

    The exit status is 1 if codes differ by more than one or in 1 of 100,000 places, or if an image
    changes its class.
    """
    parser.add_argument("run", type=Path, help="The run folder.")
    _add_network(parser)
    parser.add_argument(
        "--format",
        choices=("onnx", "openvino"),
        default=None,
        help="Compare with the exported file instead, in ONNX Runtime (onnx) or in OpenVINO, where "
        "only classes can be compared.",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="Which images.")


def verify(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `verify`."""
    del argv
    chosen = _chosen(options, "stage", "format", "split")
    verification = verify_command.verify(options.run, **chosen, console=console)
    return FAILED if verification.failures else DONE


def add_lowering_arguments(parser: Parser) -> None:
    """Show the kernels that a device's compiler makes of an integer network, device or not."""
    parser.add_argument(
        "run",
        type=Path | None,
        nargs="?",
        default=None,
        help="The run folder; without one, a ResNet-18 with random weights on 32x32 images.",
    )
    parser.add_argument("--target", choices=tuple(TARGETS), required=True, help="The device.")
    parser.add_argument(
        "--executor",
        choices=tuple(PLATFORMS),
        default=None,
        help="A way to run on it; by default, the way that is taken on such a device.",
    )
    parser.add_argument(
        "--width", type=PositiveInt, default=None, help="Of the random ResNet-18; 64."
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="Images at a time.")


def lowering(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `lowering`."""
    del argv
    lowering_command.lowering(
        options.run,
        target=options.target,
        executor=options.executor,
        batch_size=options.batch_size,
        width=options.width,
        console=console,
    )
    return DONE


def add_benchmark_arguments(parser: Parser) -> None:
    """Measure speed on the present device, engines in turns."""
    parser.add_argument(
        "run",
        type=Path | None,
        nargs="?",
        default=None,
        help="The run folder; without one, a ResNet-18 with random weights on 32x32 images.",
    )
    parser.add_argument(
        "--what",
        choices=("inference", "train"),
        default="inference",
        help="FP32, bfloat16 and int8 in all engines that are installed; or a training step.",
    )
    parser.add_argument(
        "--batch_sizes",
        type=PositiveInt,
        nargs="+",
        help="Images of a call; by default 1, 32, 256 (and 1024 on an accelerator), or the run's.",
    )
    parser.add_argument(
        "--rounds", type=PositiveInt, default=10, help="How often each engine has its turn."
    )
    parser.add_argument(
        "--width", type=PositiveInt, default=None, help="Of the random ResNet-18; 64."
    )
    parser.add_argument("--json", type=Path | None, default=None, help="File to write as well.")


def benchmark(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `benchmark`."""
    benchmark_command.benchmark(
        options.run,
        what=options.what,
        batch_sizes=options.batch_sizes,
        rounds=options.rounds,
        width=options.width,
        json=options.json,
        command=shlex.join(["jaxqat", *argv]),
        console=console,
    )
    return DONE


def add_report_arguments(parser: Parser) -> None:
    """Write RUN/report_command.html again from the run folder alone."""
    parser.add_argument("run", type=Path, help="The run folder.")


def report(options: Namespace, console: Console, argv: list[str]) -> int:
    """Run the command `report`."""
    del argv
    console.print(f"report: {report_command.report(options.run)}", highlight=False)
    return DONE


# By name: what adds its options, and what runs it.
COMMANDS = {
    "train": (add_train_arguments, train),
    "quantize": (add_quantize_arguments, quantize),
    "evaluate": (add_evaluate_arguments, evaluate),
    "analyze": (add_analyze_arguments, analyze),
    "verify": (add_verify_arguments, verify),
    "export": (add_export_arguments, export),
    "benchmark": (add_benchmark_arguments, benchmark),
    "lowering": (add_lowering_arguments, lowering),
    "report": (add_report_arguments, report),
}


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
    except InputError as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except (RunError, OSError, ImportError) as error:
        _complain(f"error: {error}")
        return FAILED


def _dispatch(argv: list[str], console: Console) -> int:
    _check_config_files(argv)
    options = make_parser().parse_args(argv)
    _, run = COMMANDS[options.command]
    return run(options[options.command], console, argv)


def _check_config_files(argv: list[str]) -> None:
    """Look at the config files' keys first: jsonargparse would not name the nearest right one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    for path in parser.parse_known_args(argv)[0].config:
        configs.read_yaml(Path(path), also=("workdir", "from"))


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
