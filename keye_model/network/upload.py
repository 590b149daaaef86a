"""Copies of host tensors to the device."""

from __future__ import annotations

import torch

_PINNED_BYTES = 64 << 20


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device`; to a GPU through pinned memory, without waiting for it.

    A long video is copied in pieces: pinned memory is scarce, and PyTorch keeps it for reuse.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)  # blocking: the host may read a copy from a GPU at once
    if tensor.nbytes <= _PINNED_BYTES:
        return tensor.pin_memory().to(device, non_blocking=True)
    uploaded = torch.empty_like(tensor, device=device)
    rows = max(_PINNED_BYTES // (tensor.nbytes // tensor.shape[0]), 1)
    for part, piece in zip(uploaded.split(rows), tensor.split(rows), strict=True):
        part.copy_(piece.pin_memory(), non_blocking=True)
    return uploaded
