"""The embedded tokens of prompts, with vision features in the place of their placeholders.

Features come from the vision cache or from the tower. Equal pictures are computed once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keye_model.inputs.content import PromptInputs, VisionItem
from keye_model.inputs.request import num_patches
from keye_model.network.features import Encode, vision_features
from keye_model.network.model import KeyeModel
from keye_model.network.upload import upload
from keye_model.network.vision_cache import VisionCache


@dataclass(frozen=True)
class _Use:
    """An item of a prompt, the row of the prompt's first new token, and that token's index."""

    prompt: int
    item: VisionItem
    row: int
    first: int


class Embedding:
    """Prompts on their way to the decoder.

    Args:
        model: Gives table, tower and projector.
        prompts: Their ids, and their pictures and videos.
        num_cached: The first tokens of each that are not embedded.
        cache: Of features.

    Attributes:
        hidden: [num_tokens, hidden_size], the new tokens, packed; complete after `calls`.
        starts: The first row of each prompt.
        num_hits: Items whose features were in the cache.
    """

    def __init__(
        self,
        model: KeyeModel,
        prompts: Sequence[PromptInputs],
        num_cached: Sequence[int],
        cache: VisionCache,
    ) -> None:
        self._model, self._cache = model, cache
        new = [one.ids[first:] for one, first in zip(prompts, num_cached, strict=True)]
        self.starts = np.cumsum([0, *map(len, new[:-1])]).tolist()
        ids = upload(torch.from_numpy(np.concatenate(new)), model.device)
        self.hidden = model.language_model.embed_tokens(ids)
        self._done, self.num_hits = [0] * len(prompts), 0
        uses: dict[Hashable, list[_Use]] = {}
        for k, prompt in enumerate(prompts):
            for item in prompt.items:
                if item.index[-1] < num_cached[k]:
                    self._done[k] += len(item.index)
                else:
                    use = _Use(k, item, self.starts[k], num_cached[k])
                    uses.setdefault(item.key, []).append(use)
        self._missing: list[list[_Use]] = []
        for key, same in uses.items():
            features = cache.get(key)
            if features is None:
                self._missing.append(same)
            else:
                self.num_hits += 1
                self._write(same, 0, features)

    def calls(self, max_patches: int, encode: Encode) -> Iterator[None]:
        """Compute the missing features; yields after each call of the tower.

        Args:
            max_patches, encode: As for `vision_features`.
        """
        kinds: dict[tuple, list[list[_Use]]] = {}
        for same in self._missing:
            pixels = same[0].item.pixels
            kinds.setdefault((pixels.dtype, pixels.device), []).append(same)
        self._missing = []
        for alike in kinds.values():
            yield from self._encode(alike, max_patches, encode)

    def take_done(self) -> list[int]:
        """Tokens of each prompt's pictures that became complete, or are not needed, since then."""
        done, self._done = self._done, [0] * len(self._done)
        return done

    def _encode(
        self, missing: list[list[_Use]], max_patches: int, encode: Encode
    ) -> Iterator[None]:
        visual, projector = self._model.visual, self._model.mlp_AR
        items = [same[0].item for same in missing]
        grid = tuple(item.grid for item in items)
        width = self.hidden.shape[1] * self.hidden.element_size()
        pieces: list[torch.Tensor] = []  # of the current item's features, if they are to be kept
        current = done = 0
        for part in vision_features(
            visual, projector, _join(items), grid, max_patches=max_patches, encode=encode
        ):
            first = 0
            while first < len(part):
                same, item = missing[current], items[current]
                count = min(len(item.index) - done, len(part) - first)
                piece = part[first : first + count]
                self._write(same, done, piece)
                first, done = first + count, done + count
                if self._cache.keeps(len(item.index) * width):
                    pieces.append(piece.clone())  # a view would hold the whole part
                if done == len(item.index):
                    if pieces:
                        self._cache.put(
                            item.key, pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                        )
                    pieces, current, done = [], current + 1, 0
            yield

    def _write(self, same: list[_Use], first: int, features: torch.Tensor) -> None:
        """Put features, of which the first is that of an item's token ``first``, where they go."""
        for use in same:
            self._done[use.prompt] += len(features)
            index = use.item.index[first : first + len(features)]
            skipped = int(np.searchsorted(index, use.first))
            rows = torch.from_numpy(index[skipped:] - use.first + use.row)
            if len(rows):
                self.hidden.index_copy_(0, upload(rows, self.hidden.device), features[skipped:])


def _join(items: list[VisionItem]) -> torch.Tensor:
    """The items' patches; not copied if they lie one after another in one tensor."""
    runs: list[tuple[torch.Tensor, int, int]] = []
    for item in items:
        end = item.first + num_patches((item.grid,))
        if runs and runs[-1][0] is item.pixels and runs[-1][2] == item.first:
            runs[-1] = (item.pixels, runs[-1][1], end)
        else:
            runs.append((item.pixels, item.first, end))
    parts = [pixels[first:end] for pixels, first, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
