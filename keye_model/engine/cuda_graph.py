"""CUDA graphs of forward passes: captured the second time a pass runs, replayed from then on.

A pass is a decode step, or the tower's layers for small images. A graph fixes addresses, sizes and
scalar arguments. So the inputs of a pass must lie in buffers that never move, and its shapes must
be rounded up to few sizes.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from keye_kernels import backends

# All graphs of a run share one memory pool. Each adds its list of launches, on host and device:
# about 250 for the tower, 400 for the decoder.
_MAX_GRAPHS = 64

# The cache leaves this much memory free for graphs: activations of 2048 patches, logits of up to
# 256 rows (240 MB if steps are captured with ascending numbers of rows), cuBLAS's workspace, and
# the lists of launches.
GRAPH_BYTES = 512 << 20

# The definitions of these ops read lengths, slots or parameters back to the host; a graph cannot.
_READ_BACK = ("varlen_attention", "qk_norm_mrope_store", "paged_decode_attention", "sample")

Forward = Callable[[], None]

_capturing = threading.Lock()


def why_no_graphs(device: torch.device) -> str:
    """Why passes on `device` are not captured with the current backend; "" if they are."""
    if device.type != "cuda":
        return "needs a GPU"
    served = backends(device.type)
    read_back = [op for op in _READ_BACK if served[op].backend in (None, "reference")]
    return f"no kernel serves {', '.join(read_back)}" if read_back else ""


def padded_rows(num_rows: int) -> int:
    """Round ``num_rows`` up to one of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ….

    Padding is less than half of the rows, and less than a third above 16. Up to about 190 rows a
    decode step is bound by reading the weights, so padding costs little time.
    """
    power = 1 << (num_rows - 1).bit_length()
    middle = power * 3 // 4
    return middle if power >= 32 and num_rows <= middle else power


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: a new one each time could be one of PyTorch's 32 in use."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Captures passes into its own memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, forward: Forward) -> torch.cuda.CUDAGraph:
        """Record the launches of a pass, which must have run before, without running them.

        Raises:
            RuntimeError: The pass cannot be captured.
            torch.OutOfMemoryError: There is no memory for it.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may launch kernels meanwhile; they must not synchronize the device.
        mode = {"capture_error_mode": "thread_local"}
        # Restores the current stream if the capture fails.
        current = torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        with _capturing, current, _no_garbage_collection():
            torch.cuda.current_blas_handle()  # creates this thread's handle, which a capture cannot
            # cuBLAS keeps a workspace per stream. Clearing it before and after the capture puts it
            # into this pool and hides it from graphs of other pools.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, **mode):
                    forward()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"a forward pass could not be captured as a CUDA graph ({error}); start again "
                    "with cuda_graphs=False, which launches its kernels one by one"
                ) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting garbage could destroy another graph, which is not allowed during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaGraphs:
    """The captured passes of one run, at most 64; the least recently used one is dropped.

    They share one memory pool: only one is replayed at a time, and no result stays in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._recorder = CudaRecorder(device)
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: set[Hashable] = set()

    def run(self, key: Hashable, forward: Forward) -> None:
        """Run ``forward``, whose launches depend on nothing but ``key``.

        The first run of a key launches its kernels: they must be compiled before a capture, and
        many keys come up only once. The second run captures, later ones replay.
        """
        if key not in self._seen:
            self._seen.add(key)
            forward()
            return
        if key not in self._graphs:
            self._graphs[key] = self._recorder.capture(forward)
            # Only after the capture: the memory pool is freed with its last graph.
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()
