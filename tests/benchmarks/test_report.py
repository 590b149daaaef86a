"""Table, JSON and plots: what stays in them, and what they say about it."""

import csv
import dataclasses
import json

import pytest

from benchmarks.compare import compare
from benchmarks.record import CPU_NOTE, Report, Row, bytes_per_second, flops_per_second, load
from benchmarks.report import main
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
    blank = row("eager", 100)
    plain = dataclasses.replace(blank, graph=False, cold=False)
    for environment, ending in ((GPU, "with launches, inputs in L2"), (CPU, "100")):
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
    assert document["ceilings"] == {
        "copy_bandwidth": 4e12,
        "matmul_rate": 8e14,
        "contended": "",
    }
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
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from benchmarks.plots import draw

    report = Report(GPU, CEILINGS)
    report.add([row("ours (triton)", 200, ours=True), row("eager", 400), absent("liger")])
    stages = {"vision": 1e-3, "decode": 2e-3}
    report.add([dataclasses.replace(row("ours", 3000), op="request", stages=stages)])
    paths = draw(report, tmp_path)
    assert [path.name for path in paths] == ["latency.png", "stages.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def flagged(timing, contended="", **fields):
    values = {"num_bytes": 400_000_000, "limit": 1e-4} | fields
    return Row("rms_norm", "1k tokens", "eager", **values).timed(timing, contended)


def test_a_contended_row_has_no_percent():
    slow = flagged(Timing(2e-4, 1e-4, 5, graph=True, cold=True), "spread 50 %")
    assert slow.flag == "contended: spread 50 %"
    report = Report(GPU, CEILINGS)
    report.add([slow])
    shown = line(report, "eager")
    assert shown.endswith("2000.0 GB/s   contended         contended: spread 50 %")
    assert flagged(Timing(2e-4, 1e-4, 5), "load 9.0 on 2 cores", limit=None).flag.startswith("cont")


def test_more_than_the_limit_is_implausible():
    assert flagged(Timing(1e-4 / 1.04, 0, 5)).flag == ""
    fast = flagged(Timing(1e-4 / 19.91, 0, 5))
    assert fast.flag == "implausible: 1991 % of the limit, inputs may stay in a cache"
    cold = flagged(Timing(1e-4 / 1.06, 0, 5, cold=True))
    assert cold.flag == "implausible: 106 % of the limit, the ceiling is too low"
    report = Report(CPU, CEILINGS)
    report.add([fast])
    before, _, after = line(report, "eager").partition("implausible")
    assert "1991" not in before
    assert after.strip() == fast.flag


def test_contended_ceilings_say_so():
    report = Report(CPU, dataclasses.replace(CEILINGS, contended="load 9.0 on 2 cores"))
    assert "contended (load 9.0 on 2 cores), so no percent of them is given" in report.table()


def test_units_fit_the_number():
    rates = [bytes_per_second(x) for x in (4e12, 1e9, 9.994e8, 2.5e6, 1e6, 3.2e3, 0)]
    assert rates[:3] == ["4000.0 GB/s", "1.0 GB/s", "999.4 MB/s"]
    assert rates[3:] == ["2.5 MB/s", "1.0 MB/s", "3.2 kB/s", "0.0 kB/s"]
    rates = [flops_per_second(x) for x in (7.9e14, 2.5e9, 3e6)]
    assert rates == ["790.00 TFLOP/s", "2.50 GFLOP/s", "3.00 MFLOP/s"]


def test_csv_is_beside_the_json(tmp_path):
    report = Report(GPU, CEILINGS, tmp_path)
    loud = dataclasses.replace(row('liger, "new"', 100), flag="contended: spread 21 %")
    staged = dataclasses.replace(row("eager", 400), stages={"vision": 1e-3})
    report.add([row("ours (triton)", 200, ours=True), loud, staged, absent("flashinfer")])
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["provider"] for r in rows] == [r.provider for r in report.rows]
    assert float(rows[0]["seconds"]) == report.rows[0].seconds
    assert float(rows[0]["percent_of_limit"]) == pytest.approx(50)
    assert float(rows[0]["speedup"]) == pytest.approx(0.5)
    assert rows[1]["flag"] == "contended: spread 21 %"
    assert json.loads(rows[2]["stages"]) == {"vision": 1e-3}
    assert (rows[3]["seconds"], rows[3]["note"]) == ("", "absent: no module named 'liger_kernel'")


def two_reports():
    old, new = Report(GPU, CEILINGS), Report(GPU | {"commit": "def"}, CEILINGS)
    old.add([row("ours (triton)", 200, ours=True), row("eager", 400), row("gone", 1)])
    contended = dataclasses.replace(row("eager", 800), flag="contended: load 9.0 on 2 cores")
    new.add([row("ours (triton)", 100, ours=True), contended, row("fresh", 1)])
    return old, new


def test_two_runs_side_by_side():
    old, new = two_reports()
    lines = compare(old, new).splitlines()
    assert lines[0] == "old: gpu NVIDIA H200 · torch 2.11.0 · commit abc"
    assert lines[1] == "new: gpu NVIDIA H200 · torch 2.11.0 · commit def"
    ours = next(x for x in lines if "ours (triton)" in x).split()
    assert ours[-3:] == ["200.0", "100.0", "2.00"]
    eager = next(x for x in lines if " eager " in x)
    assert eager.split()[1:4] == ["400.0", "800.0", "0.50"]
    assert eager.endswith("new contended: load 9.0 on 2 cores")
    end = lines[lines.index("only in the old run:") :]
    assert end == [
        "only in the old run:", "  rms_norm · 1k tokens · gone", "",
        "only in the new run:", "  rms_norm · 1k tokens · fresh",
    ]  # fmt: skip
    assert not any("machines differ" in x for x in lines)


def test_a_comparison_says_what_it_cannot_compare():
    old, new = Report(GPU, CEILINGS), Report(GPU | {"gpu": "NVIDIA H100"}, CEILINGS)
    old.add([row("eager", 100), row("liger", 100)])
    new.add([row("eager", 100, num_bytes=1), absent("liger")])
    text = compare(old, new)
    assert "the machines differ, so ratios compare them too" in text
    assert next(x for x in text.splitlines() if " eager " in x).endswith("the work differs")
    liger = next(x for x in text.splitlines() if " liger " in x)
    assert "new absent: no module named 'liger_kernel'" in liger


def test_report_command(tmp_path, capsys):
    paths = []
    for report, name in zip(two_reports(), ("old", "new"), strict=True):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(report.to_json())
    main([str(path) for path in paths])
    assert "only in the new run" in capsys.readouterr().out
    bad = tmp_path / "bad.json"
    for text in (None, "{", "[]", '{"environment": {}}'):
        if text is not None:
            bad.write_text(text)
        with pytest.raises(SystemExit):
            main([str(paths[0]), str(bad)])
        assert f"{bad} must be a results.json of a run, got" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(paths[0])] * 3)


def test_a_point_per_case_and_labels_on_the_axes(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    from benchmarks.plots import draw

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    report = Report(GPU, CEILINGS)
    for case, size in (("4k tokens", 4096.0), ("1k tokens", 1024.0), ("chunk of 1k", 1024.0)):
        rows = [row("ours (triton)", 200, ours=True, size=size), row("eager", 400, size=size)]
        report.add([dataclasses.replace(x, case=case) for x in rows])
    loud = dataclasses.replace(report.rows[1], flag="contended: spread 30 %")
    report.rows[1] = loud
    draw(report, tmp_path)
    above, below = figures[0].axes
    assert above.get_ylabel() == "time of a call in µs"
    assert (below.get_xlabel(), below.get_ylabel()) == ("case", "% of the limit")
    labels = [text.get_text() for text in below.get_xticklabels()]
    assert labels == ["1k tokens", "chunk of 1k", "4k tokens"]
    points = [x for x in above.lines if x.get_marker() == "o"]
    assert len({tuple(x.get_xdata()) for x in points}) == len(points) == 6
    assert sum(x.get_markerfacecolor() == "none" for x in points) == 1
    assert len(below.lines) == 5, "the contended one has no percent"
