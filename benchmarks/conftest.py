"""The fixture `measure`, its options, and the report at the end of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import options
from benchmarks.environment import environment, slug
from benchmarks.measure import Measure
from benchmarks.plots import draw
from benchmarks.record import Report, write_text
from benchmarks.timing import ON_GPU, measure_ceilings

_report = pytest.StashKey[Report]()


def pytest_addoption(parser):
    group = parser.getgroup("keye-kernels benchmarks")
    group.addoption("--save", action="store_true", help="keep results of a CPU run too")
    group.addoption("--results", metavar="DIR", type=Path, help="where results are kept")
    group.addoption("--seconds", type=float, default=0.5 if ON_GPU else 0.1, help="per case")
    group.addoption(
        "--provider", action="append", default=[], help="only providers whose name holds this"
    )
    group.addoption(
        "--profile", action="store_true", help="no timing: write a torch profiler trace per case"
    )
    group.addoption(
        "--nvtx", action="store_true", help="no timing: one call each in NVTX ranges, for ncu, nsys"
    )
    group.addoption(
        "--tokens", type=options.tokens, metavar="N[,N...]", help="tokens or patches of each op"
    )
    group.addoption("--heads", type=options.heads, metavar="H[:K]", help="heads, of keys K")
    group.addoption("--dtype", type=options.dtype, help="fp32, fp16 or bf16")


def pytest_configure(config):
    """Before bench files are imported: their cases are made then."""
    names = ("tokens", "heads", "dtype")
    options.chosen = options.Options(*(config.getoption(f"--{name}", None) for name in names))
    options.chosen.apply()


def pytest_collection_modifyitems(items):
    given = ", ".join(options.chosen.given)
    for item in items if given else []:
        if "case" not in getattr(getattr(item, "callspec", None), "params", {}):
            reason = f"{given} does not apply to {item.name.partition('[')[0]}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def measure(request):
    option = request.config.getoption
    facts = environment()
    place = slug(facts)
    if options.chosen.given:  # beside the results at the checkpoint's shapes, not over them
        facts["options"], place = str(options.chosen), f"{place}-own"
    folder = option("--results") or Path(__file__).parent / "results" / place
    report = None
    if not option("--profile") and not option("--nvtx"):
        save = ON_GPU or option("--save") or option("--results")
        report = Report(facts, measure_ceilings(), folder if save else None)
        request.config.stash[_report] = report
    return Measure(
        report,
        seconds=option("--seconds"),
        names=tuple(option("--provider")),
        trace_folder=folder / "traces" if option("--profile") else None,
        marked=option("--nvtx"),
    )


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash.get(_report, None)
    if report is None or not report.rows:
        return
    terminalreporter.section("keye-kernels benchmarks")
    terminalreporter.write(report.table())
    if report.folder is None:
        return
    write_text(report.folder / "table.txt", report.table())
    try:
        draw(report, report.folder)
    except ModuleNotFoundError as missing:
        terminalreporter.write_line(f"no plots: {missing}")
    terminalreporter.write_line(f"written to {report.folder}")
