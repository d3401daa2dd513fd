"""Scales of 8-bit values that are kept between layers, fitted to a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from qtemper.calibrate import search_scale
from qtemper.errors import ExportError
from qtemper.export.chains import Chain, source
from qtemper.export.codes import Codes, float32
from qtemper.functional import CodeRange

SAMPLES = 2**18
"""Values of a batch that a scale is fitted to."""

ROUND_DOWN = 0.1
"""Powers of two by which a scale may fall short of the one that fits best, rather than be nearly twice that."""


def fit_joins(chains: dict[fx.Node, Chain], seen: dict[fx.Node, Tensor], signed: bool) -> dict[fx.Node, Codes]:
    """A grid for each chain's values.

    Args:
        chains: by their last nodes.
        seen: what these gave for a batch of real inputs.
        signed: int8 codes.

    Raises:
        ExportError: values that are all zero or not finite.
    """
    ranges = {tail: _range(chain, signed) for tail, chain in chains.items()}
    wanted = {tail: _fit(seen[tail], ranges[tail], chain) for tail, chain in chains.items()}
    found: dict[fx.Node, Codes] = {}
    for group in _groups(chains):
        base = min((wanted[tail] for tail in group), key=lambda b: _waste(b, [wanted[t] for t in group]))
        exponents = {tail: _exponent(wanted[tail], base) for tail in group}
        _raise_operands(exponents, chains)
        for tail in group:
            low, high, zero_point = ranges[tail]
            found[tail] = Codes(float32(base) * 2.0 ** exponents[tail], zero_point, low, high, signed)
    return found


def _raise_operands(exponents: dict[fx.Node, int], chains: dict[fx.Node, Chain]) -> None:
    """No operand of a sum finer than the sum: half bins would be ties, which float runtimes round as they please."""
    for tail in reversed(exponents):  # in the graph's order, so that a raised operand raises its own in turn
        if chains[tail].kind == "add":
            for operand in (source(a, chains) for a in chains[tail].node.args[:2]):
                exponents[operand] = max(exponents[operand], exponents[tail])


def _range(chain: Chain, signed: bool) -> tuple[int, int, int]:
    positive = chain.low >= 0
    if signed:
        return (0, 127, 0) if positive else (-127, 127, 0)
    return (0, 255, 0) if positive else (0, 255, 128)


def _fit(values: Tensor, codes: tuple[int, int, int], chain: Chain) -> float:
    rows = values.detach().float().reshape(1, -1)
    low, high = rows.aminmax()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ExportError(
            f"{chain.node.name} (in the graph) has NaN or infinite values on the example; check what is before it."
        )
    step = max(1, rows.shape[1] // SAMPLES)
    rows = torch.cat([rows[:, ::step], low.reshape(1, 1), high.reshape(1, 1)], dim=1)
    scale = float(search_scale(rows, CodeRange(codes[0] - codes[2], codes[1] - codes[2], 0.0), "mse"))
    return scale if scale > 0 else 1.0  # all zero: any scale holds it


def _groups(chains: dict[fx.Node, Chain]) -> list[list[fx.Node]]:
    """Chains that meet in sums."""
    group_of = {tail: [tail] for tail in chains}
    for tail, chain in chains.items():
        if chain.kind != "add":
            continue
        for operand in chain.node.args[:2]:
            mine, other = group_of[tail], group_of[source(operand, chains)]
            if mine is not other:
                mine += other
                for member in other:
                    group_of[member] = mine
    order = {tail: index for index, tail in enumerate(chains)}
    groups = {id(group): sorted(group, key=order.__getitem__) for group in group_of.values()}
    return list(groups.values())


def _exponent(wanted: float, base: float) -> int:
    return math.ceil(math.log2(wanted / base) - ROUND_DOWN)


def _waste(base: float, wanted: list[float]) -> float:
    return sum(_exponent(w, base) - math.log2(w / base) for w in wanted)
