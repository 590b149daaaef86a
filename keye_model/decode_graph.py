"""Decode steps as CUDA graphs: captured when they come up again, replayed from then on.

A graph holds addresses: of the weights, the cache's pages and the batch's buffers. A `Decoder` is
those three together with the graphs; a model keeps an idle one from run to run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from keye_kernels import backends
from keye_model.cache import PAGE_SIZE, PagedCache
from keye_model.decode_batch import DecodeBatch
from keye_model.model import KeyeModel

# Tokens in the cache of a kept decoder: 1.2 GB at the 8B model's widths. A run that needs more gets
# a decoder of its own, whose graphs go with it: such a run is long enough to capture some.
KEPT_TOKENS = 8192

# The graphs of a decoder share memory for their tensors; what each adds is a list of some 400
# launches, on host and device. 13 row counts at two capacities are 26.
_MAX_GRAPHS = 26

# Their definitions read slots, lengths and parameters back, which a graph cannot.
_READ_BACK = ("qk_norm_mrope_store", "paged_decode_attention", "sample")

Step = Callable[[], None]

_capturing = threading.Lock()


def why_no_graphs(device: torch.device) -> str:
    """Why decode steps on `device` are not captured, given the backend in force; "" if they are."""
    if device.type != "cuda":
        return "needs a GPU"
    served = backends(device.type)
    read_back = [op for op in _READ_BACK if served[op].backend in (None, "reference")]
    return f"no kernel serves {', '.join(read_back)}" if read_back else ""


def padded_rows(num_rows: int) -> int:
    """Rows of the captured step that serves so many: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ….

    Less than half of them is padding, and less than a third above 16. While a step waits for the
    weights' bytes, up to about 190 rows, more rows take little more time.
    """
    power = 1 << (num_rows - 1).bit_length()
    middle = power * 3 // 4
    return middle if power >= 32 and num_rows <= middle else power


class CudaRecorder:
    """Runs and captures steps on a stream of its own.

    Its graphs share one pool of memory: they are replayed one at a time, and none leaves a result
    there.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Step) -> None:
        """Run a step where it will be captured: kernels are compiled and workspaces set up."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def capture(self, step: Step) -> torch.cuda.CUDAGraph:
        """The step's launches, not run."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like on their streams, but for a capture of their own.
        mode = {"capture_error_mode": "thread_local"}
        with _capturing, torch.cuda.graph(graph, self._pool, self._stream, **mode):
            step()
        return graph


class StepGraphs:
    """The captured steps of one decode batch; the least recently used one goes first."""

    def __init__(self, device: torch.device) -> None:
        self._recorder = CudaRecorder(device)
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()

    def run(self, key: Hashable, step: Step) -> None:
        """Run a step; `key` is all that its launches depend on.

        The first time as it is, since it must have run once before it can be captured, and many
        come up only once.
        """
        graph = None
        if key in self._graphs:
            graph = self._graphs[key] or self._recorder.capture(step)
            graph.replay()
        else:
            self._recorder.run(step)
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)


@dataclass(frozen=True)
class Decoder:
    """Cache, batch and captured steps of one run.

    Attributes:
        graphs: None: steps are launched one by one, without padding.
        identity: What captured steps depend on beside these: weights and kernels.
    """

    cache: PagedCache
    batch: DecodeBatch
    graphs: StepGraphs | None = None
    identity: tuple = ()

    @classmethod
    def launched(cls, model: KeyeModel, lm_head: nn.Module, num_pages: int) -> Decoder:
        """One without graphs."""
        weight, text = lm_head.weight, model.config.text_config
        cache = PagedCache(text, num_pages, dtype=weight.dtype, device=weight.device)
        return cls(cache, DecodeBatch(cache, text.max_position_embeddings, weight.shape[0]))

    def step(self, model: KeyeModel, lm_head: nn.Module, num_rows: int, longest: int) -> None:
        """One token more for the first rows; `longest`: tokens of the longest, with the new one."""
        padded = num_rows if self.graphs is None else padded_rows(num_rows)
        capacity, penalised = self.batch.capacity(longest), self.batch.penalised
        options = {"num_rows": padded, "capacity": capacity, "penalised": penalised}
        step = partial(self.batch.step, model, lm_head, **options)
        if self.graphs is None:
            step()
        else:
            self.graphs.run(tuple(options.values()), step)


class Decoders:
    """Gives a model's runs their decoders, and keeps one between them for its graphs.

    Runs of several threads may share it: who finds no idle decoder makes one.
    """

    def __init__(self) -> None:
        self._idle: deque[Decoder] = deque(maxlen=1)  # pop and append are atomic

    def __reduce__(self) -> tuple:
        return Decoders, ()  # a copy of the model captures its own

    @property
    def idle_bytes(self) -> int:
        """Of the cache that waits for the next run, which a run that needs more gives up."""
        return sum(decoder.cache.num_bytes for decoder in list(self._idle))

    def take(self, model: KeyeModel, lm_head: nn.Module, num_pages: int, max_pages: int) -> Decoder:
        """A decoder for one run, whose cache is empty; with graphs where steps can be captured.

        Args:
            model, lm_head: Whose steps it will run.
            num_pages: That the run needs.
            max_pages: That there may be.
        """
        device = lm_head.weight.device
        capture = not why_no_graphs(device)
        identity = _identity(model, lm_head) if capture else ()
        with suppress(IndexError):
            idle = self._idle.pop()
            fits = num_pages <= idle.cache.num_pages <= max_pages
            if capture and fits and idle.identity == identity:
                return idle
            del idle  # its memory is needed
        if not capture:
            return Decoder.launched(model, lm_head, num_pages)
        num_pages = max(num_pages, min(KEPT_TOKENS // PAGE_SIZE, max_pages))
        launched = Decoder.launched(model, lm_head, num_pages)
        return replace(launched, graphs=StepGraphs(device), identity=identity)

    def keep(self, decoder: Decoder) -> None:
        """Take back a decoder whose cache is empty again."""
        if decoder.graphs is not None and decoder.cache.num_pages <= KEPT_TOKENS // PAGE_SIZE:
            self._idle.append(decoder)


def _identity(model: KeyeModel, lm_head: nn.Module) -> tuple:
    weights = (*model.language_model.parameters(), *lm_head.parameters())
    served = backends(lm_head.weight.device.type)
    kernels = tuple((op, by.backend) for op, by in served.items())
    return kernels, tuple((weight.data_ptr(), weight.dtype) for weight in weights)
