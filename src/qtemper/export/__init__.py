"""From a trained model to integers: the oracle (`integer_model`), files, and proof that they agree.

ONNX is in `qtemper.export.onnx` and `qtemper.export.verify`, which need the extra `export`.
"""

from qtemper.export.integer import integer_model
from qtemper.export.packed import convert, load_quantized, save_quantized

__all__ = ["convert", "integer_model", "load_quantized", "save_quantized"]
