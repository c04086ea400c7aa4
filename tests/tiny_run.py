"""A run that takes seconds: a network of three layers on 100 of scikit-learn's digits.

Test modules import the fixtures they use by assignment. Run as a script, this file is the `jaxqat`
command with that network instead of the ResNet.
"""

import copy
import functools
import hashlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxqat import cli
from jaxqat.commands import analyze, quantize, train
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.training.progress import StageProgress

# 6 steps per epoch; 4 images fill no batch.
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "compilation": "default",
    "evaluation_batch_size": 32,
    "data": {"name": "digits", "train_limit": 100, "test_limit": 40},
    "augment": {"crop_padding": 1, "flip": False},
    "fp32": {"epochs": 2, "batch_size": 16},
    # The sentinel compiles a program of its own; tests that need it turn it on.
    "qat": {"epochs": 2, "batch_size": 16, "calibration_batches": 2, "sentinel": False},
}
STEPS_PER_EPOCH, STEPS = 6, 12

NOBODY = 65534


class SmallNet(nn.Module):
    """A network with batch norm, a residual addition and a dense head."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def conv(x, name, stride=1):
            layer = nn.Conv(
                4,
                (3, 3),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=False,
                dtype=self.dtype,
                name=f"{name}_conv",
            )
            norm = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"{name}_norm"
            )
            return norm(layer(x))

        x = nn.relu(conv(x.astype(self.dtype), "stem", stride=2))
        x = nn.relu(x + conv(x, "block"))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="head")(x)


def build_small(config, num_classes, dtype=jnp.float32):
    """Return the network; replaces `jaxqat.pipeline.models.build_model`."""
    del config
    return SmallNet(num_classes, dtype)


def tiny(**changes: Any) -> Experiment:
    """Return the small experiment; `qat__epochs=3` changes `qat.epochs`."""
    settings = copy.deepcopy(SETTINGS)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = settings
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return configs.from_dict(settings)


@functools.cache
def _trained(base: Path) -> Path:
    path = base / "finished" / "run"
    path.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxqat.pipeline.networks.build_model", build_small)
        with path.with_suffix(".log").open("w") as file:
            train.train(tiny(), path, command="jaxqat train", console=Console(file=file))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once for all test modules; do not change it."""
    return _trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds for drawing a report that the test does not read."""
    for command in (train, quantize, analyze):
        monkeypatch.setattr(command, "write_report", lambda path: path)


def files(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder."""
    return {
        str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(run.rglob("*"))
        if p.is_file()
    }


def run_command(*arguments: object) -> int:
    """Run the `jaxqat` command in this process; return its exit status."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def signal_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send SIGTERM after `steps` training steps, counted over both stages."""
    done = []

    def advance(self, n):
        done.extend([None] * n)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StageProgress, "advance", advance)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the small network instead of the ResNet."""
    monkeypatch.setattr("jaxqat.pipeline.networks.build_model", build_small)


@pytest.fixture
def console() -> Console:
    """A console that records what is printed: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Run a block as nobody, because root can write to every folder."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_tmp(tmp_path: Path) -> Iterator[Path]:
    """A temporary folder that every user may enter and only its owner may write."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    yield tmp_path
    tmp_path.chmod(0o755)


if __name__ == "__main__":
    from jaxqat.pipeline import networks

    networks.build_model = build_small  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(cli.main())
