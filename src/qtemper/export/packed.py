"""A trained model without its latent weights: integer codes, packed in a safetensors file, and back."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtemper import layers
from qtemper.errors import CheckpointError, ExportError
from qtemper.export.bits import from_planes, planes, shrink
from qtemper.export.codes import activation_codes, integer_weight, require_quantized
from qtemper.functional import Levels
from qtemper.layers import QuantLayer, StoredWeight
from qtemper.methods import get_method
from qtemper.policy import FLOAT_BITS, Plan, Row
from qtemper.prepare import prepare
from qtemper.quantizer import Quantizer
from qtemper.weights import load_strictly, read_metadata, read_safetensors, save_tensors

FORMAT = 1
KEY = "qtemper_quantized"


def convert(model: nn.Module) -> nn.Module:
    """A copy of a trained model whose quantized weights are integers and whose scales no longer train.

    It is on the CPU and in eval mode, and computes what the trained model computes in eval mode, to the bit where the
    method decodes by one product.

    Raises:
        ExportError: a weight or activation whose levels are no multiples of one step, or a quantizer that is off.
        NotCalibratedError: a quantizer has no scale yet.
    """
    require_quantized(model)
    model = copy.deepcopy(model).cpu().eval()
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLayer):
            continue
        act, weight = layer.act_quantizer, layer.weight_quantizer
        for quantizer in (act, weight):
            if isinstance(quantizer, Quantizer) and not quantizer.enabled:
                raise ExportError(f"{quantizer.name} is switched off; set its `enabled` to True, or leave float_mode.")
        if act is not None:
            codes = activation_codes(name, act)
            levels: Any = act.grid.levels
            layer.act_quantizer = _frozen(act, levels, torch.tensor([codes.scale]))
        if isinstance(weight, Quantizer):
            found = integer_weight(name, layer)
            layer.weight_quantizer = StoredWeight(
                found.codes, _compact(found.scale, layers.weight_channel_axis(layer), found.codes.dim()), found.bits
            )
            layer.register_parameter("weight", None)
    return model.requires_grad_(False)


def _frozen(quantizer: Quantizer, levels: Levels, scale: Tensor) -> Quantizer:
    method = get_method("ste")
    fixed = Quantizer(
        quantizer.spec, method.grid("activation", quantizer.spec, 1), method.rounding("activation", quantizer.spec)
    )
    fixed.grid.initialize(levels, scale)
    fixed.name = quantizer.name
    return fixed.eval()


def _compact(scale: Tensor, axis: int, dims: int) -> Tensor:
    """One number if all are equal, otherwise shaped to the weight."""
    if bool((scale == scale[0]).all()):
        return scale[:1].reshape([1] * dims).clone()
    shape = [1] * dims
    shape[axis] = -1
    return scale.reshape(shape)


def save_quantized(model: nn.Module, path: Path) -> None:
    """Write a model with its weights packed in the fewest bits that hold their codes.

    Args:
        model: prepared and trained, or converted.
        path: of the safetensors file; an existing one is replaced, in one step.

    Raises:
        ExportError: see `convert`.
        CheckpointError: the file cannot be written.
    """
    model = convert(model)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if len(names) > len(list(model.named_modules())):
        raise ExportError(
            "the model has a module under two names, which a packed file does not hold; register it under one."
        )
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith("weight_quantizer.codes")}
    about: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLayer):
            continue
        entry: dict[str, Any] = {}
        if layer.act_quantizer is not None:
            entry["activation"] = [layer.act_quantizer.spec.bits, layer.act_quantizer.grid.levels]
        stored = layer.weight_quantizer
        if isinstance(stored, StoredWeight):
            axis = layers.weight_channel_axis(layer)
            small = shrink(stored.codes.cpu().movedim(axis, 0).numpy())
            tensors[f"{name}.weight_quantizer.packed"] = torch.from_numpy(planes(small.inner, small.bits))
            if small.sign is not None:
                tensors[f"{name}.weight_quantizer.sign"] = torch.from_numpy(np.packbits(small.sign < 0))
            entry["weight"] = [stored.bits, small.bits, small.doubled, list(small.inner.shape), axis]
        about[name] = entry
    document = {"format": FORMAT, "layers": about, "sha256": _digest(tensors, about)}
    save_tensors(path, tensors, {KEY: json.dumps(document)})


def load_quantized(path: Path, model: nn.Module) -> nn.Module:
    """Put the content of a `save_quantized` file into a float model of the same architecture, in place.

    Args:
        path: of the file.
        model: freshly built, not prepared; its weights do not matter.

    Returns:
        The same model, converted, in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, no such file, or of another model.
    """
    tensors, document = read_safetensors(path), read_metadata(path).get(KEY)
    try:
        about = json.loads(document or "null")
        known = about["format"] == FORMAT
        names, digest = about["layers"], about["sha256"]
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"{path} was not written by save_quantized; give such a file.") from None
    if not known:
        raise CheckpointError(f"{path} has format {about['format']}, this version reads {FORMAT}; update qtemper.")
    if digest != _digest(tensors, names):
        raise CheckpointError(f"{path} is damaged (its sha256 does not match its content); fetch or export it again.")
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise CheckpointError("load_quantized needs a freshly built float model, and this one is prepared.")
    missing = [name for name in names if not isinstance(dict(model.named_modules()).get(name), layers.QUANTIZABLE)]
    if missing:
        raise CheckpointError(f"{path} has the layer {missing[0]}, which the model lacks; build the model it is from.")
    prepare(model, "ste", Plan([row for name, entry in names.items() for row in _rows(name, entry)]))
    for name, entry in names.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        if "weight" in entry:
            _restore_weight(layer, name, entry["weight"], tensors)
    load_strictly(model, tensors, path)
    return model.eval().requires_grad_(False)


def _rows(name: str, entry: dict[str, Any]) -> list[Row]:
    rows = []
    if "weight" in entry:
        rows.append(Row(name, "weight", entry["weight"][0]))
    if "activation" in entry:
        bits, levels = entry["activation"]
        rows.append(Row(name, "activation", bits, levels))
    assert all(row.bits != FLOAT_BITS for row in rows)
    return rows


def _restore_weight(layer: QuantLayer, name: str, entry: list[Any], tensors: dict[str, Tensor]) -> None:
    """Put codes where the weight's quantizer is, and into `tensors` in the place of their packed form."""
    of_grid, bits, doubled, shape, axis = entry
    prefix = f"{name}.weight_quantizer."
    codes = torch.from_numpy(from_planes(tensors.pop(prefix + "packed").numpy(), bits, tuple(shape))).to(torch.int16)
    codes = 2 * codes + 1 if doubled else codes
    if (signs := tensors.pop(prefix + "sign", None)) is not None:
        negated = torch.from_numpy(np.unpackbits(signs.numpy(), count=shape[0]).astype(np.bool_))
        codes = torch.where(negated.reshape(-1, *[1] * (codes.dim() - 1)), -codes, codes)
    codes = codes.movedim(0, axis).contiguous()
    layer.weight_quantizer = StoredWeight(codes, torch.empty_like(tensors[prefix + "scale"]), of_grid)
    layer.register_parameter("weight", None)
    tensors[prefix + "codes"] = codes


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
