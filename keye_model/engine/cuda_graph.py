"""Steps as CUDA graphs: captured when they come up again, replayed from then on.

A graph holds addresses and numbers: what a step reads anew must lie in buffers that never move, and
its shapes must come in few sizes.
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

# What a graph adds to the memory that all of a run share is a list of some 250 launches for the
# tower and 400 for the decoder, on host and device.
_MAX_GRAPHS = 64

# Held free for them where the cache is sized: activations of 2048 patches, logits of up to 256 rows
# (240 MB if each number of rows comes before the next larger one), a workspace of cuBLAS and the
# lists of launches.
GRAPH_BYTES = 512 << 20

# Their definitions read lengths, slots and parameters back, which a graph cannot.
_READ_BACK = ("varlen_attention", "qk_norm_mrope_store", "paged_decode_attention", "sample")

Step = Callable[[], None]

_capturing = threading.Lock()


def why_no_graphs(device: torch.device) -> str:
    """Why steps on `device` are not captured, given the backend in force; "" if they are."""
    if device.type != "cuda":
        return "needs a GPU"
    served = backends(device.type)
    read_back = [op for op in _READ_BACK if served[op].backend in (None, "reference")]
    return f"no kernel serves {', '.join(read_back)}" if read_back else ""


def padded_rows(num_rows: int) -> int:
    """Rows of the step that serves so many: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96 ….

    Less than half of them is padding, and less than a third above 16. While a step waits for the
    weights' bytes, up to about 190 rows, more rows take little more time.
    """
    power = 1 << (num_rows - 1).bit_length()
    middle = power * 3 // 4
    return middle if power >= 32 and num_rows <= middle else power


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: PyTorch has 32 streams, and gives them out again and again."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Captures steps into a pool of memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Step) -> torch.cuda.CUDAGraph:
        """The launches of a step that has run before, not run.

        Raises:
            RuntimeError: The step cannot be captured.
            torch.OutOfMemoryError: There is no memory for it.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may launch meanwhile, but not wait for the whole device.
        mode = {"capture_error_mode": "thread_local"}
        # A capture that fails would leave its own stream the current one, but for this.
        current = torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        with _capturing, current, _no_garbage_collection():
            torch.cuda.current_blas_handle()  # this thread's: none can be made in a capture
            # cuBLAS keeps a workspace for each stream. This one must lie in the graphs' own pool,
            # and no other pool's graphs may find it.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, **mode):
                    step()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"a step could not be captured as a CUDA graph ({error}); start again with "
                    "cuda_graphs=False, which launches steps one by one"
                ) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What it may find, such as another graph, must not be destroyed during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StepGraphs:
    """The captured steps of one run; the least recently used one goes first.

    They share memory: one is replayed at a time, and none leaves a result there.
    """

    def __init__(self, device: torch.device) -> None:
        self._recorder = CudaRecorder(device)
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._seen: set[Hashable] = set()

    def run(self, key: Hashable, step: Step) -> None:
        """Run a step; `key` is all that its launches depend on.

        The first time as it is, since its kernels must have been compiled before it can be
        captured, and many come up only once.
        """
        if key not in self._seen:
            self._seen.add(key)
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = self._recorder.capture(step)
            if len(self._graphs) > _MAX_GRAPHS:  # only now: the last one would take the pool along
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()
