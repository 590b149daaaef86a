"""Replace the forward of single modules by giving them a subclass made here.

The subclass looks like its base: same name, module and `isinstance`. The forward belongs to the
class, so it is not bound to an instance: copies and replicas run on their own weights. A pickle
stores how to make the subclass again. Calling the subclass builds an instance of the base: only
`apply` changes a module.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from keye_kernels.integrations._guard import FORWARDS, OURS


def subclass(base: type, forward: Callable[..., Any], remake: tuple[Callable, ...]) -> type:
    """A subclass of ``base`` with this forward. ``remake``: a function and its arguments, which a
    pickle calls to get the class again."""

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
    # transformers 4.57 sets the class's forward on modules whose outputs it recorded.
    vars(module).pop("forward", None)
    module.__class__ = cls


def take_back(module: nn.Module) -> None:
    """Give the module its class back, and accelerate's hooks the forward that they wrapped."""
    cls = type(module)
    base = module.__class__ = OURS[cls]
    own = vars(module)
    if getattr(own.get("forward"), "__func__", None) is cls.forward:
        del own["forward"]
    if getattr(own.get("_old_forward"), "__func__", None) is cls.forward:
        own["_old_forward"] = MethodType(base.forward, module)
