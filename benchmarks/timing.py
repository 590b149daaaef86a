"""The one timing routine: providers of the same result in turns, and the machine's own limits.

On a GPU a turn is a number of calls between two CUDA events, as one CUDA graph where the calls can
be captured (then launch cost is out of the number, as it is in a model that replays a graph), else
as plain launches (then it is in; `Timing.graph` tells). Calls rotate over several sets of inputs
and keep as many outputs alive, so that together they are several times the L2 cache. On a CPU a
turn is timed by the wall clock.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

_TURN_SECONDS = 4e-3 if ON_GPU else 1e-3  # so that events and clocks cost below a percent
_MAX_CALLS = 256  # per turn
_MAX_SETS = 32
_MIN_TURNS = 5
_MAX_SPREAD = 0.2  # of the median
_HEAD_START_CYCLES = 200_000  # about 0.1 ms of GPU time in which the host enqueues the turn

Inputs = dict[str, Any]
Make = Callable[[], Inputs]
Run = Callable[..., object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one provider.

    Attributes:
        median: Of all turns.
        spread: Half the distance of the quartiles.
        turns: How many were taken.
        graph: Calls were replayed from a CUDA graph; else their launches are part of the time.
        cold: Inputs came from memory. False: the rotation was small enough to stay in the L2.
    """

    median: float
    spread: float
    turns: int
    graph: bool = False
    cold: bool = False


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run.

    Attributes:
        copy_bandwidth: Bytes per second of a large copy, read and written bytes both counted.
        matmul_rate: FLOP per second of a large bf16 matrix product on random data.
        contended: Why neither means much; "" if nothing says so.
    """

    copy_bandwidth: float
    matmul_rate: float
    contended: str = ""

    def limit(self, num_bytes: int, flops: int) -> float:
        """Seconds that so many bytes or so many FLOP take at the least, whichever is longer."""
        return max(num_bytes / self.copy_bandwidth, flops / self.matmul_rate)


@dataclass(frozen=True)
class Cores:
    """The CPU cores this process may use, and how many processes want one.

    Attributes:
        count: Cores.
        load: Gives the load average of the last minute.
    """

    count: int
    load: Callable[[], float]


CORES = Cores(len(os.sched_getaffinity(0)), lambda: os.getloadavg()[0])


def contention(timings: Iterable[Timing], loads: Iterable[float], cores: int) -> str:
    """Why these times say more about the neighbours than about the code; "" if nothing says so."""
    spread = max((t.spread / t.median for t in timings if t.median), default=0.0)
    load = max(loads, default=0.0)
    reasons = []
    if spread > _MAX_SPREAD:
        reasons.append(f"spread {100 * spread:.0f} %")
    if load > cores:
        reasons.append(f"load {load:.1f} on {cores} core{'s' if cores > 1 else ''}")
    return ", ".join(reasons)


def race(
    providers: dict[str, Run],
    make: Make,
    *,
    seconds: float = 1.0,
    launched: Collection[str] = (),
    contexts: dict[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, Timing]:
    """Time providers in turns, so that a clock that drifts or a noisy neighbour hits all alike.

    Args:
        providers: Name to a function that takes what `make` returns as keywords.
        make: Makes one set of inputs; called several times on a GPU.
        seconds: How long all turns together may take, after a quarter of it as warm-up. At least
            five turns each are taken, however long.
        launched: Providers that no CUDA graph may hold: they copy from the host, or keep tensors
            from one call to the next, and a graph would go on reading memory that was given back.
        contexts: Name to a context manager that is entered around the calls of that provider.
    """
    sets = _input_sets(make)
    contexts = contexts or {}
    turns = {
        name: _Turn(run, sets, contexts.get(name, nullcontext), name not in launched)
        for name, run in providers.items()
    }
    _until(time.perf_counter() + seconds / 4, 0, turns)
    enabled = gc.isenabled()
    gc.disable()
    try:
        times = _until(time.perf_counter() + seconds, _MIN_TURNS, turns)
    finally:
        if enabled:
            gc.enable()
    return {name: turn.summary(times[name]) for name, turn in turns.items()}


def measure_ceilings(cores: Cores = CORES) -> Ceilings:
    """Copy bandwidth and bf16 matmul rate of this machine, as it is now."""
    before = cores.load()
    size = 2**29 if ON_GPU else 2**25
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    edge = 8192 if ON_GPU else 512
    a, b = torch.randn(2, edge, edge, device=DEVICE).bfloat16()

    copied = race({"copy": lambda: target.copy_(source)}, dict, seconds=0.3)["copy"]
    multiplied = race({"matmul": lambda: a @ b}, dict, seconds=0.5)["matmul"]
    contended = contention((copied, multiplied), (before, cores.load()), cores.count)
    return Ceilings(2 * size / copied.median, 2 * edge**3 / multiplied.median, contended)


class _Turn:
    """A fixed number of calls of one provider, captured once if possible."""

    def __init__(
        self,
        run: Run,
        sets: list[Inputs],
        context: Callable[[], AbstractContextManager],
        capture: bool,
    ) -> None:
        self._run, self._sets, self._context = run, sets, context
        self._calls = 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self()  # compiles
        self._calls = min(math.ceil(_TURN_SECONDS / max(self(), 1e-9)), _MAX_CALLS)
        self.cold = ON_GPU and _num_bytes(sets[: self._calls]) > 2 * _l2_bytes()
        if ON_GPU and capture:
            self.graph = self._capture()

    def __call__(self) -> float:
        """Seconds per call of one turn."""
        if not ON_GPU:
            start = time.perf_counter()
            self._call_all()
            return (time.perf_counter() - start) / self._calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start.record()
        if self.graph is None:
            self._call_all()
        else:
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._calls

    def summary(self, times: list[float]) -> Timing:
        first, median, third = statistics.quantiles(times, n=4)
        spread = (third - first) / 2
        return Timing(median, spread, len(times), self.graph is not None, self.cold)

    def _call_all(self) -> None:
        # As many outputs stay alive as there are sets, else every call would write to one buffer
        # that never leaves the cache.
        alive: deque[object] = deque(maxlen=len(self._sets))
        with self._context():
            for inputs in itertools.islice(itertools.cycle(self._sets), self._calls):
                alive.append(self._run(**inputs))

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        if self._reads_back():
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._call_all()
        except RuntimeError:  # a library that allocates or synchronises by itself
            torch.cuda.synchronize()
            return None
        return graph

    def _reads_back(self) -> bool:
        """Whether a call waits for the GPU.

        Asked before a capture, for one that fails can leave random generators unusable. Asked on a
        side stream, as a capture runs on one: libraries set things up on their first call there.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream), self._context():
                self._run(**self._sets[0])
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.synchronize()
        return False


def _until(end: float, at_least: int, turns: dict[str, _Turn]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in turns}
    for count in itertools.count():
        if count >= at_least and time.perf_counter() >= end:
            return times
        for name, turn in turns.items():
            times[name].append(turn())


def _input_sets(make: Make) -> list[Inputs]:
    """Enough sets of inputs to fill the L2 cache four times, within reason."""
    sets = [make()]
    if not ON_GPU:
        return sets
    wanted = math.ceil(4 * _l2_bytes() / max(_num_bytes(sets), 1))
    return sets + [make() for _ in range(min(wanted, _MAX_SETS) - 1)]


def _num_bytes(sets: list[Inputs]) -> int:
    """Bytes of the tensors of all sets; tensors that sets share count once."""
    tensors = {(x.data_ptr(), x.nbytes) for x in tree_leaves(sets) if isinstance(x, torch.Tensor)}
    return sum(size for _, size in tensors)


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size
