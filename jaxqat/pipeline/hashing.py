"""SHA-256 of JSON values and of files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_sha256(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
