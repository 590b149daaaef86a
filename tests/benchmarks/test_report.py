"""Table, JSON and plots: what stays in them, and what they say about it."""

import dataclasses
import json

import pytest

from benchmarks.report import CPU_NOTE, Report, Row, load
from benchmarks.timing import Ceilings, Timing

CEILINGS = Ceilings(copy_bandwidth=4e12, matmul_rate=8e14)
GPU = {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}
CPU = {"gpu": "", "cpu": "x86_64, 1 threads", "torch": "2.13.0"}


def row(provider, microseconds, **fields):
    """400 MB in a limit of 100 µs."""
    values = {"size": 1024.0, "num_bytes": 400_000_000, "limit": 1e-4} | fields
    blank = Row("rms_norm", "1k tokens", provider, **values)
    return blank.timed(Timing(1e-6 * microseconds, 1e-6, 5, graph=True, cold=True))


def absent(provider):
    return Row("rms_norm", "1k tokens", provider, note="absent: no module named 'liger_kernel'")


def line(report, provider):
    return next(x for x in report.table().splitlines() if f" {provider} " in x)


def test_a_loss_stays_in_the_table():
    report = Report(GPU, CEILINGS)
    report.add([row("ours (triton)", 200, ours=True), row("eager", 400), row("fast", 100)])
    ours = line(report, "ours (triton)").split()
    assert ours[-6:] == ["200.0", "1.0", "2000.0", "GB/s", "50", "0.50"]
    assert line(report, "fast").split()[-1] == "100", "only ours have a ratio"


def test_ratio_is_to_the_fastest_peer_and_not_to_ours():
    report = Report(GPU, CEILINGS)
    rows = [row("ours (triton)", 100, ours=True), row("ours (reference)", 50, ours=True)]
    report.add([*rows, row("eager", 300), row("liger", 150), absent("flashinfer")])
    assert [r.speedup for r in report.rows] == [pytest.approx(1.5), pytest.approx(3), *3 * [None]]


def test_without_a_peer_there_is_no_ratio():
    report = Report(GPU, CEILINGS)
    report.add([row("ours (triton)", 100, ours=True), absent("liger")])
    assert report.rows[0].speedup is None


def test_an_absent_peer_has_a_row_with_the_reason():
    report = Report(GPU, CEILINGS)
    report.add([row("ours (triton)", 200, ours=True), absent("liger")])
    shown = line(report, "liger").split(maxsplit=2)
    assert shown == ["liger", "-", "absent: no module named 'liger_kernel'"]


def test_the_rate_is_the_one_that_bounds():
    assert row("a", 200).rate(CEILINGS) == "2000.0 GB/s"
    assert row("a", 200, flops=10**11).rate(CEILINGS) == "500.00 TFLOP/s"


def test_launches_and_cached_inputs_are_told_on_a_gpu_only():
    blank = row("eager", 10)
    plain = dataclasses.replace(blank, graph=False, cold=False)
    for environment, ending in ((GPU, "with launches, inputs in L2"), (CPU, "1000")):
        report = Report(environment, CEILINGS)
        report.add([plain])
        assert line(report, "eager").endswith(ending)


def test_every_table_of_a_cpu_says_so():
    report = Report(CPU, CEILINGS)
    report.add([row("eager", 1)])
    report.add([dataclasses.replace(row("eager", 1), op="gelu")])
    table = report.table()
    assert f"rms_norm ({CPU_NOTE})" in table
    assert f"gelu ({CPU_NOTE})" in table
    gpu = Report(GPU, CEILINGS)
    gpu.add([row("eager", 1)])
    assert CPU_NOTE not in gpu.table()


def test_results_are_on_disk_after_each_case(tmp_path):
    report = Report(GPU, CEILINGS, tmp_path)
    for op in ("rms_norm", "gelu"):
        report.add([dataclasses.replace(row("ours (triton)", 7, ours=True), op=op)])
        document = json.loads((tmp_path / "results.json").read_text())
        assert [r["op"] for r in document["rows"]][-1] == op
        assert op in (tmp_path / "table.txt").read_text()
    assert document["environment"] == GPU
    assert document["ceilings"] == {"copy_bandwidth": 4e12, "matmul_rate": 8e14}
    assert set(document["rows"][0]) == {field.name for field in dataclasses.fields(Row)}
    assert load(tmp_path / "results.json").rows == report.rows


def test_a_later_run_continues_the_file_of_the_same_machine(tmp_path):
    first = Report(GPU, CEILINGS, tmp_path)
    first.add([row("eager", 1)])
    first.add([dataclasses.replace(row("eager", 2), op="gelu")])
    second = Report(GPU, CEILINGS, tmp_path)
    second.add([row("eager", 3)])
    assert [(r.op, round(1e6 * r.seconds)) for r in second.rows] == [("gelu", 2), ("rms_norm", 3)]
    assert Report(GPU | {"commit": "def"}, CEILINGS, tmp_path).rows == []


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plots")
    from benchmarks.plots import draw

    report = Report(GPU, CEILINGS)
    report.add([row("ours (triton)", 200, ours=True), row("eager", 400), absent("liger")])
    stages = {"vision": 1e-3, "decode": 2e-3}
    report.add([dataclasses.replace(row("ours", 3000), op="request", stages=stages)])
    paths = draw(report, tmp_path)
    assert [path.name for path in paths] == ["latency.png", "stages.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
