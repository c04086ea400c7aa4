"""QAT that starts from the FP32 network of another run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import yaml
from tiny_run import SETTINGS, STEPS, STEPS_PER_EPOCH, files, run_command, signal_at, tiny

from jaxqat.commands import train
from jaxqat.pipeline import config
from jaxqat.pipeline.config import config_hash
from jaxqat.pipeline.results import Origin
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.snapshots import check_origin
from jaxqat.pipeline.training import Stopped

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished, no_report = tiny_run.console, tiny_run.finished, tiny_run.no_report

# A change of every setting without influence on the float network.
OTHERS = {
    "name": "other",
    "evaluation_batch_size": 20,
    "checkpoint": {"keep_last": 3},
    "qat__epochs": 1,
    "qat__test_calibrated": False,
    "quant__activations": "symmetric",
}


@pytest.fixture
def float_run(finished, tmp_path) -> Path:
    """A copy of the finished run, as it was after FP32."""
    path = tmp_path / "float"
    shutil.copytree(finished, path, ignore=shutil.ignore_patterns("qat", "integer", "ptq", "re*"))
    lines = [r for r in RunFolder(path).read_metrics() if r["stage"] == "fp32"]
    RunFolder(path).metrics.write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


def config_file(folder: Path, **changes) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(tiny(**changes))))
    return path


def test_qat_from_another_runs_fp32_gives_the_bits_of_a_run_that_trained_both(
    finished, float_run, tmp_path, small_network, no_report
):
    before, run = files(float_run), tmp_path / "run"
    arguments = ("--config", config_file(tmp_path), "--workdir", run, "--from", float_run)
    assert run_command("train", *arguments) == 0
    assert files(run / "integer") == files(finished / "integer")
    assert files(run / "ptq") == files(finished / "ptq")
    ours, theirs = (RunFolder(r) for r in (run, finished))
    ends = [[(r["stage"], r["loss"]) for r in f.read_metrics()] for f in (ours, theirs)]
    assert ends[0] == ends[1]
    fp32 = [r for r in theirs.read_metrics() if r["stage"] == "fp32"]
    assert ours.read_metrics()[: len(fp32)] == fp32  # Including the seconds.
    fp32 = ours.read_results().fp32
    assert fp32.from_run == Origin(name="tiny", config_hash=config_hash(tiny()))
    assert dataclasses.replace(fp32, from_run=None) == theirs.read_results().fp32
    assert files(float_run) == before
    assert not list(run.glob(".*"))


def test_settings_without_influence_on_the_float_network_may_differ(
    finished, tmp_path, small_network, no_report, console
):
    run = tmp_path / "run"
    results = train.train(tiny(**OTHERS), run, from_run=finished, console=console)
    assert results.fp32.from_run == Origin(name="tiny", config_hash=config_hash(tiny()))
    ours, theirs = (files(r / "checkpoints/fp32" / str(STEPS)) for r in (run, finished))
    assert ours == theirs
    # Only the checkpoint that QAT starts from, and its origin.
    assert {p.name for p in (run / "checkpoints/fp32").iterdir()} == {str(STEPS), "from_run.json"}


def test_the_origin_is_the_run_that_trained_fp32_even_through_another_run(
    finished, tmp_path, small_network, no_report, console
):
    first, second = tmp_path / "first", tmp_path / "second"
    train.train(tiny(**OTHERS), first, from_run=finished, console=console)
    results = train.train(tiny(qat__epochs=1), second, from_run=first, console=console)
    assert results.fp32.from_run == Origin(name="tiny", config_hash=config_hash(tiny()))


@pytest.mark.parametrize("again", [True, False], ids=["with_from", "without_from"])
def test_a_run_stopped_in_qat_resumes_from_its_own_checkpoints(
    finished, tmp_path, small_network, no_report, console, monkeypatch, again
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, STEPS_PER_EPOCH + 2)  # In QAT, as no FP32 step is done here.
        train.train(tiny(), run, from_run=finished, console=console)
    fp32 = files(run / "checkpoints/fp32")
    # The other run is not read again; it may be gone.
    from_run = tmp_path / "gone" if again else None
    results = train.train(tiny(), run, from_run=from_run, console=console)
    assert files(run / "checkpoints/fp32") == fp32
    assert files(run / "integer") == files(finished / "integer")
    assert results.fp32.from_run and results.fp32.from_run.name == "tiny"


def test_from_does_not_change_a_finished_run(finished, float_run, console):
    before = files(finished)
    train.train(tiny(), finished, from_run=float_run, console=console)
    assert files(finished) == before


def test_the_best_checkpoint_is_copied_if_it_is_selected(
    tmp_path, monkeypatch, no_report, small_network, console
):
    # The first epoch of FP32 has the best validation accuracy.
    scores = iter([0.9, 0.1, 0.8, 0.2, 0.8, 0.2])

    def validate(self, state):
        return {"validation_loss": 1.0, "validation_accuracy": next(scores)}

    monkeypatch.setattr("jaxqat.pipeline.stages.StageRun._validate", validate)
    best = tiny(data__validation_size=30, select="best", qat__test_calibrated=False)
    train.train(best, tmp_path / "both", console=console)
    train.train(best, tmp_path / "run", from_run=tmp_path / "both", console=console)
    assert files(tmp_path / "run/integer") == files(tmp_path / "both/integer")


def refused(folder: Path, from_run: Path, capsys, **changes) -> str:
    """Return the error message of a refused run; nothing of the new run must be left."""
    run = folder / "run"
    arguments = ("--config", config_file(folder, **changes), "--workdir", run, "--from", from_run)
    assert run_command("train", *arguments) == 2
    assert not run.exists()
    return capsys.readouterr().err


def test_errors_name_exactly_the_relevant_settings_that_differ(
    finished, tmp_path, small_network, capsys
):
    changes = {"seed": 1, "fp32__optimizer__learning_rate": 0.2, "data__train_limit": 90}
    error = refused(tmp_path, finished, capsys, **OTHERS, **changes)
    assert "its FP32 network has other settings" in error
    named = [line.strip() for line in error.splitlines() if line.startswith("  ")]
    assert named == [
        "data.train_limit: 100 -> 90",
        "fp32.optimizer.learning_rate: 0.1 -> 0.2",
        "seed: 0 -> 1",
    ]


def test_every_setting_is_either_compared_or_irrelevant(finished, tmp_path):
    from jaxqat.pipeline.takeover import IRRELEVANT

    assert set(SETTINGS) | set(config.to_dict(tiny())) == set(IRRELEVANT) | {
        *("seed", "precision", "select", "data", "augment", "model", "fp32"),
    }


def test_an_unfinished_fp32_stage_is_an_error(float_run, tmp_path, small_network, capsys):
    shutil.rmtree(float_run / f"checkpoints/fp32/{STEPS}")
    error = refused(tmp_path, float_run, capsys)
    assert f"its FP32 stage is at step {STEPS_PER_EPOCH} of {STEPS}" in error
    shutil.rmtree(float_run / "checkpoints")
    assert "there are no checkpoints of fp32" in refused(tmp_path, float_run, capsys)


def test_a_folder_that_is_not_a_run_is_an_error(tmp_path, small_network, capsys):
    assert "there is no such folder" in refused(tmp_path, tmp_path / "nothing", capsys)


def test_other_data_is_an_error(finished, tmp_path, small_network, capsys, monkeypatch):
    def check_other(restored, networks):
        fingerprint = {**networks.dataset.fingerprint, "version": "other"}
        dataset = dataclasses.replace(networks.dataset, fingerprint=fingerprint)
        check_origin(restored, dataclasses.replace(networks, dataset=dataset))

    monkeypatch.setattr("jaxqat.pipeline.takeover.check_origin", check_other)
    error = refused(tmp_path, finished, capsys)
    assert (
        f"the checkpoint of step {STEPS} was trained on other data. There -> here: version" in error
    )


def test_a_failed_copy_leaves_no_checkpoint_and_can_be_repeated(
    finished, tmp_path, small_network, no_report, console, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RunFolderError, match="disk full"):

        def fail(*arguments, **options):
            raise OSError("disk full")

        patch.setattr(Path, "rename", fail)
        train.train(tiny(), run, from_run=finished, console=console)
    assert not RunFolder(run).has_checkpoints()
    assert not (run / ".fp32.tmp").exists()
    (run / ".fp32.tmp" / str(STEPS)).mkdir(parents=True)  # As left by a killed process.
    train.train(tiny(), run, from_run=finished, console=console)
    assert files(run / "integer") == files(finished / "integer")
