"""Checkpoints are restored exactly, or an error names the damaged one."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxqat.pipeline.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointStore,
    DamagedCheckpointError,
)

# Orbax closes its event loop when a read fails; reads still in progress then warn.
loses_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EXTRA = {"config": {"seed": 3}, "data": {"name": "digits"}, "epoch_seconds": 1.5}


def make_parts(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 8)).astype(np.float32)},
        "bias": rng.normal(size=5).astype(np.float32),
    }
    model = {"params": params, "quant": {"count": np.int32(seed)}}
    opt_state = optax.sgd(0.1, momentum=0.9).init(jax.tree.map(jnp.asarray, params))
    return {"model": model, "optimizer": {"opt_state": opt_state, "step": jnp.int32(seed)}}


def save(store: CheckpointStore, step: int, accuracy: float | None = None) -> None:
    record = {"epoch": step, "validation_accuracy": accuracy}
    store.save(step, **make_parts(step), record=record, extra=EXTRA)


def assert_is_step(parts, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, parts, jax.device_get(make_parts(step)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    directory = tmp_path / "checkpoints" / "fp32"
    with CheckpointStore(directory, CheckpointConfig()) as store:
        save(store, 1)
        save(store, 2)
    return directory


def open_store(directory: Path, **options) -> CheckpointStore:
    return CheckpointStore(directory, CheckpointConfig(), **options)


def array_files(step: Path) -> list[Path]:
    """Return the files that hold array data."""
    return sorted(p for p in step.rglob("d/*") if p.is_file() and p.stat().st_size > 64)


def test_arrays_config_and_fingerprint_are_restored_exactly(saved):
    with open_store(saved, read_only=True) as store:
        assert store.steps() == [1, 2]
        restored = store.restore(make_parts())
        older = store.restore({"model": make_parts()["model"]}, step=1)
    assert restored.step == 2
    assert_is_step(restored.parts, 2)
    assert {key: restored.info[key] for key in EXTRA} == EXTRA
    assert restored.info["record"] == {"epoch": 2, "validation_accuracy": None}
    assert older.step == 1
    assert list(older.parts) == ["model"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=2)) as store:
        for step, accuracy in enumerate([0.1, 0.9, 0.9, 0.2, 0.3, None], start=1):
            save(store, step, accuracy)
        store.wait()
        # The newer of the equal ones, 2 and 3.
        assert store.steps() == [3, 5, 6]
        assert store.best_step() == 3
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=2)) as store:
        assert store.best_step() == 3
        save(store, 7, 0.95)
        store.wait()
        assert store.steps() == [6, 7]
        assert store.best_step() == 7


def test_without_keep_best_only_the_newest_are_kept(tmp_path):
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=1, keep_best=False)) as store:
        save(store, 1, 0.9)
        save(store, 2, 0.1)
        store.wait()
        assert store.steps() == [2]
        assert store.best_step() is None


@loses_reads
def test_every_flipped_bit_in_array_data_is_detected(saved):
    rng = np.random.default_rng(0)
    flips = 0
    for path in array_files(saved / "2"):
        good = path.read_bytes()
        for place in rng.integers(0, len(good), 10):
            bad = bytearray(good)
            bad[place] ^= 1 << rng.integers(8)
            path.write_bytes(bad)
            with open_store(saved, read_only=True) as store:
                try:
                    # Either the byte has no meaning, or the flip is reported.
                    assert_is_step(store.restore(make_parts()).parts, 2)
                except DamagedCheckpointError as error:
                    assert f"{saved / '2'} is damaged" in str(error)
                    flips += 1
        path.write_bytes(good)
    assert flips >= 10


def test_a_wrong_number_in_a_readable_array_is_detected(saved, monkeypatch):
    # Orbax cannot detect another array of the same shape and dtype.
    original = CheckpointStore._read

    def read(self, step, targets):
        parts = original(self, step, targets)
        parts["model"]["params"]["bias"] = parts["model"]["params"]["bias"] + np.float32(2**-20)
        return parts

    monkeypatch.setattr(CheckpointStore, "_read", read)
    with (
        open_store(saved, read_only=True) as store,
        pytest.raises(DamagedCheckpointError, match=r"model/params/bias is not what was saved"),
    ):
        store.restore(make_parts())


def test_changed_info_is_detected(saved):
    (path,) = (saved / "2" / "info").glob("metadata")
    text = path.read_text()
    assert '"seed": 3' in text
    path.write_text(text.replace('"seed": 3', '"seed": 4'))
    with (
        open_store(saved, read_only=True) as store,
        pytest.raises(DamagedCheckpointError, match="its info is not what was saved"),
    ):
        store.restore(make_parts())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate_arrays(step: Path) -> None:
    for path in array_files(step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_arrays(step: Path) -> None:
    for path in array_files(step):
        path.write_bytes(b"")


def delete_info(step: Path) -> None:
    shutil.rmtree(step / "info")


def truncate_info(step: Path) -> None:
    path = step / "info" / "metadata"
    path.write_text(path.read_text()[:40])


def delete_array_folder(step: Path) -> None:
    shutil.rmtree(step / "model")


def truncate_step_metadata(step: Path) -> None:
    (step / "_CHECKPOINT_METADATA").write_text("{")
    truncate_info(step)


DAMAGES = [
    truncate_arrays,
    empty_arrays,
    delete_info,
    truncate_info,
    delete_array_folder,
    truncate_step_metadata,
]


@loses_reads
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, damage, caplog):
    damage(saved / "2")
    with (
        open_store(saved, read_only=True) as store,
        pytest.raises(DamagedCheckpointError, match=r"fp32/2 is damaged"),
    ):
        store.restore(make_parts())
    with open_store(saved) as store:
        restored = store.restore_newest_good(make_parts())
        assert restored is not None
        assert restored.step == 1
        assert_is_step(restored.parts, 1)
        assert f"{saved / '2'} is damaged" in caplog.text
        # Its step can be saved again, and the damaged files are moved aside.
        save(store, 2)
        store.wait()
        assert_is_step(store.restore(make_parts()).parts, 2)
        # If it is damaged again, both are kept.
        first = contents(saved.parent / "damaged" / "fp32-2")
        store.move_aside(2)
    assert contents(saved.parent / "damaged" / "fp32-2") == first
    assert (saved.parent / "damaged" / "fp32-2-2" / "info").is_dir()


@loses_reads
def test_damage_of_all_checkpoints_is_an_error_and_does_not_restart_the_stage(saved):
    for step in ("1", "2"):
        truncate_arrays(saved / step)
    with (
        open_store(saved) as store,
        pytest.raises(CheckpointError, match=r"all checkpoints are damaged \(steps \[2, 1\]\)"),
    ):
        store.restore_newest_good(make_parts())


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with open_store(tmp_path) as store:
        assert store.restore_newest_good(make_parts()) is None
        with pytest.raises(CheckpointError, match="no checkpoint; finished steps are"):
            store.restore(make_parts())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bias: bias.astype(np.float16), r"model/params/bias is float32\[5\] .*float16\[5\]"),
        (lambda bias: bias[:4], r"model/params/bias is float32\[5\] there, expected float32\[4\]"),
    ],
    ids=["dtype", "shape"],
)
def test_another_dtype_or_shape_is_an_error_before_arrays_are_read(saved, change, message):
    target = make_parts()
    target["model"]["params"]["bias"] = change(target["model"]["params"]["bias"])
    with (
        open_store(saved, read_only=True) as store,
        pytest.raises(CheckpointError, match=message) as caught,
    ):
        store.restore(target)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_every_additional_missing_or_different_array_is_named(saved):
    target = make_parts()
    params = target["model"]["params"]
    params["extra"], params["conv"]["kernel"] = np.zeros(2, np.float32), np.zeros(3, np.int8)
    del params["bias"]
    with (
        open_store(saved, read_only=True) as store,
        pytest.raises(CheckpointError) as caught,
    ):
        store.restore(target)
    assert str(caught.value) == (
        f"{saved / '2'} is of another model: "
        "model/params/bias is float32[5] there, expected absent; "
        "model/params/conv/kernel is float32[3,3,4,8] there, expected int8[3]; "
        "model/params/extra is absent there, expected float32[2]."
    )


def test_of_many_different_arrays_ten_are_named(saved):
    target = make_parts()
    target["model"]["params"] |= {f"extra{i:02}": np.zeros(1) for i in range(12)}
    with (
        open_store(saved, read_only=True) as store,
        pytest.raises(CheckpointError, match=r"extra09 is absent .*float64\[1\]; and 2 more\."),
    ):
        store.restore(target)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(saved, monkeypatch):
    needed = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(make_parts(3)))
    usage = shutil.disk_usage(saved)
    with open_store(saved) as store:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
        wanted = rf"fp32: a checkpoint takes {needed:,} bytes, and the disk has {needed - 1:,} "
        with pytest.raises(CheckpointError, match=wanted):
            save(store, 3)
        assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        save(store, 3)


def test_an_existing_checkpoint_is_not_overwritten(saved):
    with pytest.raises(CheckpointError, match="2"), open_store(saved) as store:
        save(store, 2)


def test_leftovers_of_a_killed_writer_are_removed_except_in_read_only_mode(saved):
    leftover = saved / "9.orbax-checkpoint-tmp"
    leftover.mkdir()
    with open_store(saved, read_only=True) as store:
        assert store.steps() == [1, 2]
    assert leftover.exists()
    with open_store(saved) as store:
        assert store.steps() == [1, 2]
        save(store, 3)
    assert not leftover.exists()


def test_a_failed_write_is_an_error_and_the_last_good_checkpoint_stays(tmp_path):
    # A limit on the size of files makes writing fail where a full disk would, in Orbax's threads.
    # In a separate process, because it is a limit of the whole process.
    script = f"""
import resource
from pathlib import Path
import numpy as np
from jaxqat.pipeline.checkpoint import CheckpointConfig, CheckpointError, CheckpointStore
part = {{"x": np.random.default_rng(0).normal(size=100_000)}}
more = dict(optimizer={{"step": np.int32(1)}}, record=None, extra={{}})
try:
    with CheckpointStore(Path({str(tmp_path)!r}), CheckpointConfig(keep_last=1)) as store:
        store.save(1, model=part, **more)
        store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        store.save(2, model=part, **more)
        store.wait()
except CheckpointError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert "refused:" in done.stdout, done.stderr
    assert "could not be written" in done.stdout
    with CheckpointStore(tmp_path, CheckpointConfig(keep_last=1)) as store:
        assert store.steps() == [1]


def test_a_path_that_is_not_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_store(tmp_path / "file" / "fp32")


@pytest.mark.parametrize("key", ["keep_last", "every_epochs"])
def test_counts_below_one_are_errors(key):
    with pytest.raises(ValueError, match=f"checkpoint.{key} must be 1 or more, got 0"):
        dataclasses.replace(CheckpointConfig(), **{key: 0})
