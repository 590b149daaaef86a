"""Another forward for single modules, by another class.

The class is a subclass that is made here and looks like the one before: name, module, `isinstance`.
As the forward is the class's and not the instance's, nothing is bound: copies and replicas run on
their own weights. A pickle names the class before and is given ours again when it is loaded. What
is built by calling the class is the library's: only `apply` changes a module.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from keye_kernels.integrations._guard import FORWARDS, OURS


def subclass(base: type, forward: Callable[..., Any], remake: tuple[Callable, ...]) -> type:
    """A class like ``base`` with this forward. ``remake``: a function and its arguments, by which a
    pickle gets the class again."""

    def reduce(self: nn.Module, protocol: int) -> tuple:
        _, _, *state = base.__reduce_ex__(self, protocol)
        return (_blank, remake, *state)

    def new(made: type, *args: Any, **kwargs: Any) -> nn.Module:
        if made is cls and (args or kwargs):
            return base(*args, **kwargs)
        return base.__new__(made)

    body = {
        "__new__": functools.update_wrapper(new, base.__init__),  # for its signature
        "forward": functools.update_wrapper(forward, base.forward),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    cls = type(base)(base.__name__, (base,), body)
    OURS[cls], FORWARDS[cls] = base, cls.forward
    return cls


def _blank(make: Callable[..., type], *args: Any) -> nn.Module:
    cls = make(*args)
    return cls.__new__(cls)


def put(module: nn.Module, cls: type) -> None:
    """Give the module our class."""
    # transformers 4.57 leaves the forward of the class on a module whose outputs it recorded.
    vars(module).pop("forward", None)
    module.__class__ = cls


def take_back(module: nn.Module) -> None:
    """Give the module the class it had, and to accelerate's hooks the forward they had wrapped."""
    cls = type(module)
    base = module.__class__ = OURS[cls]
    own = vars(module)
    if getattr(own.get("forward"), "__func__", None) is cls.forward:
        del own["forward"]
    if getattr(own.get("_old_forward"), "__func__", None) is cls.forward:
        own["_old_forward"] = MethodType(base.forward, module)
