"""Operators of this library, and functions that Dynamo takes for one.

Dynamo, the part of torch.compile that reads Python, takes 20 to 50 ms for an autograd function, and a millisecond or
two for every operation; a step of ResNet-20 would have 200 of the one and 7,000 of the other, and all are read again at
every start, whatever is in torch.compile's cache. A leaf is one operation to Dynamo. What is behind Dynamo sees the
operations inside, so they are fused as ever.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY: Any = torch.library.Library("qtemper", "FRAGMENT")  # type: ignore[no-untyped-call]
"""The namespace `torch.ops.qtemper`."""

# Older versions do not tell what is behind Dynamo that it is being compiled, which some of our functions want to know.
_SUPPORTED = hasattr(torch.compiler, "_compile_session_context")


def compiling() -> bool:
    """Whether torch.compile is at work: Dynamo, or what is behind it. Not torch.export, whose program is for others."""
    if not _SUPPORTED:
        return torch.compiler.is_dynamo_compiling()
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def define(schema: str, function: Callable[..., Any], dispatch_key: str) -> Any:
    """An operator, with or without an overload's name in its schema."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    LIBRARY.impl(name, function, dispatch_key)
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.qtemper, name), overload or "default")


def _by_dynamo() -> bool:
    # Not within torch.func's transforms, which know no operator that holds an autograd function.
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not _transformed()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


@functools.cache
def _version() -> str:
    """Of our source code: torch.compile's cache knows an operator by its name alone."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    read = digest.digest() != hashlib.sha256().digest()
    return digest.hexdigest()[:16] if read else os.urandom(8).hex()  # without sources nothing is found again


def leaf(signature: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function of tensors and numbers: to Dynamo it is one operator, of the function's name.

    Args:
        signature: in torch's language for schemas, such as `(Tensor x, float low) -> Tensor`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not _SUPPORTED:
            return function
        name = function.__name__.lstrip("_")
        operator = define(f"{name}.v{_version()}{signature}", function, "CompositeImplicitAutograd")

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result: R = operator(*args, **kwargs) if _by_dynamo() else function(*args, **kwargs)
            return result

        return call

    return decorate
