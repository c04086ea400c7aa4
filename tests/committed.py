"""What is committed of a run: its results, its integer network, and a certificate of its codes.

    PYTHONPATH=tests python -m committed runs/cifar10_narrow runs/cifar10_narrow_w4a4 ...

copies the results and the integer network of each run to `configs/results/RUN`, exports the network
to ONNX there, and writes the certificate: the first test images with their labels, and the digest
of every tensor's codes. Of a run that trained its FP32 network itself, the report is copied too,
and so are the last checkpoints where they are small. The program that replays a certificate is not
copied:

    python jaxqat/export/_replay.py --folder configs/results/RUN/certificate
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from jaxqat import load
from jaxqat.export import export_certificate, export_onnx
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.run.folder import RunFolder

RESULTS = Path(__file__).parents[1] / "configs" / "results"
FILES = ("config.yaml", "compilation.json", "metrics.jsonl", "results.json")
FOLDERS = ("evaluations", "integer")
IMAGES = 50
SMALL = 3_000_000  # Bytes of a checkpoint.


def commit(run: Path, target: Path) -> None:
    """Write the results of a run, its integer network, the ONNX file and the certificate."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in FILES:
        shutil.copy2(run / name, target)
    if "from_run" not in json.loads((run / "results.json").read_text())["fp32"]:
        shutil.copy2(run / "report.html", target)
        for stage in (run / "checkpoints").iterdir():
            last = max(stage.iterdir(), key=lambda step: int(step.name))
            if sum(path.stat().st_size for path in last.rglob("*")) < SMALL:
                copy = target / "checkpoints" / stage.name / last.name
                # Orbax notes there where the run was.
                shutil.copytree(last, copy, ignore=shutil.ignore_patterns("commit_success.txt"))
    for folder in FOLDERS:
        if (run / folder).exists():
            shutil.copytree(run / folder, target / folder)
    graph, file = load(target / "integer"), target / "network.onnx"
    test = load_dataset(RunFolder(run).load_config().data).test
    export_onnx(graph, file, input="uint8")
    certificate = target / "certificate"
    images = test.images[:IMAGES]
    export_certificate(graph, certificate, images, file=file, store_codes=False)
    (certificate / "replay.py").unlink()
    np.savetxt(certificate / "labels.txt", test.labels[:IMAGES], fmt="%d")


def main() -> None:
    """Commit the networks of runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        commit(run, RESULTS / run.name)


if __name__ == "__main__":
    main()
