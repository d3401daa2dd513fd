"""One file per paper; the folder is the registry.

Every module here that does not start with an underscore defines one `Method` of the module's name. Adding a
method is adding a file (and its test).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from qtemper.errors import ConfigError, nearest
from qtemper.quantizer import Method


def available() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        ConfigError: if there is no method of that name; the message gives the nearest one.
    """
    if name not in available():
        raise ConfigError(f"unknown method {name!r}; {nearest(name, available())}")
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and vars(value).get("name") == name:
            return value
    raise AssertionError(f"qtemper/methods/{name}.py defines no Method named {name!r}")


def get_method(name: str, **settings: Any) -> Method:
    """A method by its name, with settings other than the default.

    >>> get_method("ewgs", rule="fixed", delta_weight=0.0).delta_weight
    0.0

    Raises:
        ConfigError: unknown method or setting.
        ValueError: a setting's value that the method refuses.
    """
    cls = method_class(name)
    settable: Any = cls  # every method is a dataclass
    fields = [field.name for field in dataclasses.fields(settable)]
    for key in settings:
        if key not in fields:
            raise ConfigError(f"method {name!r} has no setting {key!r}; {nearest(key, fields)}")
    return cls(**settings)
