"""The runs of a comparison: arms (settings that differ) times seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qtemper.config import Experiment, expand, override, to_dict
from qtemper.errors import ConfigError
from qtemper.recipes import get_recipe

ASSIGNMENTS_SEPARATOR = ";"


YOUNGER = {("data", "held_out"): 0, ("train", "cuda_graphs"): False, ("float_train", "cuda_graphs"): False}
"""Settings that came after the first comparisons, which go on: at this default they do not enter a run's hash."""


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Attributes:
        label: what differs from the recipe.
        assignments: for `config.override`.
    """

    label: str
    assignments: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its arm.
        seed: its seed.
        recipe: name of the recipe.
        experiment: the recipe with the arm's settings and the seed.
    """

    arm: Arm
    seed: int
    recipe: str
    experiment: Experiment

    @property
    def config_hash(self) -> str:
        """Of everything in the experiment but its name, and but stages where there are none."""
        data = {key: value for key, value in to_dict(self.experiment).items() if key != "name"}
        for (part, field), default in YOUNGER.items():
            if data[part] is not None and data[part][field] == default:
                del data[part][field]
        if not data["stages"]:  # as before there was such a field: comparisons of that time go on
            del data["stages"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def assignments(self) -> list[str]:
        """What `qtemper train RECIPE --set ...` needs."""
        return [*self.arm.assignments, f"seed={self.seed}"]

    def directory(self, root: Path) -> Path:
        """Where the run lives below the comparison's directory; the same for the same experiment."""
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", self.arm.label).strip("-")[:60]
        return root / "runs" / f"{slug}-seed{self.seed}-{self.config_hash}"


def make_arms(vary: list[str], arms: list[str]) -> list[Arm]:
    """The product of all `path=value,value,...` axes, then single arms `label: path=value; path=value`.

    `bits=W2A2` stands for the policy's two bit widths.

    Raises:
        ConfigError: an axis or arm that cannot be read, or two arms of one label.
    """
    axes = []
    for axis in vary:
        path, equals, values = axis.partition("=")
        if not equals or not path.strip() or not values.strip():
            raise ConfigError(f"cannot read {axis!r}; write --vary path=value,value.")
        axes.append([f"{path.strip()}={value.strip()}" for value in _split(values)])
    found = [Arm(" ".join(choice), tuple(choice)) for choice in itertools.product(*axes)] if axes else []
    for text in arms:
        label, colon, rest = text.partition(":")
        if not colon or not label.strip():
            raise ConfigError(f'cannot read {text!r}; write --arm "label: path=value; path=value".')
        assignments = tuple(part.strip() for part in rest.split(ASSIGNMENTS_SEPARATOR) if part.strip())
        found.append(Arm(label.strip(), assignments))
    found = found or [Arm("recipe", ())]
    labels = [arm.label for arm in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"two arms are called {label!r}; give each its own label.")
    return [Arm(arm.label, tuple(settings(arm.assignments))) for arm in found]


def _split(values: str) -> list[str]:
    """At commas, but not within the brackets of a list or an object."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def read_arms(path: Path) -> list[str]:
    """The arms in a file, one a line as in `make_arms`; empty lines and those that begin with # are not.

    Raises:
        ConfigError: no such file, one that is no text, or no arm in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"cannot read {path}: {reason}; --arms-from needs a file with an arm a line.") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f'{path} has no arm; write lines like "label: path=value; path=value".')
    return found


def settings(assignments: Iterable[str]) -> list[str]:
    """Assignments for `config.override`.

    Raises:
        ConfigError: bits that cannot be read, or a seed, which is not a setting here.
    """
    found = expand(list(assignments))
    for assignment in found:
        if assignment.partition("=")[0].strip() == "seed":
            raise ConfigError(f"{assignment!r} would be overwritten; give seeds with --seeds, a sweep's with --seed.")
    return found


def make_runs(recipe: str, common: list[str], arms: list[Arm], seeds: list[int]) -> list[Run]:
    """All runs, the first seed of every arm before the second of any: a grid that is cut short is still useful.

    Raises:
        ConfigError: an unknown recipe or field, a value that does not fit, a seed that is given twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds must be one or more different numbers, got {seeds}.")
    start = get_recipe(recipe)
    runs = []
    for seed in seeds:
        for arm in arms:
            full = Arm(arm.label, (*settings(common), *arm.assignments))
            try:
                runs.append(Run(full, seed, recipe, override(start, [*full.assignments, f"seed={seed}"])))
            except ConfigError as error:
                raise ConfigError(f"arm {arm.label!r}: {error}") from None
    return runs
