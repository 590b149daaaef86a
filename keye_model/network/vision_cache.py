"""Vision features by the content they were computed from, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch


class VisionCache:
    """Features of pictures and videos; the least recently used ones are dropped for new ones.

    Args:
        max_bytes: Of all features together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._features: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: Hashable) -> torch.Tensor | None:
        """[num_tokens, hidden_size]; None if they are not kept."""
        if key in self._features:
            self._features.move_to_end(key)
        return self._features.get(key)

    def keeps(self, num_bytes: int) -> bool:
        """Whether features of this size are kept at all."""
        return num_bytes <= self.max_bytes

    def put(self, key: Hashable, features: torch.Tensor) -> None:
        """Keep features that own their memory."""
        if key in self._features or not self.keeps(features.nbytes):
            return
        self._features[key] = features
        self.num_bytes += features.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= dropped.nbytes

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0
