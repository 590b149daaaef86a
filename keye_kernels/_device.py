"""What a launch configuration may depend on beside shapes: the device's capability and size."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Compute ``capability`` (major, minor) and number of multiprocessors."""

    capability: tuple[int, int]
    num_sms: int


# Answers for tensors that are on no GPU: under Triton's interpreter, and where kernels are
# compiled for a GPU that is not here, which sets it to that GPU.
elsewhere = Device((9, 0), 132)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """Facts about the device of ``tensor``, read once per device."""
    return _cuda_device(tensor.get_device()) if tensor.is_cuda else elsewhere
