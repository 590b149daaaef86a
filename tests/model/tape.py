"""Tapes in the place of CUDA graphs.

A tape holds the ops of a step with the very tensors they had, and runs those again. What a step
takes from the host is frozen at its capture, as in a graph, and what it gets from a tensor that has
moved is stale.
"""

from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from keye_kernels import _backends


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.ran = [], True  # a capture here runs the step; a graph's does not

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def record(self, step):
        with self:
            step()

    def replay(self):
        if self.ran:
            self.ran = False
            return
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)


class LaunchTape(Tape):
    """Holds what a graph does: PyTorch's kernels and the launches of Triton's, with their grids.

    Nothing of our ops runs again but these, and memory that a step allocates comes back poisoned.
    What a CPU tensor cannot show, `tolist()` of a launcher, shows on tensors without values, as
    when kernels are compiled ahead of time.

    Attributes:
        kernels: Names of Triton's, in order.
    """

    def __init__(self):
        super().__init__()
        self.kernels = []

    def record(self, step):
        launch = GridExecutor.__call__

        def recorded(kernel, *args, **kwargs):
            with _disable_current_modes():
                launch(kernel, *args, **kwargs)
            self.calls.append((launch, (kernel, *args), kwargs, None))
            self.kernels.append(kernel.fn.__name__)

        with mock.patch.object(GridExecutor, "__call__", recorded):
            super().record(step)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name != "aten::_local_scalar_dense", "a graph cannot read back"
        if func.namespace == "keye":
            with self:
                return _backends.find(name.partition("::")[2], "cuda")(*args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if name in _ALLOCATE:
            self.calls[-1] = (_poison, (out,), {}, None)
        return out


_ALLOCATE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}


def _poison(tensor):
    tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**7))


class Recorder:
    """Records tapes, and counts them."""

    tape = Tape
    captures = 0

    def __init__(self, device):
        pass

    def capture(self, step):
        Recorder.captures += 1
        tape = self.tape()
        tape.record(step)
        return tape


class OnlyMeta(TorchDispatchMode):
    """Refuses ops on tensors that have values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, Tensor) or x.is_meta, f"{func} on {x.device}"
        return out
