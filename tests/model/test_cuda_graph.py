"""When steps are captured, on which stream, and which captured ones are kept."""

from contextlib import contextmanager

import pytest
import torch

from keye_kernels import use_backend
from keye_model import cuda_graph
from keye_model.cuda_graph import padded_rows, why_no_graphs
from keye_model.decode_batch import MAX_ROWS

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures for itself")


@needs_no_gpu
def test_the_least_recently_used_graph_goes(recorder, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_MAX_GRAPHS", 2)
    graphs, steps = cuda_graph.StepGraphs(torch.device("cpu")), []
    for key in "aabbacc":
        graphs.run(key, lambda key=key: steps.append(key))
    assert "".join(graphs._graphs) == "ac"
    assert "".join(steps) == "aabbcc", "a was replayed once"
    assert (recorder.runs, recorder.captures) == (3, 3)


@needs_no_gpu
def test_recorder_works_on_its_own_stream(monkeypatch):
    """With a CUDA that only writes down what is asked of it."""
    log = []

    class Stream:
        def __init__(self, device, name="own"):
            self.device, self.name = device, name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what):
        log.append(f"begin {what}")
        yield
        log.append(f"end {what}")

    fakes = {
        "Stream": Stream,
        "current_stream": lambda device: Stream(device, "current"),
        "stream": lambda stream: within(stream.name),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: "graph",
        "graph": lambda graph, pool, stream, capture_error_mode: within(
            f"{graph} {pool} {stream.name} {capture_error_mode}"
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorder = cuda_graph.CudaRecorder(torch.device("cuda:1"))
    recorder.run(lambda: log.append("step"))
    assert log == [
        "own waits for current", "begin own", "step", "end own", "current waits for own"
    ]  # fmt: skip
    log.clear()
    assert recorder.capture(lambda: log.append("step")) == "graph"
    assert log == ["begin graph pool own thread_local", "step", "end graph pool own thread_local"]


def test_definitions_are_not_captured():
    with use_backend("reference"):
        assert why_no_graphs(torch.device("cuda")) == (
            "no kernel serves varlen_attention, qk_norm_mrope_store, paged_decode_attention, sample"
        )


def test_padded_rows():
    rows = [padded_rows(n) for n in range(1, MAX_ROWS + 1)]
    assert all(n <= padded < 2 * n for n, padded in enumerate(rows, 1))
    assert sorted(set(rows)) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
