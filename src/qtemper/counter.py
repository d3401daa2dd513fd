"""Random numbers as pure functions of a counter and a key: no generator, no state to lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qtemper.leaf import define, leaf

_MASK64 = (1 << 64) - 1
Words = TypeVar("Words", Tensor, NDArray[Any])
"""Tensors or arrays of int32, which wrap around alike."""


def derive_key(*words: int) -> tuple[int, int]:
    """Hash integers (seed, step, quantizer, ...) into two independent signed 32-bit keys.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) absorbs one word after the other.
    """
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = _splitmix64(state ^ (word & _MASK64))
    low, high = state & 0xFFFFFFFF, state >> 32
    return _signed32(low), _signed32(high)


def _splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _signed32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def counter_bits(index: Words, key: Words) -> Words:
    """32 pseudo-random bits for every counter value: a pure function, no generator state.

    C. Wellons' three-round `triple32` mixer, with one key word xor-ed in before the first round and the other added
    after it, so that streams of different keys are not shifts or permutations of one another. (His two-round mixer
    is cheaper but correlates elements 4,096 apart at up to 58 standard errors in 2**22 draws.) Not for cryptography.

    Args:
        index: int32 counters, any shape (an element's index in its tensor, or an image's in its data set).
        key: int32, shape (2,), from `derive_key`.

    Returns:
        int32, shape of `index`.
    """
    h = index ^ key[0]
    h = (h ^ _shift_right(h, 17)) * _signed32(0xED5AD4BB)
    h = h + key[1]
    h = (h ^ _shift_right(h, 11)) * _signed32(0xAC4C1B51)
    h = (h ^ _shift_right(h, 15)) * _signed32(0x31848BAB)
    mixed: Words = h ^ _shift_right(h, 14)
    return mixed


def _shift_right(h: Words, bits: int) -> Words:
    """Logical shift of int32 (its own is arithmetic)."""
    shifted: Words = (h >> bits) & ((1 << (32 - bits)) - 1)
    return shifted


def mix_words(row: Tensor, column: Tensor) -> Tensor:
    """32 pseudo-random bits for every pair of a row and a column, from a word of `counter_bits` for each.

    The words are random already, so half a mixer is enough for the many elements: five operations. The shift may be
    arithmetic, at the price of a bit: `h` and `~h` end as one, so 2**31 different results are left.
    """
    h = (row ^ column) * _signed32(0x7FEB352D)
    return (h ^ (h >> 15)) * _signed32(0x846CA68B)


def counter_words(key: Tensor, first: int, rows: int, columns: int) -> Tensor:
    """A word for each column, then one for each row from `first` on: their bits, called float32.

    On a CPU by an operator; elsewhere in plain operations, which a compiler fuses with what uses the words: to hash
    anew for every element costs a GPU less than to launch this.
    """
    if key.device.type != "cpu":
        return _words(key, first, rows, columns)
    words: Tensor = _counter_words(key, first, rows, columns)
    return words


def _words(key: Tensor, first: int, rows: int, columns: int) -> Tensor:
    index = torch.arange(columns + rows, dtype=torch.int32, device=key.device)
    index = torch.where(index < columns, index - columns, index - columns + _signed32(first & 0xFFFFFFFF))
    return counter_bits(index, key).view(torch.float32)


def _words_by_numpy(key: Tensor, first: int, rows: int, columns: int) -> Tensor:
    index = np.arange(-columns, rows, dtype=np.int32)  # a quarter of torch's time for so few numbers
    index[columns:] += np.int32(_signed32(first & 0xFFFFFFFF))
    return torch.from_numpy(counter_bits(index, key.numpy()).view(np.float32))


# An operator, so that torch.compile keeps the words in memory and does not hash anew for every element. The words' bits
# are called float32 (some of them NaN): without AVX-512, torch.compile's code takes 5 times as long to load int32.
_counter_words = define(
    "counter_words(Tensor key, SymInt first, SymInt rows, SymInt columns) -> Tensor", _words_by_numpy, "CPU"
)


@torch.library.register_fake("qtemper::counter_words")  # type: ignore[untyped-decorator]
def _(key: Tensor, first: int, rows: int, columns: int) -> Tensor:
    return key.new_empty(columns + rows, dtype=torch.float32)


def counter_uniform(index: Tensor, key: Tensor) -> Tensor:
    """Uniform float32 in (0, 1), a pure function of `index` and `key` (see `counter_bits`)."""
    return uniform(counter_bits(index, key))


def uniform(bits: Tensor) -> Tensor:
    """Uniform float32 in (0, 1) from the upper 23 of 32 bits.

    23 bits and a half: every value is exact in float32, 0 and 1 never occur, the distribution is symmetric.
    """
    return (_shift_right(bits, 9).to(torch.float32) + 0.5) * 2.0**-23


def signed_uniform(bits: Tensor, reach: Tensor | float = 1.0) -> Tensor:
    """Uniform float32 in [-reach, reach] from all 32 bits: a conversion and a product, so the cheapest of these.

    The mean is -2**-32 of `reach`; the last 9 bits are lost where the magnitude is above 2**-7, so a `coarse_uniform`
    of the same bits is independent to about 2**-23.
    """
    return bits.to(torch.float32) * (reach * 2.0**-31)


@leaf("(Tensor bits, int low=0) -> Tensor")
def coarse_uniform(bits: Tensor, low: int = 0) -> Tensor:
    """Uniform float32 in (low, low + 1) from 9 of 32 bits, independent of the other distributions of the same bits.

    The lower 9, which `uniform` leaves, xor others, because a product carries upwards only: the low bits of
    `mix_words` know nothing of the high bits of its words. And given a `gaussian`, the low bits alone are not random.
    """
    return ((bits ^ (bits >> 14)) & 511).to(torch.float32) * 2.0**-9 + (low + 2.0**-10)


def gaussian(bits: Tensor) -> Tensor:
    """Standard normal float32 from 32 bits; |result| < 5.2.

    Box and Muller (1958): one of 2**18 radii from the upper bits, one of 2**14 angles from the others. Unlike the
    inverse of the normal distribution, all of it is vectorised by torch.compile, to other last bits than eager.
    """
    radius = (_shift_right(bits, 14).to(torch.float32) + 0.5) * 2.0**-18
    angle = ((bits & (2**14 - 1)).to(torch.float32) + 0.5) * (2 * math.pi * 2.0**-14)
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(angle)


def _rows(shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """How many rows a tensor has, by dimension, and how long they are.

    A row is one of an image's; elsewhere what the last dimension holds, or a single element of a vector.
    """
    if len(shape) == 4:
        return (shape[0], shape[2]), shape[1] * shape[3]
    return tuple(shape[: max(len(shape) - 1, 1)]), shape[-1] if len(shape) > 1 else 1


@leaf("(Tensor key, SymInt first, SymInt[] shape) -> Tensor")
def _bits_of_elements(key: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    rows, width = _rows(shape)
    words = counter_words(key, first, math.prod(rows), width)
    column, row = words[:width].view(torch.int32), words[width:].view(torch.int32)
    if len(shape) == 4:
        # Channels last, as images usually lie in memory here.
        bits = mix_words(row.view(*rows, 1, 1), column.view(shape[3], shape[1]))
        return bits.permute(0, 3, 1, 2)
    return mix_words(row.view(*rows, 1), column).view(shape)


class NoiseSource(nn.Module):
    """Uniform noise in (0, 1) that is a function of (seed, progress, quantizer, element) and nothing else.

    Reproducible, resumable, equal under recomputation (activation checkpointing), and there is no generator
    state to lose. A module that runs twice in one step draws the same noise twice.

    Elements count over the whole batch: where processes share a batch in equal parts, process `part` starts its
    count where the one before ends, so the noise does not depend on how many processes there are. Likewise
    `block = (first, count)` says that the tensor is of samples `first` and following out of `count`.
    """

    key: Tensor
    part: int = 0
    block: tuple[int, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        # Derived from seed, name and progress, so no part of a checkpoint.
        self.register_buffer("key", torch.zeros(2, dtype=torch.int32), persistent=False)
        self.seed(0, "")

    def key_at(self, progress: float) -> tuple[int, int]:
        """The key of a step; progress tells steps apart down to 2**-40."""
        return derive_key(self._stream, round(progress * 2**40))

    def seed(self, seed: int, name: str) -> None:
        """Give this source its own stream: hash of the seed and the quantizer's name in the model."""
        low, high = derive_key(seed, *name.encode())
        self._stream = (high << 32) | (low & 0xFFFFFFFF)
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Derive the key of a step."""
        set_keys([self], progress)

    def forward(self, v: Tensor) -> Tensor:
        """Noise in (0, 1), float32, shape and device of `v`."""
        return uniform(self._bits(v))

    def signed(self, v: Tensor, reach: Tensor | float = 1.0) -> Tensor:
        """Noise in [-reach, reach] of the same bits, for half the operations; not independent of `forward`."""
        return signed_uniform(self._bits(v), reach)

    def gaussian(self, v: Tensor) -> Tensor:
        """Standard normal noise of the same bits."""
        return gaussian(self._bits(v))

    def dither(self, v: Tensor, low: int = 0) -> Tensor:
        """Noise in (low, low + 1) in steps of 1/512, independent of `forward` and `signed`."""
        return coarse_uniform(self._bits(v), low)

    def _bits(self, v: Tensor) -> Tensor:
        rows = _rows(v.shape)[0]
        first, count = self.block or (0, rows[0] if rows else 1)
        # The size of one sample, so that nothing here depends on the size of the block.
        start = (self.part * count + first) * math.prod(rows[1:])
        return _bits_of_elements(self.key, start, v.shape)


def set_keys(sources: Sequence[NoiseSource], progress: float) -> None:
    """`set_progress` of many sources, in two operations where they are on one device."""
    sources = list(dict.fromkeys(sources))  # one that is shared must not be added to twice
    fill(
        [source.key[half] for source in sources for half in (0, 1)],
        [word for source in sources for word in source.key_at(progress)],
    )


def fill(tensors: Sequence[Tensor], values: Sequence[float]) -> None:
    """Fill each of several different tensors with its own number.

    The numbers are arguments of a kernel. A copy from a tensor of the host would make a GPU wait at every step.
    """
    if tensors:
        torch._foreach_zero_(list(tensors))
        torch._foreach_add_(list(tensors), list(values))
