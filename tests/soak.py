"""Kill the `jaxqat` command again and again, and compare the end with an uninterrupted run.

    PYTHONPATH=tests python -m soak --cycles 200

A round trains a small network to the end, in one run folder. On the way its process is killed or
stopped at random moments; now and then a checkpoint is damaged, Python's clock jumps, or the cache
of compiled programs is damaged or missing. Each time, the same command is given again. At the end,
all arrays of the last checkpoints (parameters, ranges, state of the optimizer), both integer
networks, every line of metrics.jsonl and results.json must be those of the uninterrupted run, bit
by bit, apart from times. Otherwise every fault of the round counts as lost.

Programs that JAX_COMPILATION_CACHE_DIR holds are not compiled again; nothing is written there.
Each command has a process of its own, forked from this one, which has imported everything and
started no backend: importing takes longer than a cycle. Results are written after each round, and
a soak that was stopped continues from them.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tiny_run
import yaml

from jaxqat import cli
from jaxqat.commands import train as _imported_before_forking  # noqa: F401
from jaxqat.pipeline import networks
from jaxqat.pipeline.run.results import processor

RESULTS = Path(__file__).parents[1] / "configs" / "results" / "soak.json"
SETTINGS = {
    **tiny_run.SETTINGS,
    "fp32": {"epochs": 4, "batch_size": 16},
    "qat": {"epochs": 4, "batch_size": 16, "calibration_batches": 2},
}
SECONDS = 900  # No command takes so long, whatever else the machine does.

# If the clock is set while a checkpoint is written, Orbax may give up the write. Then the command
# ends with this error, and may be given again.
GAVE_UP = "a checkpoint could not be written (TimeoutError"

# What the command prints as it goes on, in order.
PHASES = {
    "fp32": re.compile(r"^fp32(: (making|resumed|compiling the)| epoch)", re.MULTILINE),
    "qat": re.compile(r"^(calibration: obs|qat: (resumed|compiling the)|qat epoch)", re.MULTILINE),
    "deploy": re.compile(r"^(fp32: compiling for|integer:|verifying|PTQ|writing)", re.MULTILINE),
}
KILLED = {
    "fp32": "SIGKILL in FP32 training",
    "qat": "SIGKILL in calibration and QAT",
    "deploy": "SIGKILL in evaluation, conversion, verification or report",
}
SAVING = "SIGKILL with an unfinished checkpoint in the run"
STOPPED = "SIGTERM"
FLIPPED = "one bit flipped in the newest checkpoint"
CUT = "a file of the newest checkpoint cut short"
EMPTIED = "a file of the newest checkpoint emptied"
DELETED = "a folder of the newest checkpoint deleted"
CLOCK = "the clock is set, forward or back by days"
CACHE_CUT = "files of the compilation cache cut short"
NO_CACHE = "a compilation cache that can be neither read nor written"
KILLS = (*KILLED.values(), SAVING, STOPPED)
FAULTS = (*KILLS, FLIPPED, CUT, EMPTIED, DELETED, CLOCK, CACHE_CUT, NO_CACHE)
# Of one round, in the order of the phases: where a process is killed.
ROUND = ("fp32", "fp32 saving", "fp32", "qat", "qat saving", "qat", "deploy", "deploy")


@dataclasses.dataclass
class Command:
    """`jaxqat train` in a process of its own.

    Attributes:
        run: The run folder.
        log: Gets what the command prints.
        config: The experiment.
        compiled: The cache of compiled programs.
    """

    run: Path
    log: Path
    config: Path
    compiled: Path

    def start(self, trouble: str | None = None) -> int:
        """Start it, in trouble with the clock or the cache; return the number of the process."""
        if trouble == CACHE_CUT:
            for path in random.Random(0).sample(sorted(self.compiled.glob("*-cache")), 4):
                content = path.read_bytes()
                path.unlink()  # It may be a link to a file that others read, too.
                path.write_bytes(content[: len(content) // 2])
        self.log.write_text("")
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            if trouble == NO_CACHE:
                jax.config.update("jax_compilation_cache_dir", f"{self.config}/is_no_folder")
            if trouble == CLOCK:
                _set_the_clock()
            status = cli.main(["train", "--config", str(self.config), "--workdir", str(self.run)])
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status if isinstance(status, int) else 1)

    def phase(self) -> str | None:
        """Return the last phase that the command has reached; None before the first."""
        text = self.log.read_text(errors="replace")
        reached = [name for name, pattern in PHASES.items() if pattern.search(text)]
        return reached[-1] if reached else None

    def incomplete(self) -> list[Path]:
        """Return the checkpoints that are being written, or were when a process was killed."""
        return [*self.run.glob("checkpoints/*/*.orbax-checkpoint-tmp*")]


def _set_the_clock() -> None:
    """Change the wall clock of this process by up to ten days, within its next ten seconds."""
    rng, seconds, nanoseconds = random.Random(), time.time, time.time_ns
    moment, change = time.monotonic() + rng.uniform(0, 10), rng.randrange(-(10**15), 10**15)

    def now() -> int:
        return nanoseconds() + (change if time.monotonic() > moment else 0)

    time.time_ns = now
    time.time = lambda: seconds() + (now() - nanoseconds()) / 1e9


def ended(pid: int) -> int | None:
    """Return the exit status of a process, negative for a signal; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(pid: int) -> int:
    """Return the exit status of a process.

    Raises:
        TimeoutError: It hangs; it was killed.
    """
    deadline = time.monotonic() + SECONDS
    while (status := ended(pid)) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"the command did not end within {SECONDS} s")
        time.sleep(0.005)
    return status


def reached(command: Command, pid: int, moment: str) -> bool:
    """Wait for a moment of a run, or a later one; return False if the process ended before."""
    name, _, saving = moment.partition(" ")
    order = [None, *PHASES]
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        phase = command.phase()
        late = order.index(phase) > order.index(name)
        if late or (command.incomplete() if saving else phase == name):
            return True
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.001)
    return True


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a stage that has another to fall back to."""
    for stage in ("qat", "fp32"):
        steps = sorted(int(p.name) for p in run.glob(f"checkpoints/{stage}/*") if p.name.isdigit())
        if steps:
            return run / "checkpoints" / stage / str(steps[-1]) if len(steps) > 1 else None
    return None


def damage(checkpoint: Path, fault: str, rng: random.Random) -> None:
    """Damage a checkpoint as a bad disk would."""
    if fault == DELETED:
        return shutil.rmtree(checkpoint / rng.choice(["model", "optimizer", "info"]))
    path = max(checkpoint.rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if fault == CUT:
        content = content[: rng.randrange(1, len(content))]
    elif fault == EMPTIED:
        content = b""
    else:
        # In the middle, which holds array data; a few bytes elsewhere have no meaning.
        content[rng.randrange(len(content) // 4, len(content) // 2)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cycles(command: Command, rng: random.Random) -> Iterator[str]:
    """Run the command, killed at each moment of a round, to the end; yield every fault.

    Raises:
        RuntimeError: The command fails, or does not end as the signal asks.
    """
    training = [number for number, moment in enumerate(ROUND) if moment in ("fp32", "qat")]
    stopped = rng.choice(training)
    first, second = rng.sample(training, 2)
    troubles = {first: CLOCK, second: rng.choice([CACHE_CUT, NO_CACHE])}
    for number, moment in enumerate(ROUND):
        trouble = troubles.get(number)
        pid = command.start(trouble)
        if trouble is not None:
            yield trouble
        if reached(command, pid, moment):
            spread = {"fp32": 1.0, "qat": 2.0, "deploy": 5.0}.get(moment, 0.04)
            time.sleep(rng.uniform(0, spread))
        signum = signal.SIGTERM if number == stopped else signal.SIGKILL
        os.kill(pid, signum)  # It may have ended; until it is waited for, its number is its own.
        status = wait(pid)
        if status == 0:
            return
        gave_up = trouble == CLOCK and status == 1 and GAVE_UP in command.log.read_text()
        if not gave_up and status not in (128 + signum, -signum):
            raise RuntimeError(f"exit status {status}:\n{command.log.read_text()[-500:]}")
        if gave_up:
            continue
        if signum == signal.SIGTERM:
            yield STOPPED
        else:
            yield SAVING if command.incomplete() else KILLED[command.phase() or "fp32"]
        checkpoint = newest(command.run)
        if checkpoint is not None and moment != "deploy" and rng.random() < 0.7:
            fault = rng.choice([FLIPPED, CUT, EMPTIED, DELETED])
            damage(checkpoint, fault, rng)
            yield fault
    status = wait(command.start())
    if status:
        raise RuntimeError(f"exit status {status}:\n{command.log.read_text()[-500:]}")


def without_times(value: Any) -> Any:
    """Return JSON values without those that measure time."""
    if isinstance(value, Mapping):
        times = ("speed", "date", "train_seconds", "seconds", "images_per_s")
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a run must reproduce, by file."""
    found: dict[str, Any] = {}
    for stage in ("fp32", "qat"):
        steps = [int(p.name) for p in (run / "checkpoints" / stage).iterdir() if p.name.isdigit()]
        info = run / "checkpoints" / stage / str(max(steps)) / "info" / "metadata"
        found[stage] = json.loads(info.read_text())["arrays"]
    for path in sorted([*run.glob("integer/*"), *run.glob("ptq/*/*")]):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found["metrics.jsonl"] = [without_times(json.loads(line)) for line in lines]
    found["results.json"] = without_times(json.loads((run / "results.json").read_text()))
    return found


def differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs."""
    return [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]


def uninterrupted(command: Command) -> dict[str, Any]:
    """Return the outcome of a run that nobody disturbs."""
    status = wait(command.start())
    if status:
        raise RuntimeError(f"exit status {status}:\n{command.log.read_text()[-500:]}")
    expected = outcome(command.run)
    shutil.rmtree(command.run)
    return expected


def soak(folder: Path, results: Path, wanted: int) -> dict[str, Any]:
    """Run rounds until there are as many cycles as wanted; write the results after each."""
    content = {
        "command": f"PYTHONPATH=tests python -m soak --cycles {wanted}",
        "jax": jax.__version__,
        "processor": processor(),
        "rounds": 0,
        "faults": {name: {"tries": 0, "survived": 0, "lost": 0} for name in FAULTS},
        "problems": [],
    }
    if results.exists():
        found = json.loads(results.read_text())
        content |= found | {"faults": content["faults"] | found["faults"]}
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    command = Command(folder / "run", folder / "log.txt", config, folder / "compiled")
    shutil.rmtree(command.run, ignore_errors=True)
    expected = uninterrupted(command)
    while sum(content["faults"][name]["tries"] for name in KILLS) < wanted:
        seen, problem = [], None
        try:
            seen.extend(cycles(command, random.Random(content["rounds"])))
            if names := differing(expected, outcome(command.run)):
                problem = f"{', '.join(sorted(names))} differ"
        except (RuntimeError, TimeoutError, OSError) as error:
            problem = str(error)
        for name in seen:
            content["faults"][name]["tries"] += 1
            content["faults"][name]["survived" if problem is None else "lost"] += 1
        if problem is not None:
            content["problems"].append(f"round {content['rounds']}: {problem}")
            command.run.rename(folder / f"lost{content['rounds']}")
        content["rounds"] += 1
        shutil.rmtree(command.run, ignore_errors=True)
        results.write_text(json.dumps(content, indent=1) + "\n")
        print(content["rounds"], seen, problem or "survived", file=sys.stderr, flush=True)
    return content


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table as it stands in the README."""
    rows = [
        f"| {name} | {entry['tries']} | {entry['survived']} | {entry['lost']} |"
        for name, entry in content["faults"].items()
    ]
    return "\n".join(["| fault | tries | survived | lost |", "|---|---|---|---|", *rows])


def main() -> None:
    """Soak, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=200, help="How often to kill or stop.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Written, and continued.")
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    networks.build_model = tiny_run.build_small  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory(prefix="jaxqat_soak_") as folder:
        compiled = Path(folder) / "compiled"
        compiled.mkdir()
        for path in Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", compiled)).glob("*-cache"):
            (compiled / path.name).symlink_to(path)
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        content = soak(Path(folder), given.results, given.cycles)
    print(markdown(content))
    sys.exit(1 if content["problems"] else 0)


if __name__ == "__main__":
    main()
