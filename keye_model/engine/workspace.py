"""Memory of an engine: the cache, the buffers of its passes, and the graphs captured on them.

A graph stores the addresses of weights, pages and buffers, so a `Workspace` holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from keye_model.engine.cuda_graph import CudaGraphs, padded_rows
from keye_model.engine.decode_batch import DecodeBatch
from keye_model.engine.vision_batch import VisionBatch
from keye_model.network.cache import PagedCache
from keye_model.network.features import Encode
from keye_model.network.model import KeyeModel
from keye_model.network.vision import KeyeVisionModel


@dataclass(frozen=True)
class Workspace:
    """Cache, buffers and captured passes of one engine.

    Attributes:
        cache: Keys and values of the sequences.
        batch: Buffers of the decode step.
        vision: Buffers for small images; None on a CPU, where padding only costs time.
        graphs: Captured passes. None: kernels are launched one by one, on a GPU with the same
            padding, so both give the same bits.
    """

    cache: PagedCache
    batch: DecodeBatch
    vision: VisionBatch | None
    graphs: CudaGraphs | None

    @classmethod
    def new(
        cls, model: KeyeModel, lm_head: nn.Module, num_pages: int, *, capture: bool = False
    ) -> Workspace:
        """A workspace with an empty cache; ``capture``: with graphs."""
        weight, text = lm_head.weight, model.config.text_config
        cache = PagedCache(text, num_pages, dtype=weight.dtype, device=weight.device)
        batch = DecodeBatch(cache, text.max_position_embeddings, weight.shape[0])
        graphs = CudaGraphs(weight.device) if capture else None
        padded = capture or weight.device.type == "cuda"
        vision = VisionBatch(model.visual, graphs) if padded else None
        return cls(cache, batch, vision, graphs)

    @property
    def encode(self) -> Encode:
        """The function that runs the tower: on the buffers for small images if there are any."""
        return KeyeVisionModel.encode if self.vision is None else self.vision.run

    def step(self, model: KeyeModel, lm_head: nn.Module, num_rows: int, longest: int) -> None:
        """Generate one token for each of the first ``num_rows`` sequences.

        Args:
            longest: Tokens of the longest sequence, the new one included.
        """
        if self.vision is not None:  # on a GPU, with and without graphs
            num_rows = padded_rows(num_rows)
        capacity, penalised = self.batch.capacity(longest), self.batch.penalised
        options = {"num_rows": num_rows, "capacity": capacity, "penalised": penalised}
        step = partial(self.batch.step, model, lm_head, **options)
        if self.graphs is None:
            step()
        else:
            self.graphs.run(("decode", *options.values()), step)
