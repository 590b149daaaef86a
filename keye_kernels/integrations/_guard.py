"""Whether a forward of ours may read a child's weights instead of calling the child.

It may if a call would only run the forward of a class in `FORWARDS`. Adapters, hooks, quantised
weights, offloading and parametrisations make a call do more. They come and go after `apply`, so
every call checks, by the same attributes that `torch.nn.Module.__call__` reads.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from keye_kernels._checks import FLOAT_DTYPES

FORWARDS: dict[type, Callable[..., Any]] = {}  # class to its expected forward, theirs or ours


def known(*kinds: type) -> frozenset[type]:
    """These classes as a set; records their forwards, so that `is_itself` notices a change."""
    for kind in kinds:
        FORWARDS.setdefault(kind, kind.forward)
    return frozenset(kinds)


LINEAR = known(nn.Linear)
OURS: dict[type, type] = {}  # a class of `_subclass.subclass` -> the library's class it replaces
_PLAIN = (torch.Tensor, nn.Parameter)  # DataParallel's replicas have Tensor weights

Part = tuple[str, Collection[type]]  # path of a child, and the classes it may have


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, by the test of `torch.nn.Module.__call__`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def is_itself(module: nn.Module, kinds: Collection[type]) -> bool:
    """Whether a call of the module runs the forward of one of these classes and nothing else."""
    kind = type(module)
    return (
        OURS.get(kind, kind) in kinds
        and kind.forward is FORWARDS.get(kind)
        and "forward" not in module.__dict__
        and not is_watched(module)
    )


def fits(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether our ops can take x together with the other tensors.

    All must be plain tensors of one dtype that our ops support, outside of autocast (tested as in
    PyTorch's own fused layers).
    """
    dtype = x.dtype
    if (
        dtype not in FLOAT_DTYPES
        or type(x) not in _PLAIN
        or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    for other in others:  # noqa: SIM110 - a generator costs more than the rest
        if type(other) not in _PLAIN or other.dtype != dtype:
            return False
    return True


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The child at ``path``, or None if a module on the way does not have it."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def why_called(module: nn.Module, parts: Iterable[Part]) -> str | None:
    """Why a forward of ours calls one of these children, for `report`; None if it calls none."""
    for path, kinds in parts:
        child = child_at(module, path)
        if child is None:
            return f"{path} is not there"
        if not is_itself(child, kinds):
            kind = type(child)
            if OURS.get(kind, kind) not in kinds:
                return f"{path} is {kind.__module__}.{kind.__name__}"
            return f"{path} has hooks or a forward of its own"
        weight = getattr(child, "weight", None)
        if weight is not None and type(weight) not in _PLAIN:
            return f"{path}.weight is {type(weight).__name__}"
    return None
