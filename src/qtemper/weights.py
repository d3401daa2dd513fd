"""Weights as safetensors: to bytes or a file, from a file, and into a model that they must fit."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from qtemper.errors import CheckpointError
from qtemper.files import write_atomically
from qtemper.layers import without_quantizers


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file's content."""
    from safetensors.torch import save

    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in storages:  # tied weights: safetensors wants each with its own memory
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    return save(copies, metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically."""
    write_atomically(path, to_bytes(tensors, metadata))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; give a .safetensors file.")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file.")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            if header > path.stat().st_size - 8:  # before anything is read that is not there
                raise ValueError(f"its header would have {header} bytes")
            file.seek(0)
            return load(file.read())
    except (SafetensorError, ValueError, OSError, RuntimeError, KeyError, MemoryError) as error:
        hint = "pickled .pt/.pth files are never opened; convert with safetensors.torch.save_file(state_dict, path)"
        raise CheckpointError(f"{path} is no sound safetensors file ({one_line(str(error))}); {hint}.") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries; of a file that `read_safetensors` has read."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__", {}))


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Load a state dict; every key and shape must match.

    Raises:
        CheckpointError: with the first differences; the model is unchanged.
    """
    check_fit(model, tensors, source)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not load into the model ({one_line(str(error))}).") from None


def check_fit(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Refuse weights of other names or shapes than the model's.

    Raises:
        CheckpointError: with the first differences.
    """
    own = model.state_dict()
    quantized = without_quantizers(tensors).keys() != tensors.keys()
    expected = own if quantized else without_quantizers(own)
    # Older checkpoints lack batch norm's step counter, which torch itself does not insist on.
    problems = [f"missing {k}" for k in expected if k not in tensors and not k.endswith("num_batches_tracked")]
    problems += [f"unexpected {key:.80}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in expected
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} does not fit the model: {one_line('; '.join(problems[:3]), 400)}{more}. Choose the recipe (or "
            "--set model.*) of the network it was trained with."
        )


def one_line(text: str, width: int = 200) -> str:
    """The start of a text without its line breaks."""
    return " ".join(text.split())[:width]
