"""What is committed of a run: its results, its integer network, and a certificate of its codes.

    PYTHONPATH=tests python -m committed runs/cifar10_narrow runs/cifar10_narrow_w4a4 ...

copies the results, the report and the integer network of each run to `configs/results/RUN`, exports
the network to ONNX there, and writes the certificate: the first test images with their labels, and
the digest of every tensor's codes. The program that replays it is not copied:

    python jaxqat/export/_replay.py --folder configs/results/RUN/certificate
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from jaxqat import load
from jaxqat.export import export_certificate, export_onnx
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.run.folder import RunFolder

RESULTS = Path(__file__).parents[1] / "configs" / "results"
FILES = ("config.yaml", "metrics.jsonl", "results.json", "report.html")
FOLDERS = ("evaluations", "integer")
IMAGES = 50


def commit(run: Path, target: Path) -> None:
    """Write the results of a run, its integer network, the ONNX file and the certificate."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in FILES:
        shutil.copy2(run / name, target)
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
