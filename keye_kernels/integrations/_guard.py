"""Whether a forward of ours may read the weights of a child in the place of calling it.

It may where a call would run the forward of the class we know and nothing else. Adapters, hooks,
quantised weights, offloading and parametrisations make a call do more; they come and go after
`apply`, so each call asks. What is read per child is what `torch.nn.Module.__call__` would read.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from keye_kernels._checks import FLOAT_DTYPES

FORWARDS: dict[type, Callable[..., Any]] = {}  # of each class we know: the library's, or ours


def known(*kinds: type) -> frozenset[type]:
    """These classes; from now on another forward of theirs is noticed."""
    for kind in kinds:
        FORWARDS.setdefault(kind, kind.forward)
    return frozenset(kinds)


LINEAR = known(nn.Linear)
OURS: dict[type, type] = {}  # a class of `_subclass.subclass` -> the library's class it replaces
_PLAIN = (torch.Tensor, nn.Parameter)  # replicas of DataParallel hold the first

Part = tuple[str, Collection[type]]  # the path of a child, and the classes we know there


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, as `torch.nn.Module.__call__` asks it."""
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
    """Whether our ops take x with the others as they are.

    All must be plain tensors of one dtype that our ops know, outside of autocast, which is asked as
    PyTorch's own fused layers ask it.
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
    """The child, or None where another module without it is on the way there."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def why_called(module: nn.Module, parts: Iterable[Part]) -> str | None:
    """Why a forward of ours calls one of these children, for a report; None where it calls none."""
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
