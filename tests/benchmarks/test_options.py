"""Shapes of one's own, and what marks a run that says more about its neighbours."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import options
from benchmarks.cases import Case, all_cases
from benchmarks.measure import Measure
from benchmarks.options import Options
from benchmarks.providers import Provider
from benchmarks.record import Report
from benchmarks.shapes import SMALL, grid_of, num_patches, own_shapes
from benchmarks.timing import Ceilings, Cores, Timing, contention, measure_ceilings

CEILINGS = Ceilings(copy_bandwidth=1e9, matmul_rate=1e12)
ROOT = Path(__file__).parents[2]


def test_contention():
    calm, loud = Timing(1.0, 0.2, 5), Timing(1.0, 0.21, 5)
    assert contention([calm], [2.0, 1.0], 2) == ""
    assert contention([calm, loud], [0.0], 2) == "spread 21 %"
    assert contention([calm], [0.5, 2.01], 2) == "load 2.0 on 2 cores"
    assert contention([loud], [1.5], 1) == "spread 21 %, load 1.5 on 1 core"
    assert contention([], [], 1) == ""


def cores(*loads):
    left = list(loads)
    return Cores(2, lambda: left.pop(0))


def measured(cores, ceilings=CEILINGS):
    case = Case(
        "silu_mul", "a row", lambda d: {"gate_up": torch.randn(1, 8, device=d)}, num_bytes=1
    )
    report = Report({"gpu": ""}, ceilings)
    Measure(report, seconds=0, names=("absent",), cores=cores)(case, {})
    Measure(report, seconds=0, names=("eager",), cores=cores)(
        case, {"eager": Provider(lambda gate_up: gate_up[:, :4] * 0)}
    )
    rows = report.rows
    report.rows = []
    Measure(report, seconds=0, names=("ours (reference)",), cores=cores)(case, {})
    return rows, report.rows


@pytest.mark.parametrize("loads", [(9.0, 0.0), (0.0, 9.0)], ids=["before", "after"])
def test_load_before_or_after_a_case_flags_it(loads):
    wrong, (ours,) = measured(cores(0.0, 0.0, *loads))
    assert "load 9.0 on 2 cores" in ours.flag
    assert ours.flag.startswith("contended: ")
    assert all(row.flag == "" for row in wrong), "a row without a time needs no flag"


def test_contended_ceilings_flag_all_rows():
    ceilings = Ceilings(1e9, 1e12, contended="load 7.0 on 2 cores")
    _, (ours,) = measured(cores(*[0.0] * 4), ceilings)
    assert ours.flag.startswith("contended: ")
    assert "load 7.0 on 2 cores" in ours.flag or "spread" in ours.flag


def test_stages_are_flagged_too():
    report = Report({"gpu": ""}, CEILINGS)
    measure = Measure(report, seconds=0, cores=cores(0.0, 5.0))
    measure.stages("request", "one", {"ours": lambda: {"vision": 1.0}}, turns=1)
    assert report.rows[0].flag == "contended: load 5.0 on 2 cores"


def test_ceilings_look_at_the_load():
    assert "load 5.0 on 2 cores" in measure_ceilings(cores(0.0, 5.0)).contended


def test_values_of_options():
    assert options.tokens("1024") == [1024]
    assert options.tokens("8,16") == [8, 16]
    assert options.heads("16") == (16, 16)
    assert options.heads("32:8") == (32, 8)
    assert options.dtype("fp16") is torch.float16
    for parse, texts in (
        (options.tokens, ("", "0", "-1", "x", "1,", "1.5", "2147483648")),
        (options.heads, ("", "0", "8:3", "2:4", "8:4:2", "x", "8:", "4096", "-8:-2")),
        (options.dtype, ("", "int8", "float")),
    ):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match=f"{parse.__name__} must be .*got"):
                parse(text)


@pytest.mark.parametrize("count", [1, 2, 7, 12, 97, 1024, 5040])
def test_a_grid_of_so_many_patches(count):
    _, h, w = grid_of(count)
    assert h * w == count
    assert (h % 2, w % 2) == (0, 0) or count % 4


def test_own_tokens_are_those_of_each_case():
    found = {}
    for case in all_cases(own_shapes([8, 12], SMALL)):
        found.setdefault(case.op, []).append(case)
    assert [case.name for case in found["rms_norm"]] == ["8 tokens", "12 tokens"]
    for op, name in (("rms_norm", "x"), ("rope_2d_", "q"), ("mrope_", "q"), ("gelu", "x")):
        assert [case.arguments("meta")[name].shape[0] for case in found[op][:1]] == [8]
    decoded = [case.arguments("cpu") for case in found["paged_decode_attention"]]
    assert [x["cache_seqlens"].tolist() for x in decoded] == [[8], [12]]
    assert num_patches([grid_of(8)]) == 8
    assert "sample" not in found


def test_what_an_op_does_not_understand():
    def refused(op, **given):
        return Options(**given).refuses(op)

    assert refused("rms_norm", heads=(8, 8)) == "--heads does not apply to rms_norm"
    assert "as many key/value heads" in refused("varlen_attention", heads=(8, 2))
    assert refused("varlen_attention", heads=(8, 8)) == ""
    assert refused("paged_decode_attention", heads=(8, 2)) == ""
    assert refused("linear", tokens=[1, 17]) == ""
    assert "multiple of 4 for merge_patches, got 6" in refused("merge_patches", tokens=[8, 6])
    assert "--tokens does not apply to sample" in refused("sample", tokens=[8])
    assert refused("sample", dtype=torch.float16) == ""
    assert refused("rms_norm") == ""


def test_options_of_a_run(tmp_path):
    """From the command line to the rows; what does not apply is said."""
    command = [
        sys.executable, "-m", "pytest", "benchmarks/bench_norm.py", "benchmarks/bench_rope.py",
        "-q", "-n0", "-rs", "-p", "no:cacheprovider", "--seconds=0", "--provider=ours",
        "--heads=4:2", "--tokens=5", "--dtype=fp16", "--results", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--heads does not apply to rms_norm" in done.stdout
    document = (tmp_path / "results.json").read_text()
    assert '"options": "--tokens 5 --heads 4:2 --dtype fp16"' in document
    rows = (tmp_path / "results.csv").read_text().splitlines()
    # q and k of 4 and 2 heads read and written, in fp16, and 3 positions of 8 bytes
    num_bytes = 5 * (2 * (4 + 2) * 128 * 2 + 3 * 8)
    assert any(r.startswith("mrope_,5 tokens,ours") and f",{num_bytes}," in r for r in rows)
    bad = subprocess.run([*command, "--heads=3:2"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 4
    assert "heads must be H, or H:K with K that divides H" in bad.stderr
