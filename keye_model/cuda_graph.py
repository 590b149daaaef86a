"""Steps as CUDA graphs: captured when they come up again, replayed from then on.

A graph holds addresses and numbers: what a step reads anew must lie in buffers that never move, and
its shapes must come in few sizes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from keye_kernels import backends

# The graphs of a run share memory for their tensors; what each adds is a list of some 250 launches
# for the tower and 400 for the decoder, on host and device. 13 row counts of decode steps at two
# capacities are 26, the sizes in which images come take the rest.
_MAX_GRAPHS = 40

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
    """The captured steps of one run; the least recently used one goes first."""

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
