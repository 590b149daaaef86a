"""Named ranges for profilers, put on from outside: what is measured holds no trace of them.

A dispatch mode sees every `keye::` op, hooks see every module that is a stage. Without the context
manager neither exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import nvtx
except ModuleNotFoundError:  # torch carries the same calls, where it is built for CUDA
    nvtx = None

_STAGES = ("visual", "mlp_AR", "language_model", "lm_head")


@contextmanager
def named(name: str) -> Iterator[None]:
    """One range: for NVTX, and for the torch profiler."""
    with torch.profiler.record_function(name):
        if nvtx is not None:
            nvtx.push_range(name)
        elif torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx is not None:
                nvtx.pop_range()
            elif torch.cuda.is_available():
                torch.cuda.nvtx.range_pop()


class _OpRanges(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "keye":
            return func(*args, **(kwargs or {}))
        with named(f"keye::{func._schema.name.removeprefix('keye::')}"):
            return func(*args, **(kwargs or {}))


@contextmanager
def ranges(*models: nn.Module) -> Iterator[None]:
    """A range around every op of keye_kernels, and around every stage and layer of `models`."""
    open_ranges: list[ExitStack] = []

    def enter(name: str):
        def hook(*_: object) -> None:
            stack = ExitStack()
            stack.enter_context(named(name))
            open_ranges.append(stack)

        return hook

    def leave(*_: object) -> None:
        open_ranges.pop().close()

    with ExitStack() as stack:
        for model in models:
            for name, module in model.named_modules():
                path = name.split(".")
                if path[-1] in _STAGES or (path[-1].isdigit() and path[-2] == "layers"):
                    label = path[-1] if path[-1] in _STAGES else f"layer {path[-1]}"
                    for handle in (
                        module.register_forward_pre_hook(enter(label)),
                        module.register_forward_hook(leave, always_call=True),
                    ):
                        stack.callback(handle.remove)
        stack.enter_context(_OpRanges())
        yield
