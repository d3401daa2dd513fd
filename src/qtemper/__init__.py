"""qtemper: quantization-aware training at 1 to 8 bits by noise tempering.

`prepare` puts quantizers into a float model, `calibrate` gives them their scales, `param_groups` is for the
optimizer, and `set_progress` (or `Tempering.step`) goes once into each training step.
"""

from qtemper.calibrate import calibrate, reestimate_batch_norm
from qtemper.curvature import update_curvature
from qtemper.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    NotCalibratedError,
    UnsupportedModuleError,
)
from qtemper.methods import available as methods_available
from qtemper.methods import get_method
from qtemper.modes import float_mode
from qtemper.policy import BitPolicy, Plan, Row, Rule, make_plan
from qtemper.prepare import latent_state, param_groups, prepare, quantizer_table
from qtemper.progress import Tempering, set_progress
from qtemper.quantizer import Grid, Method, Quantizer, QuantSpec, Rounding, quantizers
from qtemper.requantize import requantize

__version__ = "0.1.0.dev0"

__all__ = [
    "BitPolicy",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Grid",
    "Method",
    "NotCalibratedError",
    "Plan",
    "QuantSpec",
    "Quantizer",
    "Rounding",
    "Row",
    "Rule",
    "Tempering",
    "UnsupportedModuleError",
    "calibrate",
    "float_mode",
    "get_method",
    "latent_state",
    "make_plan",
    "methods_available",
    "param_groups",
    "prepare",
    "quantizer_table",
    "quantizers",
    "reestimate_batch_norm",
    "requantize",
    "set_progress",
    "update_curvature",
]
