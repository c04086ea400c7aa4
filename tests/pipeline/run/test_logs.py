"""CSV tables and TensorBoard logs of a run, also of one that was stopped and resumed."""

import csv
import importlib
import io
import struct

import pytest
from rich.console import Console

from jaxqat.pipeline.run import logs
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.logs import RunLogs


def record(stage: str, epoch: int, loss: float) -> dict:
    return {
        "stage": stage,
        "epoch": epoch,
        "step": 6 * epoch,
        "learning_rate": 0.1 / epoch,
        "gradient_norm": 2.0 * epoch,
        "loss": loss,
        "accuracy": 0.5,
        "validation_loss": None,
        "validation_accuracy": 0.25 if stage == "qat" else None,
        "images_per_s": 100.0,
        "seconds": 1.5,
        "frozen": False,
        "ranges": {"stem": [-1.0, 3.0 * epoch]} if stage == "qat" else {},
    }


def train(folder: RunFolder, records: list[dict]) -> None:
    """Log epochs of a stage, as training does."""
    with RunLogs(folder, records[0]["stage"]) as log:
        for each in records:
            folder.append_metrics(each)
            log.epoch(each)


@pytest.fixture
def resumed(tmp_path) -> RunFolder:
    """A run whose second epoch of QAT was lost and trained again, with another loss."""
    folder = RunFolder(tmp_path)
    train(folder, [record("fp32", 1, 2.0), record("fp32", 2, 1.5)])
    train(folder, [record("qat", 1, 1.0), record("qat", 2, 9.0)])
    folder.truncate_metrics("qat", 6)
    train(folder, [record("qat", 2, 0.5), record("qat", 3, 0.25)])
    return folder


EXPECTED = [("fp32", 1, 2.0), ("fp32", 2, 1.5), ("qat", 1, 1.0), ("qat", 2, 0.5), ("qat", 3, 0.25)]


def test_tables_hold_every_epoch_once(resumed):
    rows = list(csv.DictReader(io.StringIO(resumed.csv.read_text())))
    assert [(r["stage"], int(r["epoch"]), float(r["loss"])) for r in rows] == EXPECTED
    for row, (stage, epoch, loss) in zip(rows, EXPECTED, strict=True):
        wanted = record(stage, epoch, loss)
        del wanted["ranges"]
        assert row == {k: "" if v is None else str(v) for k, v in wanted.items()}
    ranges = list(csv.reader(io.StringIO(resumed.ranges_csv.read_text())))
    assert ranges == [
        ["stage", "epoch", "step", "layer", "low", "high"],
        *(["qat", str(e), str(6 * e), "stem", "-1.0", str(3.0 * e)] for e in (1, 2, 3)),
    ]


def events(folder: RunFolder, stage: str) -> list[tuple[str, int, float]]:
    """Return the scalars of a stage's event files: tag, step and value."""
    Event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    found = []
    for path in sorted(folder.tensorboard(stage).iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):  # Length, its checksum, the event, its checksum.
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            start += length + 16
    return found


def test_tensorboard_holds_every_epoch_once(resumed):
    pytest.importorskip("tensorboardX")
    losses = [e for e in events(resumed, "qat") if e[0] == "loss/train"]
    assert losses == [("loss/train", 6, 1.0), ("loss/train", 12, 0.5), ("loss/train", 18, 0.25)]
    last = {tag: value for tag, step, value in events(resumed, "qat") if step == 18}
    assert last == {
        "loss/train": 0.25,
        "accuracy/train": 0.5,
        "accuracy/validation": 0.25,
        "optimizer/learning_rate": pytest.approx(0.1 / 3),
        "optimizer/gradient_norm": 6.0,
        "speed/images_per_s": 100.0,
        "ranges/stem/low": -1.0,
        "ranges/stem/high": 9.0,
    }
    assert len([e for e in events(resumed, "fp32") if e[0] == "loss/train"]) == 2


def test_the_copied_stage_of_another_run_has_its_log_too(tmp_path):
    pytest.importorskip("tensorboardX")
    folder = RunFolder(tmp_path)
    folder.replace_metrics("fp32", [record("fp32", 1, 2.0)])
    train(folder, [record("qat", 1, 1.0)])
    assert [e for e in events(folder, "fp32") if e[0] == "loss/train"] == [("loss/train", 6, 2.0)]


def test_without_tensorboardx_a_line_says_so_and_the_tables_are_written(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(logs.importlib, "import_module", missing)
    file = io.StringIO()
    with RunLogs(RunFolder(tmp_path), "fp32", Console(file=file, width=200)):
        pass
    assert file.getvalue() == "TensorBoard: no log, because tensorboardX is not installed\n"
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv", "ranges.csv"}
