"""Run `jaxqat evaluate`, with the same options, from a checkout: evaluate a run.

python scripts/evaluate.py runs/quickstart --stage qat --split test
"""

import sys

from jaxqat.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
