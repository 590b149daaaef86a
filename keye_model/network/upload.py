"""Host tensors on their way to the device."""

from __future__ import annotations

import torch

_PINNED_BYTES = 64 << 20


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host values on `device`; to a GPU from pinned memory, without waiting for its queue.

    A long video goes piece by piece: pinned memory is scarce, and PyTorch keeps it for reuse.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)  # waits: the host may read what a GPU copies to it
    if tensor.nbytes <= _PINNED_BYTES:
        return tensor.pin_memory().to(device, non_blocking=True)
    uploaded = torch.empty_like(tensor, device=device)
    rows = max(_PINNED_BYTES // (tensor.nbytes // tensor.shape[0]), 1)
    for part, piece in zip(uploaded.split(rows), tensor.split(rows), strict=True):
        part.copy_(piece.pin_memory(), non_blocking=True)
    return uploaded
