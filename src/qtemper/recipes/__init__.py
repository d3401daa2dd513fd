"""Recipes: a run is a function that returns an `Experiment`. Each module here registers its own by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from qtemper.config import Experiment
from qtemper.errors import ConfigError, closest

Recipe = Callable[[], Experiment]


@cache
def _all() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").RECIPES
    return found


def available() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    return tuple(sorted(_all()))


def get_recipe(name: str) -> Experiment:
    """A recipe's experiment.

    Raises:
        ConfigError: no recipe of that name; the message gives the nearest one.
    """
    recipes = _all()
    if name not in recipes:
        close = closest(name, recipes)
        hint = f"did you mean {close!r}?" if close else "see `qtemper recipes`."
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return recipes[name]()
