"""Memory of a run: the cache, the buffers of its passes, and the graphs captured on them.

A graph stores the addresses of the weights, the cache's pages and the buffers. So a `Workspace`
holds all of these together, and a model keeps one idle workspace between runs.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import nn

from keye_kernels import backends
from keye_model.engine.cuda_graph import CudaGraphs, padded_rows, why_no_graphs
from keye_model.engine.decode_batch import DecodeBatch
from keye_model.engine.vision_batch import VisionBatch
from keye_model.network.cache import PAGE_SIZE, PagedCache
from keye_model.network.features import Encode
from keye_model.network.model import KeyeModel
from keye_model.network.vision import KeyeVisionModel

# Tokens in the cache of the kept workspace: 1.2 GB at the 8B model's widths. A run that needs more
# gets its own workspace and drops it with its graphs: it runs long enough to pay for new ones.
KEPT_TOKENS = 8192


@dataclass(frozen=True)
class Workspace:
    """Cache, buffers and captured passes of one run.

    Attributes:
        cache: Keys and values of the run's sequences.
        batch: Buffers of the decode step.
        vision: Buffers for small images; None on a CPU, where padding only costs time.
        graphs: Captured passes. None: kernels are launched one by one, on a GPU with the same
            padding, so both give the same bits.
        identity: The weights and kernels that the graphs were captured with. PyTorch's settings for
            matrix products are not part of it: they must not change.
    """

    cache: PagedCache
    batch: DecodeBatch
    vision: VisionBatch | None
    graphs: CudaGraphs | None
    identity: tuple

    @classmethod
    def new(
        cls,
        model: KeyeModel,
        lm_head: nn.Module,
        num_pages: int,
        graphs: CudaGraphs | None = None,
        identity: tuple = (),
    ) -> Workspace:
        """A workspace with an empty cache."""
        weight, text = lm_head.weight, model.config.text_config
        cache = PagedCache(text, num_pages, dtype=weight.dtype, device=weight.device)
        batch = DecodeBatch(cache, text.max_position_embeddings, weight.shape[0])
        padded = graphs is not None or weight.device.type == "cuda"
        vision = VisionBatch(model.visual, graphs) if padded else None
        return cls(cache, batch, vision, graphs, identity)

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


class WorkspacePool:
    """Gives each run of a model a workspace, and keeps one idle between runs for its graphs.

    Several threads may share it: a run that finds no idle workspace makes one.
    """

    def __init__(self) -> None:
        self._idle: deque[Workspace] = deque(maxlen=1)  # pop and append are atomic

    def __reduce__(self) -> tuple:
        return WorkspacePool, ()  # a copy of the model captures its own graphs

    @property
    def idle_bytes(self) -> int:
        """Bytes of the idle cache, freed when a run needs more."""
        return sum(workspace.cache.num_bytes for workspace in list(self._idle))

    def take(
        self, model: KeyeModel, lm_head: nn.Module, num_pages: int, max_pages: int
    ) -> Workspace:
        """Take a workspace with an empty cache; it has graphs if passes can be captured.

        Args:
            model, lm_head: The modules that the run calls.
            num_pages: Pages that the run needs.
            max_pages: Pages that the cache may have.
        """
        device = lm_head.weight.device
        capture = not why_no_graphs(device)
        identity = _identity(model, lm_head) if capture else ()
        if idle := self._pop():
            fits = num_pages <= idle.cache.num_pages <= max_pages
            if capture and fits and idle.identity == identity:
                return idle
            del idle  # its memory is needed
        if not capture:
            return Workspace.new(model, lm_head, num_pages)
        num_pages = max(num_pages, min(KEPT_TOKENS // PAGE_SIZE, max_pages))
        return Workspace.new(model, lm_head, num_pages, CudaGraphs(device), identity)

    def _pop(self) -> Workspace | None:
        with suppress(IndexError):
            return self._idle.pop()
        return None

    def keep(self, workspace: Workspace) -> None:
        """Keep a workspace, whose cache is empty again, for the next run."""
        if workspace.graphs is not None and workspace.cache.num_pages <= KEPT_TOKENS // PAGE_SIZE:
            self._idle.append(workspace)


def _identity(model: KeyeModel, lm_head: nn.Module) -> tuple:
    weights = (*model.parameters(), *lm_head.parameters())
    served = backends(lm_head.weight.device.type)
    kernels = tuple((op, by.backend) for op, by in served.items())
    return kernels, tuple((weight.data_ptr(), weight.dtype) for weight in weights)
