"""An experiment as frozen data: JSON round trip, `path=value` overrides, errors that name the nearest field."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from qtemper import methods, schedules
from qtemper.calibrate import Observer
from qtemper.data import DataConfig
from qtemper.errors import ConfigError, check_choices, nearest
from qtemper.models import ModelConfig
from qtemper.policy import BitPolicy
from qtemper.quantizer import Method
from qtemper.schedules import Schedule
from qtemper.stages import Stage, check_stages
from qtemper.train import TrainConfig


@dataclass(frozen=True)
class CalibrationConfig:
    """How scales are found before training.

    Attributes:
        observer: `mse`, `percentile`, `max`, `lsq` or `ewgs`; see `qtemper.calibrate`.
        batches: number of training batches to look at.
        batch_size: images in each.
        batch_norm: re-estimate batch-norm statistics in the quantized network afterwards.
    """

    observer: Observer = "mse"
    batches: int = 4
    batch_size: int = 256
    batch_norm: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Experiment:
    """A whole run: what a recipe returns and what `config.json` holds.

    Attributes:
        name: the recipe's name.
        data: data set, normalisation, augmentation.
        model: architecture.
        method: quantization method; None trains the float network.
        policy: bits by layer.
        stages: higher bits that are trained first, falling, each from the weights of the one before (PQDE's progressive
            schedule, for any method); `train` says how, but for the epochs. Empty trains the policy's bits at once.
        calibration: how scales are found.
        train: how the network is trained.
        float_train: how to train the float network first when no --init is given; None makes --init required.
        seed: of everything random.
    """

    name: str
    data: DataConfig
    model: ModelConfig
    method: Method | None = None
    policy: BitPolicy = BitPolicy()
    stages: tuple[Stage, ...] = ()
    calibration: CalibrationConfig = CalibrationConfig()
    train: TrainConfig = field(default_factory=TrainConfig)
    float_train: TrainConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 or more and below 2**63, got {self.seed}.")
        if self.stages and self.method is None:
            raise ConfigError("stages are of quantized training, and there is no method; set method, or stages=[].")
        check_stages(self.stages, self.policy)

    @property
    def total_epochs(self) -> int:
        """Passes over the training images in all stages and the training after them, without the float network's."""
        return self.train.epochs + sum(stage.epochs for stage in self.stages)


_SCHEDULES: dict[str, type[Any]] = {
    cls.__name__.lower(): cls
    for cls in vars(schedules).values()
    if dataclasses.is_dataclass(cls) and isinstance(cls, type)
}


def to_dict(value: Any) -> Any:
    """Plain JSON data of a configuration; methods and schedules carry their `name`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Method):
            return {"name": value.name, **fields}
        if type(value) in _SCHEDULES.values():
            return {"name": type(value).__name__.lower(), **fields}
        return fields
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def from_dict(data: Any, *, source: str = "configuration") -> Experiment:
    """An experiment from plain data.

    Raises:
        ConfigError: an unknown or missing field, or a value of the wrong kind; the message gives its path.
    """
    try:
        experiment = _decode(Experiment, data, "")
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply.") from None
    assert isinstance(experiment, Experiment)
    return experiment


def from_json(text: str | bytes, *, source: str = "configuration") -> Experiment:
    """An experiment from JSON text.

    Raises:
        ConfigError: no JSON, or as `from_dict`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is no sound JSON ({error}).") from None
    try:
        return from_dict(data, source=source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def to_json(experiment: Experiment) -> str:
    """JSON text of an experiment, indented."""
    return json.dumps(to_dict(experiment), indent=2) + "\n"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a configuration's plain data by its dotted path: exactly what `--set` reaches."""
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return leaves


def override(experiment: Experiment, assignments: list[str]) -> Experiment:
    """Apply `path=value` assignments, in order.

    Values are JSON where that parses, otherwise text. Assigning another method or schedule by name (`method=lsq`,
    `train.optim.schedule=constant`) replaces it whole, with that one's defaults; the name that is there already changes
    nothing. `bits=W2A2` stands for the policy's two bit widths.

    Raises:
        ConfigError: not of that form, an unknown path (with the nearest one), a value of the wrong kind, or an
            assignment that a later one undoes.
    """
    data = to_dict(experiment)
    earlier: list[tuple[str, str]] = []
    for assignment in expand(assignments):
        path, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not path:
            raise ConfigError(f"cannot read {assignment!r}; write --set field.path=value.")
        if _named(data, path.removesuffix(".name")):
            path = path.removesuffix(".name")
        value = _parse(text)
        if value in _named(data, path):
            continue
        undone = next((other for inside, other in earlier if inside.startswith(path + ".")), None)
        if undone is not None:
            raise ConfigError(f"{undone} is undone by {assignment} after it; write it behind that.")
        earlier.append((path, assignment))
        _assign(data, path, value)
        # A method or schedule set by its name has fields that later assignments reach. What is wrong may be put
        # right by them.
        with contextlib.suppress(ConfigError):
            data = to_dict(from_dict(data))
    return from_dict(data)


def expand(assignments: list[str]) -> list[str]:
    """Assignments in which `bits=W2A2` has become the policy's two bit widths.

    Raises:
        ConfigError: bits that cannot be read.
    """
    expanded = []
    for assignment in assignments:
        path, _, value = (part.strip() for part in assignment.partition("="))
        if path == "bits":
            policy = BitPolicy.parse(value)
            expanded += [f"policy.weight={policy.weight}", f"policy.activation={policy.activation}"]
        else:
            expanded.append(assignment)
    return expanded


def _parse(text: str) -> Any:
    if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text):  # no JSON
        return float(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"None": None, "True": True, "False": False}.get(text, text)


def _named(data: dict[str, Any], path: str) -> list[Any]:
    """The name of the method or schedule that lies at a path; empty where none does."""
    node: Any = data
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    found = node.get("name") if isinstance(node, dict) else None
    return [found] if found in {*methods.available(), *_SCHEDULES} else []


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    node: Any = data
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        known = set(flatten(data))
        known |= {".".join(k.split(".")[:i]) for k in known for i in range(1, k.count(".") + 1)}
        raise ConfigError(f"unknown field {path!r}; {nearest(path, known)}")
    node[leaf] = value


def _decode(kind: Any, data: Any, path: str) -> Any:
    """`data` as a value of type `kind`; `path` is for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, data, path)
    if origin is Literal:
        if data not in arguments or isinstance(data, bool) != isinstance(arguments[0], bool):
            raise ConfigError(f"{path} must be one of {', '.join(map(str, arguments))}, got {data!r:.80}.")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{path} must be a list, got {data!r:.80}.")
        return tuple(_decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if kind is Method:
        return _decode_named(data, path, "method", methods.available(), methods.method_class)
    if kind is Schedule:
        return _decode_named(data, path, "schedule", _SCHEDULES, _SCHEDULES.__getitem__)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, data, path)
    return _decode_scalar(kind, data, path)


def _decode_scalar(kind: Any, data: Any, path: str) -> Any:
    accepted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}[kind]
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise ConfigError(f"{path} must be {kind.__name__}, got {data!r:.80}.")
    try:
        value = kind(data)
    except OverflowError:
        value = math.inf
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, got {data!r:.80}.")
    return value


def _decode_union(arguments: tuple[Any, ...], data: Any, path: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    options = [a for a in arguments if a is not type(None)]
    error: ConfigError | None = None
    for option in options:
        try:
            return _decode(option, data, path)
        except ConfigError as failure:
            error = failure
    assert error is not None
    raise error


def _decode_named(data: Any, path: str, what: str, known: typing.Iterable[str], find: Any) -> Any:
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ConfigError(f"{path} must be a {what}'s name or an object with one, got {data!r:.80}.")
    if data["name"] not in known:
        raise ConfigError(f"{path}: unknown {what} {data['name']!r}; {nearest(data['name'], known)}")
    return _decode_fields(find(data["name"]), {k: v for k, v in data.items() if k != "name"}, path)


def _decode_fields(cls: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{path or 'the configuration'} must be an object with fields, got {data!r:.80}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, item in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"unknown field {where!r}; {nearest(str(key), fields)}")
        values[key] = _decode(hints[key], item, where)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in values and required:
            raise ConfigError(f"{f'{path}.' if path else ''}{name} is missing.")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None
