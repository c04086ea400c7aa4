# pyright: strict
"""`jaxqat.load_run`: a run folder as Python objects.

This file imports nothing of the extra `train`; `opened_run` does, so that a bare library can say
what it needs.
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxqat.errors import MissingPackageError

if TYPE_CHECKING:
    from jaxqat.pipeline.opened_run import Run


def load_run(folder: str | os.PathLike[str], *, stage: Literal["qat", "ptq"] = "qat") -> "Run":
    """Open a run that `jaxqat train` made.

        run = jaxqat.load_run("runs/quickstart")
        logits = run.predict(images)  # uint8 images, by the integer network
        graph, results = run.network, run.results

    Nothing is read before it is asked for, and nothing is written.

    Args:
        folder: Run folder.
        stage: Stage whose network is meant: quantization-aware training (qat) or post-training
            quantization with the run's recipe (ptq).

    Returns:
        The run, with `experiment`, `results`, `network`, `model`, `variables` and `predict`.

    Raises:
        RunFolderError: The folder is no run folder.
        MissingPackageError: The extra `train` is not installed.
    """
    try:
        opened_run = importlib.import_module("jaxqat.pipeline.opened_run")
    except ImportError as error:
        raise MissingPackageError(
            f"load_run needs the packages of the command, and {error.name!r} is not installed: "
            "`pip install 'jaxqat[train]'`."
        ) from error
    return opened_run.Run.open(Path(folder), stage)
