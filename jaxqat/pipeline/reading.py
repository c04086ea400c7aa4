"""Readers of files in a run folder that more than one part of the pipeline reads."""

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxqat.errors import JaxqatError
from jaxqat.pipeline import bounded_yaml


def parse_settings(text: str, path: Path, *, error: type[JaxqatError]) -> dict[str, Any]:
    """Return the settings in the text of a YAML file.

    Raises:
        error: If it is not YAML, holds no settings, or is too large; names the file and the key.
    """
    try:
        values = bounded_yaml.parse(text)
    except bounded_yaml.SettingsError as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(values, dict):
        raise error(f"{path}: must hold settings such as 'seed: 0', got {reprlib.repr(values)}.")
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
        except (ValueError, RecursionError) as problem:
            if error is None:
                return
            raise error(f"{path}, line {number} is not JSON: {problem}.") from problem
        yield number, record
