"""Which of the tuned cases are the largest gaps, and what a profiler sees of one."""

import pytest
import torch

import keye_kernels
from benchmarks.gaps import largest, main
from keye_kernels import _backends
from keye_kernels._verdicts import Row, Verdicts


def rows(op, case, status="right", **microseconds):
    kind = ("float32", "False", "False", "False", "False")
    return [
        Row(op, name, case, kind, (1,), status, "", time, 0.1)
        for name, time in microseconds.items()
    ]


ROWS = [
    *rows("linear", "o, 1 row", triton=30.0, cuda=20.0, reference=16.0),
    *rows("linear", "o, 64 rows", triton=30.0, reference=29.0),
    *rows("sample", "greedy", triton=50.0, reference=500.0),
    *rows("varlen_attention", "an image", triton=300.0, sdpa=250.0, torch_varlen=100.0),
    *rows("gelu", "1 token", triton=9.0, reference=2.0),  # a launch
    *rows("rms_norm", "1024 tokens", triton=40.0),  # nothing to compare with
    *rows("silu_mul", "1024 tokens", reference=4.0, triton=40.0),
    *rows("silu_mul", "1 token", "wrong", triton=None),
    *rows("mrope_", "1024 tokens", triton=40.0, reference=39.0),
]


def test_the_largest_ratio_of_each_op_without_faults_and_launches():
    found = largest(ROWS)
    assert [str(gap) for gap in found] == [
        "varlen_attention, an image: triton 300.0 us, torch_varlen 100.0 us, 3.00x",
        "linear, o, 1 row: cuda 20.0 us, reference 16.0 us, 1.25x",
        "mrope_, 1024 tokens: triton 40.0 us, reference 39.0 us, 1.03x",
    ]
    assert largest([]) == []


@pytest.fixture
def tuned(monkeypatch):
    machine = {"device": "a stand-in"}
    found = [Verdicts(machine, 0.0, tuple(ROWS))]
    monkeypatch.setattr(keye_kernels, "verdicts", lambda _: found[0])
    return found


def test_a_line_for_each_gap(tuned, capsys):
    main([])
    assert len(capsys.readouterr().out.splitlines()) == 3
    tuned[0] = None
    main([])
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("tuned")
def test_both_candidates_run_between_the_marks(monkeypatch):
    events = []
    run = _backends.run_candidate

    def recorded(op, name, args):
        events.append(name)
        assert args[0].shape == (1, 4096)
        return run(op, "reference", args)

    monkeypatch.setattr(_backends, "run_candidate", recorded)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    main(["2"])
    expected = [[name, "start", name, "stop"] for name in ("cuda", "reference")]
    assert events == expected[0] + expected[1]
