"""What a run works with: the cache, the buffers of its steps, and the steps captured from these.

A captured step holds addresses: of the weights, the cache's pages and the buffers. So a `Runner` is
all of them together, and a model keeps an idle one from run to run.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import nn

from keye_kernels import backends
from keye_model.engine.cuda_graph import StepGraphs, padded_rows, why_no_graphs
from keye_model.engine.decode_batch import DecodeBatch
from keye_model.engine.vision_batch import VisionBatch
from keye_model.network.cache import PAGE_SIZE, PagedCache
from keye_model.network.features import Encode
from keye_model.network.model import KeyeModel
from keye_model.network.vision import KeyeVisionModel

# Tokens in the cache of a kept runner: 1.2 GB at the 8B model's widths. A run that needs more gets
# a runner of its own, whose graphs go with it: such a run is long enough to capture some.
KEPT_TOKENS = 8192


@dataclass(frozen=True)
class Runner:
    """Cache, buffers and captured steps of one run.

    Attributes:
        vision: Buffers for small images; None on a CPU, where padding is only work.
        graphs: None: steps are launched one by one. On a GPU they have the same padding, so that
            their results are the same to the last bit.
        identity: What captured steps depend on beside these: weights and kernels. PyTorch's
            settings for matrix products are taken to stay as they are.
    """

    cache: PagedCache
    batch: DecodeBatch
    vision: VisionBatch | None
    graphs: StepGraphs | None
    identity: tuple

    @classmethod
    def new(
        cls,
        model: KeyeModel,
        lm_head: nn.Module,
        num_pages: int,
        graphs: StepGraphs | None = None,
        identity: tuple = (),
    ) -> Runner:
        """One with an empty cache."""
        weight, text = lm_head.weight, model.config.text_config
        cache = PagedCache(text, num_pages, dtype=weight.dtype, device=weight.device)
        batch = DecodeBatch(cache, text.max_position_embeddings, weight.shape[0])
        padded = graphs is not None or weight.device.type == "cuda"
        vision = VisionBatch(model.visual, graphs) if padded else None
        return cls(cache, batch, vision, graphs, identity)

    @property
    def encode(self) -> Encode:
        """How the tower runs: on the buffers for small images where there are any."""
        return KeyeVisionModel.encode if self.vision is None else self.vision.run

    def step(self, model: KeyeModel, lm_head: nn.Module, num_rows: int, longest: int) -> None:
        """One token more for the first rows; `longest`: tokens of the longest, with the new one."""
        if self.vision is not None:  # on a GPU, with and without graphs
            num_rows = padded_rows(num_rows)
        capacity, penalised = self.batch.capacity(longest), self.batch.penalised
        options = {"num_rows": num_rows, "capacity": capacity, "penalised": penalised}
        step = partial(self.batch.step, model, lm_head, **options)
        if self.graphs is None:
            step()
        else:
            self.graphs.run(("decode", *options.values()), step)


class Runners:
    """Gives a model's runs what they work with, and keeps one between them for its graphs.

    Runs of several threads may share it: who finds no idle runner makes one.
    """

    def __init__(self) -> None:
        self._idle: deque[Runner] = deque(maxlen=1)  # pop and append are atomic

    def __reduce__(self) -> tuple:
        return Runners, ()  # a copy of the model captures its own

    @property
    def idle_bytes(self) -> int:
        """Of the cache that waits for the next run, which a run that needs more gives up."""
        return sum(runner.cache.num_bytes for runner in list(self._idle))

    def take(self, model: KeyeModel, lm_head: nn.Module, num_pages: int, max_pages: int) -> Runner:
        """A runner for one run, whose cache is empty; with graphs where steps can be captured.

        Args:
            model, lm_head: Whose steps it will run.
            num_pages: That the run needs.
            max_pages: That there may be.
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
            return Runner.new(model, lm_head, num_pages)
        num_pages = max(num_pages, min(KEPT_TOKENS // PAGE_SIZE, max_pages))
        return Runner.new(model, lm_head, num_pages, StepGraphs(device), identity)

    def _pop(self) -> Runner | None:
        with suppress(IndexError):
            return self._idle.pop()
        return None

    def keep(self, runner: Runner) -> None:
        """Take back a runner whose cache is empty again."""
        if runner.graphs is not None and runner.cache.num_pages <= KEPT_TOKENS // PAGE_SIZE:
            self._idle.append(runner)


def _identity(model: KeyeModel, lm_head: nn.Module) -> tuple:
    weights = (*model.parameters(), *lm_head.parameters())
    served = backends(lm_head.weight.device.type)
    kernels = tuple((op, by.backend) for op, by in served.items())
    return kernels, tuple((weight.data_ptr(), weight.dtype) for weight in weights)
