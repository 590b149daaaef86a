"""When steps are captured, on which stream, and which captured ones are kept."""

import gc
from contextlib import nullcontext

import pytest
import torch

from keye_kernels import use_backend
from keye_model.engine import cuda_graph
from keye_model.engine.cuda_graph import padded_rows, why_no_graphs
from keye_model.engine.decode_batch import MAX_ROWS

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures for itself")


@needs_no_gpu
def test_the_least_recently_used_graph_goes(recorder, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_MAX_GRAPHS", 2)
    graphs, steps = cuda_graph.CudaGraphs(torch.device("cpu")), []
    turns = (
        ("a", ""),
        ("ab", "a"),
        ("bb", "ab"),
        ("aa", "ba"),
        ("c", "ba"),
        ("c", "ac"),
        ("b", "cb"),
    )
    for keys, captured in turns:
        for key in keys:
            graphs.run(key, lambda key=key: steps.append(key))
        assert "".join(graphs._graphs) == captured
    assert "".join(steps) == "aabbccb", "the others were replayed"
    assert recorder.captures == 4


class Cuda:
    """As much of CUDA as `torch.cuda.graph` asks for, which writes down what is asked of it.

    Device 0 is the current one; the model is on device 1.
    """

    def __init__(self, monkeypatch, at_end):
        self.log, self.device, cuda = [], 0, self
        self.streams = [Stream("default", 0), Stream("default", 1)]

        class Device:
            def __init__(self, device):
                self.index = torch.device(device).index

            def __enter__(self):
                self.before, cuda.device = cuda.device, self.index

            def __exit__(self, *error):
                cuda.device = self.before

        class Graph:
            def capture_begin(self, pool, **options):
                mode = options["capture_error_mode"]
                cuda.log.append(f"begin {pool} {mode} on {cuda.streams[cuda.device]}")

            def capture_end(self):
                cuda.log.append("end")
                if at_end:
                    raise at_end

        def set_stream(stream):
            self.device = stream.device.index
            self.streams[self.device] = stream

        def log(what):
            return lambda: self.log.append(f"{what} of device {self.device}")

        fakes = {
            "Stream": lambda device: Stream("own", torch.device(device).index),
            "current_stream": lambda device=None: self.streams[
                self.device if device is None else torch.device(device).index
            ],
            "set_stream": set_stream,
            "device": Device,
            "_get_device_index": lambda *_, **__: self.device,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": Graph,
            "synchronize": log("synchronize"),
            "empty_cache": lambda: None,
            "current_blas_handle": log("handle"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        clear = log("clear")
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)


class Stream:
    def __init__(self, name, index):
        self.name, self.device = name, torch.device("cuda", index)

    def __str__(self):
        return f"{self.name} {self.device.index}"


@needs_no_gpu
@pytest.mark.parametrize(
    ("in_step", "at_end", "error", "message"),
    [
        (None, None, None, ""),
        (torch.OutOfMemoryError("too large"), None, torch.OutOfMemoryError, "^too large$"),
        (ValueError("cpu"), None, RuntimeError, r"a CUDA graph \(cpu\); start again with cuda_gr"),
        (ValueError("cpu"), RuntimeError("invalid"), RuntimeError, r"a CUDA graph \(invalid\); st"),
    ],
    ids=["success", "out of memory", "refused", "invalid"],
)
def test_capture_on_another_device(monkeypatch, in_step, at_end, error, message):
    """Whatever happens: what comes after runs where it ran before."""
    cuda = Cuda(monkeypatch, at_end)
    monkeypatch.setattr(cuda_graph, "_capture_stream", cuda_graph._capture_stream.__wrapped__)
    recorder = cuda_graph.CudaRecorder(torch.device("cuda:1"))

    def step():
        cuda.log.append(f"step, garbage collection {gc.isenabled()}")
        if in_step:
            raise in_step

    with pytest.raises(error, match=message) if error else nullcontext():
        recorder.capture(step)
    assert cuda.log == [
        "handle of device 1",
        "clear of device 1",
        "synchronize of device 1",
        "begin pool thread_local on own 1",
        "step, garbage collection False",
        "end",
        "clear of device 1",
    ]
    assert gc.isenabled()
    assert cuda.device == 0
    assert [*map(str, cuda.streams)] == ["default 0", "default 1"]


def test_definitions_are_not_captured():
    with use_backend("reference"):
        assert why_no_graphs(torch.device("cuda")) == (
            "no kernel serves varlen_attention, qk_norm_mrope_store, paged_decode_attention, sample"
        )


def test_padded_rows():
    rows = [padded_rows(n) for n in range(1, MAX_ROWS + 1)]
    assert all(n <= padded < 2 * n for n, padded in enumerate(rows, 1))
    assert sorted(set(rows)) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
