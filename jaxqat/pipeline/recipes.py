"""Recipes by name or file, as `--recipe` takes them."""

import dataclasses
from pathlib import Path

from jaxqat.errors import RecipeError
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import ConfigError, Experiment
from jaxqat.pipeline.run.folder import RunFolderError
from jaxqat.quant import Recipe

SUFFIXES = (".yaml", ".yml")


def recipe_name(recipe: Recipe) -> str:
    """Return the name by which PTQ with a recipe is kept: its preset's, or 'config'."""
    return next((name for name, preset in Recipe.presets().items() if preset == recipe), "config")


def read_recipe(given: str) -> Recipe:
    """Return the recipe of a preset's name, or of a YAML file.

    The file holds the settings of `quant`, or is a config with that section.

    Raises:
        RecipeError: If there is neither such a preset nor such a file.
        ConfigError: If the file cannot be read, or a setting in it is unknown or invalid.
    """
    path = Path(given)
    if given in Recipe.presets() or (path.suffix not in SUFFIXES and not path.is_file()):
        try:
            return Recipe.preset(given)
        except RecipeError as error:
            raise RecipeError(f"{error} The path of a YAML file is right, too.") from None
    values = configs.read_settings(path)
    if "quant" not in values:
        values = {"quant": values}
    try:
        return configs.from_dict({"quant": values["quant"]}).quant
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def recipe_of_ptq(given: str | None, default: Recipe) -> tuple[str, Recipe]:
    """Return a recipe for post-training quantization, and the name by which it is kept.

    Args:
        given: A preset's name or a file; None for the default.
        default: The recipe of the run.

    Raises:
        RunFolderError: If the name of the file is that of another recipe.
    """
    if given is None:
        return recipe_name(default), default
    recipe = read_recipe(given)
    name = recipe_name(recipe)
    if name != "config" or recipe == default:
        return name, recipe
    name = Path(given).stem
    if name in ("config", *Recipe.presets()) or name.startswith("."):
        raise RunFolderError(
            f"--recipe {given}: the network is kept by the file's name, and {name!r} is that of "
            "another recipe. Rename the file."
        )
    return name, recipe


def with_recipe(experiment: Experiment, given: str | None) -> Experiment:
    """Return the experiment with the recipe of `--recipe` in place of its own; None keeps it."""
    if given is None:
        return experiment
    return dataclasses.replace(experiment, quant=read_recipe(given))
