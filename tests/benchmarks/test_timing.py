"""What is done on a GPU, with a GPU that only counts."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing

pytestmark = pytest.mark.skipif(timing.ON_GPU, reason="a real GPU is here")

MEGABYTE = 2**20


class Stream:
    def wait_stream(self, _):
        pass


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 1.0


@pytest.fixture
def gpu(monkeypatch):
    """Counts captures and replays; `mode` is the debug mode in which waiting is an error."""
    state = SimpleNamespace(mode=0, captures=0, replays=0)

    class Graph:
        def replay(self):
            state.replays += 1

    @contextmanager
    def graph(_):
        state.captures += 1
        yield

    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "graph": graph,
        "stream": lambda _: nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda: None,
        "_sleep": lambda _: None,
        "get_sync_debug_mode": lambda: state.mode,
        "set_sync_debug_mode": lambda mode: setattr(state, "mode", mode),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=MEGABYTE),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "ON_GPU", True)
    monkeypatch.setattr(timing, "_TURN_SECONDS", 4e-3)
    return state


def make():
    return {"x": torch.zeros(MEGABYTE, dtype=torch.uint8)}


def test_calls_are_replayed_from_a_graph(gpu):
    found = timing.race({"op": lambda x: x}, make, seconds=0)["op"]
    assert found.graph
    assert found.cold
    assert found.turns == 5
    assert (gpu.captures, gpu.replays) == (1, 5)
    assert found.median == pytest.approx(1e-3 / 4), "4 calls, as one took 1 ms and a turn takes 4"


def test_what_waits_for_the_gpu_is_not_captured(gpu):
    def waits(x):
        if gpu.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return x

    found = timing.race({"waits": waits, "kept": lambda x: x}, make, seconds=0, launched=["kept"])
    assert not found["waits"].graph
    assert not found["kept"].graph
    assert (gpu.captures, gpu.mode) == (0, 0)


def test_inputs_rotate_past_the_cache(gpu):  # noqa: ARG001
    seen = set()
    timing.race({"op": lambda x: seen.add(x.data_ptr())}, make, seconds=0)
    assert len(seen) == 4
    few = timing.race({"op": lambda x: x}, lambda: {"x": torch.zeros(1)}, seconds=0)["op"]
    assert not few.cold, "32 sets of 4 bytes stay in the cache"
