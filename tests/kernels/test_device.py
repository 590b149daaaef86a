"""What launch configurations are told about the device."""

from types import SimpleNamespace

import torch

from keye_kernels import _device


def test_elsewhere_is_one_hopper():
    assert _device.device_of(torch.empty(1)) == _device.Device((9, 0), 132)
    assert _device.device_of(torch.empty(1, device="meta")) == _device.elsewhere


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []

    def properties(index):
        asked.append(index)
        return SimpleNamespace(major=8, minor=6 + index, multi_processor_count=84)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    _device._cuda_device.cache_clear()
    tensors = [SimpleNamespace(is_cuda=True, get_device=lambda i=i: i) for i in (0, 1, 0)]
    found = [_device.device_of(tensor) for tensor in tensors]
    _device._cuda_device.cache_clear()
    assert found == [_device.Device((8, 6 + i), 84) for i in (0, 1, 0)]
    assert asked == [0, 1]
