"""Faults that the real command survives, or ends from with one clear line."""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soak
import tiny_run
import yaml
from PIL import Image

from jaxqat.pipeline.data import DataConfig, load_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads exit statuses"),
]

ROOT = Path(__file__).parents[1]
finished, open_tmp = tiny_run.finished, tiny_run.open_tmp


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that finds jaxqat and the tests' modules."""
    paths = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}


def run_in_trouble(trouble: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the `jaxqat` command with the small network in a process of its own.

    Args:
        trouble: Python code that makes it; `networks.build_model` builds the network.
        arguments: Of the command.
    """
    code = f"""
import sys
import tiny_run
from jaxqat import cli
from jaxqat.pipeline import networks
networks.build_model = tiny_run.build_small
{trouble}
sys.exit(cli.main())
"""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )


def without_lock(run: Path) -> dict[str, str]:
    """Return the digests of a run's files; a command that read it may have left its lock."""
    return {name: digest for name, digest in tiny_run.files(run).items() if name != ".lock"}


def write_config(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_run.SETTINGS, **changes}))
    return path


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    """One round of the soak, whose 200 cycles are in the README's table."""
    path = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "-m", "soak", "--cycles", "1", "--results", path],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert (content["rounds"], content["problems"]) == (1, [])
    tries = {name: entry["tries"] for name, entry in content["faults"].items()}
    assert sum(tries[name] for name in soak.KILLS) >= 6
    assert tries[soak.CLOCK] + tries[soak.CACHE_CUT] + tries[soak.NO_CACHE] == 2


def test_the_soak_notices_a_run_with_another_end(tmp_path):
    expected = {"fp32": {"model": {"a": 1}}, "results.json": {"x": [{"seconds": 1, "y": 2}]}}
    same = {"fp32": {"model": {"a": 1}}, "results.json": {"x": [{"seconds": 9, "y": 2}]}}
    found = [{k: soak.without_times(v) for k, v in each.items()} for each in (expected, same)]
    assert soak.differing(*found) == []
    found[1]["fp32"]["model"]["a"] = 2
    assert soak.differing(*found) == ["fp32"]
    assert soak.differing(found[0], {}) != []


def test_the_readme_has_the_table_that_the_soak_wrote():
    content, readme = json.loads(soak.RESULTS.read_text()), (ROOT / "README.md").read_text()
    kills = sum(content["faults"][name]["tries"] for name in soak.KILLS)
    assert soak.markdown(content) in readme
    assert f"({kills} kills and stops" in readme
    assert content["problems"] == []


@pytest.mark.parametrize("behaviour", ["refuses", "hangs"])
def test_a_download_without_a_network_ends_with_one_line(tmp_path, behaviour):
    """The proxy refuses connections, or takes them and says nothing."""
    command = ["train", "--config", "cifar10_narrow", "--data.download", "true"]
    command += ["--workdir", str(tmp_path / "run")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        if behaviour == "refuses":
            server.close()
        done = subprocess.run(
            [sys.executable, "-m", "jaxqat.cli", *command],
            capture_output=True,
            text=True,
            timeout=120,  # Importing takes most of it; ten seconds are the limit for the network.
            env=environment(
                TFDS_DATA_DIR=str(tmp_path / "tfds"),
                JAXQAT_CACHE_DIR=str(tmp_path / "cache"),
                **{name: proxy for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")},
                **{name: "" for name in ("no_proxy", "NO_PROXY")},
            ),
        )
    assert done.returncode == 2, done.stderr
    assert "cannot download from https://www.cs.toronto.edu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_ends_a_run_before_the_next_checkpoint(tmp_path):
    """It has 100 bytes left from the first checkpoint on."""
    run = tmp_path / "run"
    trouble = f"""
import shutil
from pathlib import Path
usage = shutil.disk_usage
def filling(path):
    full = Path({str(run / "checkpoints/fp32/6")!r}).exists()
    return usage(path)._replace(free=100) if full else usage(path)
shutil.disk_usage = filling
"""
    done = run_in_trouble(trouble, "train", "--config", write_config(tmp_path), "--workdir", run)
    assert done.returncode == 1, done.stderr
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"jaxqat: error: {run / 'checkpoints/fp32'}: a checkpoint takes ")
    assert "the disk has 100 bytes left" in line
    assert "Traceback" not in done.stderr
    assert [path.name for path in (run / "checkpoints/fp32").iterdir()] == ["6"]
    assert not (run / "results.json").exists()


def test_steps_that_fail_are_left_out_on_request(tmp_path):
    """In some batches, whose images are dark, the logits are NaN."""
    trouble = """
import jax.numpy as jnp
class Failing(tiny_run.SmallNet):
    def __call__(self, x, train):
        logits = super().__call__(x, train)
        return jnp.where(jnp.mean(x) < -0.09, jnp.nan, logits) if train else logits
networks.build_model = lambda config, classes, dtype: Failing(classes, dtype)
"""
    options = ("--fp32.skip_failed_steps", "true", "--qat.skip_failed_steps", "true")
    config, run = write_config(tmp_path), tmp_path / "run"
    done = run_in_trouble(trouble, "train", "--config", config, "--workdir", run, *options)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "warning: fp32: skipped 2 of 6 steps of epoch 2, as" in shown
    assert "are infinite or NaN: 7, 9. " in shown
    assert (run / "results.json").exists()


def test_a_checkpoint_of_another_network_is_refused_with_the_arrays_that_differ(finished, tmp_path):
    """One has another shape, one another dtype, one is missing, and one is there for nothing."""
    trouble = """
import flax.linen as nn
import jax.numpy as jnp
class Other(tiny_run.SmallNet):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), strides=(2, 2), name="stem_conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="stem_norm")(x))
        y = nn.Conv(4, (1, 1), use_bias=False, name="block_conv")(x)
        y = nn.BatchNorm(use_running_average=not train, use_bias=False, name="block_norm")(y)
        x = jnp.mean(nn.relu(x + y), axis=(1, 2))
        return nn.Dense(self.num_classes, param_dtype=jnp.float16, name="head")(x)
networks.build_model = lambda config, classes, dtype: Other(classes, dtype)
"""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = tiny_run.files(run)
    done = run_in_trouble(trouble, "evaluate", run, "--stage", "fp32")
    assert done.returncode == 1, done.stderr
    for difference in (
        "params/block_conv/kernel is float32[3,3,4,4] there, expected float32[1,1,4,4]",
        "params/head/kernel is float32[4,10] there, expected float16[4,10]",
        "params/block_norm/bias is float32[4] there, expected absent",
        "params/stem_conv/bias is absent there, expected float32[4]",
    ):
        assert difference in done.stderr
    assert "Traceback" not in done.stderr
    assert without_lock(run) == before


def test_a_damaged_cache_of_images_is_decoded_again_or_named(tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    for number in range(80):
        path = images / ("dark", "light")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (100 * (number % 2) + number,) * 3).save(path)
    data = DataConfig(name="folder", data_dir=str(images), cache_dir=str(tmp_path / "cache"))
    load_dataset(data)
    (cache,) = (tmp_path / "cache").glob("*.npz")
    good = cache.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    cache.write_bytes(damaged)
    config = write_config(tmp_path, data=dataclasses.asdict(data))
    command = ("train", "--config", config, "--workdir", run)
    done = run_in_trouble("", *command, "--fp32.epochs", "1", "--qat.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "the cache is damaged" in done.stderr
    assert cache.read_bytes() == good
    # With another picture, it is another data set: neither evaluated nor trained on.
    before = without_lock(run)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(images / "dark" / "00.png")
    shutil.copytree(run / "checkpoints", tmp_path / "stopped/checkpoints")
    shutil.copy(run / "config.yaml", tmp_path / "stopped")
    for given in (("evaluate", run), ("train", *command[1:3], "--workdir", tmp_path / "stopped")):
        options = ("--fp32.epochs", "1", "--qat.epochs", "1") if given[0] == "train" else ()
        done = run_in_trouble("", *given, *options)
        assert done.returncode == 2, done.stderr
        *_, line = done.stderr.splitlines()
        assert "was trained on other data. There -> here: " in line
        assert "sha256" in line
        assert "Traceback" not in done.stderr
    assert without_lock(run) == before
    (new,) = {*(tmp_path / "cache").glob("*.npz")} - {cache}
    new.unlink()
    cache.write_bytes(damaged)
    shutil.rmtree(images)
    done = run_in_trouble("", *command[:-1], tmp_path / "other")
    assert done.returncode == 2, done.stderr
    *_, line = done.stderr.splitlines()
    assert str(images) in line
    assert "the cache is damaged" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_run_of_another_config_is_refused_with_the_difference_and_left_as_it_is(
    finished, tmp_path
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = without_lock(run)
    config = write_config(tmp_path)
    done = run_in_trouble("", "train", "--config", config, "--workdir", run, "--qat.epochs", "3")
    assert done.returncode == 2, done.stderr
    assert "qat.epochs: 2 -> 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert without_lock(run) == before


def test_a_read_only_run_is_found_at_the_start_and_can_be_evaluated(finished, open_tmp):
    run = Path(shutil.copytree(finished, open_tmp / "run"))
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tiny_run.files(run)
    # Python's own files may be readable for root only: what the commands need is imported before.
    other = shutil.copytree(finished, open_tmp / "other")
    trouble = f"""
import os
cli.main(["evaluate", {str(other)!r}])
if os.geteuid() == 0:  # Root may write everywhere.
    os.seteuid({tiny_run.NOBODY})
"""
    done = run_in_trouble(trouble, "evaluate", run)
    assert done.returncode == 0, done.stderr
    assert "is read-only, so the result was not written to it." in " ".join(done.stdout.split())
    config = write_config(open_tmp)
    done = run_in_trouble(trouble, "train", "--config", config, "--workdir", run)
    assert done.returncode == 2, done.stderr
    assert f"workdir {run}: cannot be written: Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert tiny_run.files(run) == before


class Malicious:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_files_of_a_stranger_end_with_one_line_and_no_code_of_theirs_runs(finished, tmp_path):
    """A pickle among the arrays of a network, a path out of its folder, a config that explodes."""
    target = tmp_path / "made by a stranger"
    pickled = Path(shutil.copytree(finished, tmp_path / "pickled"))
    arrays = pickled / "integer/arrays.npz"
    with np.load(arrays) as members:
        contents = dict(members)
    name = next(iter(contents))
    contents[name] = np.array([Malicious(target)], object)
    np.savez(arrays, **contents)
    resealed(pickled / "integer")
    escaping = Path(shutil.copytree(finished, tmp_path / "escaping"))
    with zipfile.ZipFile(escaping / "integer/arrays.npz", "a") as archive:
        archive.writestr("../../made by a stranger", "x")
    resealed(escaping / "integer")
    for run in (pickled, escaping):
        done = run_in_trouble("", "evaluate", run)
        assert done.returncode in (1, 2), done.stdout
        *_, line = done.stderr.splitlines()
        assert line.startswith("jaxqat: error: ") and "arrays.npz" in line
        assert "Traceback" not in done.stderr
        assert not target.exists()
    bomb = tmp_path / "bomb.yaml"
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    bomb.write_text("\n".join(["a0: &a0 [x, x]", *levels]))
    done = run_in_trouble("", "train", "--config", bomb, "--workdir", tmp_path / "run")
    assert done.returncode == 2, done.stdout
    assert str(bomb) in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def resealed(network: Path) -> None:
    """Write the checksums of a stored network anew, as a stranger would."""
    sums = network / "SHA256SUMS"
    lines = [line.split("  ") for line in sums.read_text().splitlines()]
    digests = {name: hashlib.sha256((network / name).read_bytes()).hexdigest() for _, name in lines}
    sums.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
