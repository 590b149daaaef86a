"""The tower's layers for few patches, on buffers that never move.

Rows and segments are padded to few sizes, so a captured pass can be replayed for images of other
sizes. The padding is an attention segment of its own, so it changes no patch; only a GEMM may round
differently for another number of rows. Captured and launched passes have the same number of rows.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from keye_model.engine.cuda_graph import CudaGraphs, padded_rows
from keye_model.inputs.request import Grid, num_patches
from keye_model.network.upload import upload
from keye_model.network.vision import KeyeVisionModel, VisionLayout, segments_of

# Larger calls are not captured: their arithmetic, 2 ms or more on an H200, can hide the launches.
MAX_PATCHES = 2048
_MIN_PATCHES = 64
_MAX_SEGMENTS = 64  # including that of the padding


class VisionBatch:
    """Buffers for the patches of small images, with padding after them.

    Args:
        visual: Gives the width, dtype and device of the buffers.
        graphs: Captures and replays the passes. None: they are launched, with the same padding.
    """

    def __init__(self, visual: KeyeVisionModel, graphs: CudaGraphs | None = None) -> None:
        weight = visual.post_layernorm.weight
        like = {"dtype": weight.dtype, "device": weight.device}
        self._x, self._residual = torch.zeros(2, MAX_PATCHES, weight.shape[0], **like)
        self._positions = torch.zeros(MAX_PATCHES, 2, dtype=torch.int64, device=weight.device)
        self._cu_seqlens = torch.zeros(_MAX_SEGMENTS + 1, dtype=torch.int32, device=weight.device)
        self._graphs = graphs

    def run(
        self, visual: KeyeVisionModel, pixel_values: torch.Tensor, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute ``visual.encode(pixel_values, grid)``; the next call overwrites the result.

        More patches or segments than the buffers hold go to ``visual.encode`` itself.
        """
        count = num_patches(grid)
        num_segments = len(grid) if visual.joint_video_attention else sum(t for t, _, _ in grid)
        num_segments = padded_rows(num_segments + 1)
        if count > MAX_PATCHES or num_segments > _MAX_SEGMENTS:
            return visual.encode(pixel_values, grid)
        positions, lengths = segments_of(grid, visual.joint_video_attention)
        num_rows = max(padded_rows(count), _MIN_PATCHES)
        cu_seqlens = np.full(num_segments + 1, num_rows, np.int32)
        cu_seqlens[0] = 0
        cu_seqlens[1 : len(lengths) + 1] = np.cumsum(lengths)

        device = self._x.device
        patches = slice(count)
        visual.embed(pixel_values, grid, out=self._x[patches])
        self._positions[patches].copy_(upload(torch.from_numpy(positions), device))
        self._cu_seqlens[: len(cu_seqlens)].copy_(upload(torch.from_numpy(cu_seqlens), device))
        forward = partial(self._forward, visual, num_rows, num_segments)
        if self._graphs is None:
            forward()
        else:
            self._graphs.run(("vision", num_rows, num_segments), forward)
        return self._x[patches], self._residual[patches]

    def _forward(self, visual: KeyeVisionModel, num_rows: int, num_segments: int) -> None:
        rows = slice(num_rows)
        # No schedule: its number of tiles depends on the lengths, so it cannot be captured.
        layout = VisionLayout(
            self._positions[rows], self._cu_seqlens[: num_segments + 1], num_rows, None
        )
        branch, residual = visual.run_layers(self._x[rows], layout)
        self._x[rows].copy_(branch)
        self._residual[rows].copy_(residual)
