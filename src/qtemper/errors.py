"""Exceptions for bad input, all of them ValueErrors, and what their messages are made of."""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union


class NotCalibratedError(ValueError):
    """A quantizer was used before `calibrate` (or a checkpoint) gave it its scale."""


class CalibrationError(ValueError):
    """Calibration data, or weights, from which no scale can be found."""


class UnsupportedModuleError(ValueError):
    """A module of the model cannot be quantized; the message names it and what to do instead."""


class ConfigError(ValueError):
    """A configuration names an unknown field or holds a value of the wrong kind."""


class CheckpointError(ValueError):
    """A checkpoint or run directory is missing, damaged or of another model."""


class InUseError(CheckpointError):
    """Another process trains into the run directory; waiting helps, and `IN_USE_EXIT` says so to a scheduler."""


IN_USE_EXIT = 4
"""Exit code of a command that met an `InUseError`."""


class ExportError(ValueError):
    """A model, or a part of one, that a device or file format cannot hold; the message names the layer."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one looks like a typo of, if any."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known one, or all of them."""
    known = sorted(known)
    close = closest(name, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}."


def optional_module(name: str, extra: str) -> Any:
    """Import a module that only some users need.

    Raises:
        ModuleNotFoundError: naming the extra of this package that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"{package} is not installed: `pip install qtemper[{extra}]`.", name=package
        ) from error


def check_choices(settings: Any, name: str = "") -> None:
    """Refuse a dataclass with a field that its `Literal` does not allow.

    Args:
        settings: an instance.
        name: what the message calls it.

    Raises:
        ConfigError: naming the field and what it may be.
    """
    for field, hint in typing.get_type_hints(type(settings)).items():
        choices = _choices(hint)
        if choices and getattr(settings, field) not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            where = f"{name}.{field}" if name else field
            raise ConfigError(f"{where} must be one of {known}, got {getattr(settings, field)!r}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of a union of them and None; empty for any other type."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return ()
    parts = [(None,) if part is type(None) else _choices(part) for part in typing.get_args(hint)]
    return tuple(choice for part in parts for choice in part) if all(parts) else ()
