"""The one timing routine: several providers of the same result, in turns, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider: the median of its turns, and half the distance of the quartiles."""

    median: float
    spread: float


def race(providers: dict[str, Callable[[], object]], *, seconds: float = 3.0) -> dict[str, Timing]:
    """Time each provider in turns, so that a clock that drifts or a noisy neighbour hits all alike.

    Two turns each warm up; then turns go on for about ``seconds``, at least five.
    """
    for _ in range(2):
        for run in providers.values():
            _timed(run)
    turns: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(turns.values()))) < 5:
        for name, run in providers.items():
            turns[name].append(_timed(run))
    return {name: _summary(times) for name, times in turns.items()}


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _summary(times: list[float]) -> Timing:
    first, median, third = statistics.quantiles(times, n=4)
    return Timing(median, (third - first) / 2)
