"""What a prompt shows: its pictures and videos, the tokens they replace, and the content of pages.

Two prompts that begin with the same ids and the same pictures have the same keys and values there,
since attention is causal and a token's position depends on what comes before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from keye_model.checkpoint.config import KeyeConfig
from keye_model.inputs.positions import Placed, place
from keye_model.inputs.request import GridTHW, Request, check_ids, num_patches


@dataclass(frozen=True, eq=False)
class VisionItem:
    """One row of a request's grids: an image, a video, or a run of frames of one.

    Attributes:
        key: Equal for equal patches in an equal grid.
        seconds: Between frames; 0 for an image.
        grid: (frames, rows, columns) in patches.
        index: [num_tokens], int64: the tokens of the prompt that its features replace.
        pixels, first: Its patches are those of ``pixels`` from ``first`` on.
    """

    key: Hashable
    seconds: float
    grid: GridTHW
    index: np.ndarray
    pixels: torch.Tensor
    first: int


@dataclass(frozen=True, slots=True)
class PageContent:
    """What distinguishes a page of the cache from others after equal pages.

    Attributes:
        ids: Of its tokens, as bytes.
        shown: (key, seconds) of the items that have tokens in it or on both sides of it.
    """

    ids: bytes
    shown: tuple[tuple[Hashable, float], ...]


class PromptInputs:
    """A request, its tokens' positions and its pictures.

    Args:
        request: Its tensors stay where they are.
        config: Of the model.
        page_size: Tokens in a page.
        index: Of the request, for errors.
        hashed: Whether equal patches give items of equal keys; otherwise no two keys are equal.

    Attributes:
        ids: [num_tokens], int64.
        positions: [3, num_tokens], int64: (t, h, w).
        next_position: That of the first generated token.
        answer: Generated tokens; whoever generates them adds them.
        items: Images and videos, in the order of their tokens; may be emptied when they are done.

    Raises:
        ValueError: The prompt fills the context, an id is outside the vocabulary, placeholders and
            grids disagree, or patches have another size than the model's.
    """

    def __init__(
        self, request: Request, config: KeyeConfig, page_size: int, *, index: int, hashed: bool
    ) -> None:
        self.ids, self.answer, self._page_size = request.input_ids.numpy(), [], page_size
        context = config.text_config.max_position_embeddings
        if len(self.ids) >= context:
            raise ValueError(
                f"input_ids of request {index} must be shorter than the context of {context} "
                f"tokens, got {len(self.ids)}; fewer or smaller images and frames make it shorter "
                "(max_pixels, max_frames, fps)"
            )
        check_ids(request.input_ids, config)
        grids = request.image_grid_thw, request.video_grid_thw, request.second_per_grid_ts
        placed = place(self.ids, *grids, config)
        self.positions, self.next_position = placed.positions, placed.next_position
        self.items = _vision_items(request, placed, config, hashed)
        self.items.sort(key=lambda one: one.index[0])
        self._firsts = [int(one.index[0]) for one in self.items]
        self._lasts = list(accumulate((int(one.index[-1]) for one in self.items), max))
        self._shown = [(one.key, one.seconds) for one in self.items]

    def page(self, index: int) -> PageContent:
        """What a full page of the prompt and its answer holds."""
        first, end = index * self._page_size, (index + 1) * self._page_size
        ids = self.ids
        if end > len(ids):
            ids = np.append(ids, np.array(self.answer, np.int64))
        shown = slice(bisect_left(self._lasts, first), bisect_left(self._firsts, end))
        return PageContent(ids[first:end].tobytes(), tuple(self._shown[shown]))

    def shareable(self) -> Iterator[PageContent]:
        """The prompt's full pages, without that of its last token, which is always computed."""
        return map(self.page, range((len(self.ids) - 1) // self._page_size))


def _vision_items(
    request: Request, placed: Placed, config: KeyeConfig, hashed: bool
) -> list[VisionItem]:
    merge, size = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    digests = request.digests() if hashed else (None, None)
    seconds = request.second_per_grid_ts or (1.0,) * len(request.video_grid_thw)
    items = []
    for name, pixels, grid, index, digest, times in (
        (
            "pixel_values", request.pixel_values, request.image_grid_thw, placed.image_index,
            digests[0], (0.0,) * len(request.image_grid_thw),
        ),
        (
            "pixel_values_videos", request.pixel_values_videos, request.video_grid_thw,
            placed.video_index, digests[1], seconds,
        ),
    ):  # fmt: skip
        if grid and pixels.shape[2:] != (size, size):
            raise ValueError(
                f"{name} must hold patches of {size} x {size}, got shape {tuple(pixels.shape)}"
            )
        first = token = 0
        for k, row in enumerate(grid):
            key = (digest[k], row) if hashed else object()
            patches = num_patches((row,))
            after = token + patches // merge**2
            items.append(VisionItem(key, times[k], row, index[token:after], pixels, first))
            first, token = first + patches, after
    return items
