"""A progressive schedule of bits: stages above the policy's own, each trained before the next, lower one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qtemper.errors import ConfigError
from qtemper.policy import FLOAT_BITS, BitPolicy


@dataclass(frozen=True)
class Stage:
    """One step on the way down from float to the policy's bits.

    Attributes:
        bits: default bits of the stage, as `W8A8`; the rest, first and last layer and rules, is the policy's.
        epochs: passes over the training images.

    Raises:
        ConfigError: bits that are no shorthand, out of range or all float; less than one epoch.
    """

    bits: str
    epochs: int

    def __post_init__(self) -> None:
        bits = BitPolicy.parse(self.bits)
        if (
            not {bits.weight, bits.activation} <= {*range(1, 9), FLOAT_BITS}
            or bits.weight == bits.activation == FLOAT_BITS
        ):
            raise ConfigError(f"stage {self.bits}: bits are 1 to 8, and 32 (float) for one of the two.")
        if self.epochs < 1:
            raise ConfigError(f"stage {self.bits}: epochs must be at least 1, got {self.epochs}.")

    @property
    def name(self) -> str:
        """The bits in one spelling; also the stage's directory."""
        return _name(BitPolicy.parse(self.bits))

    def policy(self, target: BitPolicy) -> BitPolicy:
        """The target's policy at this stage's bits."""
        bits = BitPolicy.parse(self.bits)
        return replace(target, weight=bits.weight, activation=bits.activation)


def check_stages(stages: Iterable[Stage], target: BitPolicy) -> None:
    """Refuse stages that do not fall: neither kind of bits may rise, and one has to become fewer.

    Raises:
        ConfigError: with the first two that do not.
    """
    policies = [*(stage.policy(target) for stage in stages), target]
    for before, after in itertools.pairwise(policies):
        if (
            before.weight < after.weight
            or before.activation < after.activation
            or (before.weight, before.activation) == (after.weight, after.activation)
        ):
            what = f"the policy's own bits, {_name(after)}" if after is target else _name(after)
            raise ConfigError(
                f"stages must go down in bits, and {_name(before)} is followed by {what}; write them as W8A8, W6A6 "
                "above a policy of W4A4."
            )


def _name(policy: BitPolicy) -> str:
    return f"W{policy.weight}A{policy.activation}"
