"""Configs by name: `--config quickstart` is the file `configs/quickstart.yaml` of jaxqat.

In a checkout they are in `configs/`, beside the package; an installed package has them in
`share/jaxqat/configs` of its environment.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from jaxqat.errors import InputError
from jaxqat.pipeline.config import nearest

CHECKOUT = Path(__file__).parents[2] / "configs"


def presets() -> dict[str, Path]:
    """Return the files of the presets by name; none if they are not installed."""
    installed = Path(sysconfig.get_path("data")) / "share" / "jaxqat" / "configs"
    # Beside an installed package there may be a folder of this name that is another's.
    folder = CHECKOUT if (CHECKOUT.parent / "pyproject.toml").is_file() else installed
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def with_paths(argv: Sequence[str]) -> list[str]:
    """Return arguments with the path of a config in the place of its name.

    Raises:
        InputError: If a config is neither a file nor the name of a preset.
    """
    found = list(argv)
    for i, argument in enumerate(found):
        if argument == "--config" and i + 1 < len(found):
            found[i + 1] = str(find_config(found[i + 1]))
        elif argument.startswith("--config="):
            found[i] = f"--config={find_config(argument.partition('=')[2])}"
    return found


def find_config(name: str) -> Path:
    """Return the file of a config, given by its path or by the name of a preset.

    Raises:
        InputError: If there is none; names the presets.
    """
    named = presets()
    if name in named and not Path(name).is_file():
        return named[name]
    if not Path(name).exists() and not name.endswith((".yaml", ".yml")):
        near = f"; the nearest one is {nearest(name, list(named))}" if named else ""
        raise InputError(
            f"--config {name}: is neither a file nor one of the presets "
            f"({', '.join(named) or 'none is installed'}){near}."
        )
    return Path(name)
