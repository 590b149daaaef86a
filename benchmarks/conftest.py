"""Collects what the benchmarks measured and prints it as one table at the end of the run."""

from __future__ import annotations

import platform

import pytest
import torch

from benchmarks.timing import race

_rows = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[_rows] = []


@pytest.fixture
def compare(request):
    """Race providers of one result; "ours" against the fastest other is the ratio of the row."""

    def run(case, providers, *, seconds=3.0):
        timings = race(providers, seconds=seconds)
        others = [t.median for name, t in timings.items() if name != "ours"]
        best = min(others) if others else None
        for name, timing in timings.items():
            ratio = timing.median / best if best and name == "ours" else None
            request.config.stash[_rows].append((case, name, timing, ratio))
        return timings

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_rows]
    if not rows:
        return
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads: small shapes, no claim about a GPU"
    )
    write = terminalreporter.write_line
    terminalreporter.section("keye-kernels benchmarks")
    write(f"{where}; torch {torch.__version__}, Python {platform.python_version()}")
    write(f"{'case':44} {'provider':14} {'ms':>9} {'±':>8}  time of ours / best other")
    for case, name, timing, ratio in rows:
        shown = f"{ratio:.2f}" if ratio else ""
        write(f"{case:44} {name:14} {1e3 * timing.median:9.2f} {1e3 * timing.spread:8.2f}  {shown}")
