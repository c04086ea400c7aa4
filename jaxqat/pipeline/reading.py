"""Readers of files in a run folder that more than one part of the pipeline reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jaxqat.errors import JaxqatError


def parse_settings(text: str, path: Path, *, error: type[JaxqatError]) -> dict[str, Any]:
    """Return the settings in the text of a YAML file.

    Raises:
        error: If it is not YAML or holds no settings; names the file.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise error(f"{path}: is not YAML: {problem}") from problem
    if not isinstance(values, dict):
        raise error(f"{path}: must hold settings such as 'seed: 0', got {values!r}.")
    return values


def parse_metrics(
    text: str, path: Path, *, error: type[JaxqatError] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the record of each line of metrics.jsonl.

    Args:
        text: Content of the file.
        path: The file, for messages.
        error: Raised at a line that is not JSON; None ends there, since a killed process leaves an
            incomplete line.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as problem:
            if error is None:
                return
            raise error(f"{path}, line {number} is not JSON: {problem}.") from problem
        yield number, record
