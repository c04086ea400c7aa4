"""Run `jaxqat train`, with the same options, from a checkout: train, evaluate and report.

python scripts/train.py --config configs/quickstart.yaml --workdir runs/quickstart
"""

import sys

from jaxqat.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
