"""Quantized layers: two quantizers and the float layer's own maths.

A quantized layer is a subclass of the layer it replaces. Its input goes through `act_quantizer`, and its attribute
`weight` is the fake-quantized weight, as under torch's own parametrizations; the float ("latent") weight stays the
registered parameter of that name, so optimizers, state-dict keys and everything else see it where it was, and the
float class's forward runs unchanged, a user's subclass with its own forward included.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from qtemper.errors import UnsupportedModuleError
from qtemper.fast import fast_path
from qtemper.fast import layer as fast
from qtemper.quantizer import Quantizer

QUANTIZERS = {"weight": "weight_quantizer", "activation": "act_quantizer"}
"""Attribute of a quantized layer for each of its tensors."""


def without_quantizers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a quantized network's state dict that its float network has: latent weights, batch norm."""
    names = set(QUANTIZERS.values())
    return {key: tensor for key, tensor in tensors.items() if names.isdisjoint(key.split("."))}


@final
class StoredWeight(nn.Module):
    """A weight in integers, in the place of a weight quantizer whose latent weight is gone (`export.convert`).

    Args:
        codes: int8, or int16 where they need 9 bits; shape of the weight.
        scale: float32, broadcastable to it.
        bits: of the grid that the codes come from.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        """The weight, `codes * scale`."""
        return self.codes.to(self.scale.dtype) * self.scale


class QuantLayer(nn.Module):
    """Mixin in front of a float layer's class; made by `quantize_layer`, never constructed directly."""

    weight_quantizer: Quantizer | StoredWeight | None
    act_quantizer: Quantizer | None

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight; the latent one is `latent_weight`, and stands in for it before calibration."""
        quantizer = self.weight_quantizer
        if isinstance(quantizer, StoredWeight):
            stored: Tensor = quantizer()
            return stored
        latent = self.latent_weight
        return latent if quantizer is None or not quantizer.grid.calibrated else quantizer(latent)

    @property
    def latent_weight(self) -> nn.Parameter:
        """The float weight that the optimizer trains."""
        latent = self._parameters.get("weight")
        if latent is None:
            raise UnsupportedModuleError(
                f"this {type(self).__name__} has no float weight: export.convert made integers of it, or it was "
                "parametrized since; do that to the float network, before prepare."
            )
        return latent

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The float layer's forward on quantized operands."""
        if fast_path() and fast.supported(self, input):
            return fast.forward(self, input)
        if isinstance(self.weight_quantizer, Quantizer):
            self.weight_quantizer.require_calibrated()
        if self.act_quantizer is not None:
            input = self.act_quantizer(input)
        return super().forward(input, *args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, but for what pruning and spectral norm would put in place of the weight."""
        if name == "weight_orig":
            raise UnsupportedModuleError(
                f"a {type(self).__name__} computes its weight itself; prune the float network, make that permanent "
                "(prune.remove), and prepare it then."
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        present = [name for name in QUANTIZERS.values() if getattr(self, name) is not None]
        if any(key.startswith(prefix + name + ".") for key in state_dict for name in present):
            return
        # A float checkpoint loads strictly: its quantizers are neither missing nor kept, but to be calibrated.
        # (torch hands this same dict on to the children.)
        for name in present:
            quantizer = getattr(self, name)
            quantizer.grid.reset()
            state_dict.update({f"{prefix}{name}.{key}": v for key, v in quantizer.state_dict().items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be found by name: rebuild it from the float class.
        return _rebuild, (float_class(type(self)),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


# The public float layers; subclasses of them, a user's included, get their quantized class on demand.
QUANTIZABLE: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

_quant_classes: dict[type[nn.Module], type[QuantLayer]] = {}


def quant_class(cls: type[nn.Module]) -> type[QuantLayer]:
    """The quantized subclass of a float layer's class, the same object every time."""
    if cls not in _quant_classes:
        doc = f"`{cls.__name__}` with its input and its weight quantized; see `QuantLayer`."
        name = f"Quant{cls.__name__}"
        _quant_classes[cls] = type(name, (QuantLayer, cls), {"__module__": __name__, "__doc__": doc})
    return _quant_classes[cls]


def float_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The float class of a quantized layer's class."""
    return cls.__mro__[2] if issubclass(cls, QuantLayer) else cls


QuantConv1d, QuantConv2d, QuantConv3d = (quant_class(c) for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d = (
    quant_class(c) for c in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)
QuantLinear = quant_class(nn.Linear)


def quantize_layer(layer: nn.Module, weight: Quantizer | None, act: Quantizer | None) -> QuantLayer:
    """Turn a float layer, in place, into its quantized subclass.

    In place, so that hooks, attributes and every other reference to the module stay what they are.
    """
    layer.__class__ = quant_class(type(layer))
    assert isinstance(layer, QuantLayer)
    layer.weight_quantizer = weight
    layer.act_quantizer = act
    return layer


def weight_channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight that counts its output channels."""
    return 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0


def input_channels(layer: nn.Module) -> int:
    """Number of input channels (features) of a quantizable layer."""
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(channels, int)
    return channels


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    layer = torch.nn.Module.__new__(quant_class(cls))
    assert isinstance(layer, nn.Module)
    return layer
