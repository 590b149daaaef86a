"""What a processor call returns: a dict of tensors that moves as one."""

from __future__ import annotations

from typing import Any

import torch


class BatchFeature(dict):
    """A dict whose entries are also attributes, shaped as Hugging Face users expect."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"BatchFeature has no entry {name!r}, only {', '.join(self) or 'none at all'}"
            ) from None

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> BatchFeature:
        """Move every tensor; returns self.

        Args:
            device: Where to. A dtype may stand here alone: ``inputs.to(torch.bfloat16)``.
            dtype: Floating type of the pixels. Ids, masks, grids and times keep theirs: seconds
                per frame rounded to bfloat16 would shift a video's positions.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                pixels = name.startswith("pixel_values") and value.is_floating_point()
                self[name] = value.to(device=device, dtype=dtype if pixels else None)
        return self
