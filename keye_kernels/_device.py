"""The GPU facts that launch configurations depend on: compute capability, multiprocessors."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Compute ``capability`` (major, minor) and number of multiprocessors."""

    capability: tuple[int, int]
    num_sms: int


# The device of tensors that are on no GPU: in Triton's interpreter, and when kernels are compiled
# for an absent GPU, where the caller sets this to that GPU.
elsewhere = Device((9, 0), 132)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """The ``Device`` of ``tensor``; a GPU's properties are read once."""
    return _cuda_device(tensor.get_device()) if tensor.is_cuda else elsewhere
