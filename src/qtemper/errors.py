"""The package's exceptions. All are ValueErrors, so that one `except ValueError` catches every bad input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class ExportError(ValueError):
    """A model, or a part of one, that a device or file format cannot hold; the message names the layer."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
