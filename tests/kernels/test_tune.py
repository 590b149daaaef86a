"""Candidates are proved and timed in processes of their own; `auto` takes what was proved."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import keye_kernels as kk
from keye_kernels import __main__ as command
from keye_kernels import _backends, _tune, _verdicts
from keye_kernels._tune.cases import all_cases
from keye_kernels._tune.race import judge
from keye_kernels._tune.trial import Trial
from keye_kernels._verdicts import Row, Verdicts
from keye_kernels.varlen_attention import VARIANTS
from tests.kernels import tune_stubs

LAYER_NORM = {"op": "layer_norm", "quick": True, "device": "cpu", "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A directory of this test's own, which does not exist yet."""
    monkeypatch.setenv("KEYE_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_backends, "_default", "auto")
    _verdicts.current.cache_clear()
    yield tmp_path / "cache"
    _verdicts.current.cache_clear()


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, for a test to change."""
    copy = {op: {**candidates} for op, candidates in _backends._registry.items()}
    monkeypatch.setattr(_backends, "_registry", copy)
    monkeypatch.setattr(_backends, "_chosen", {})


def row(candidate, status="right", microseconds=None, spread=0.0, case="one", **changes):
    """A row of silu_mul for 8 numbers in fp32."""
    spread = None if microseconds is None else spread
    made = Row("silu_mul", candidate, case, ("float32",), (8,), status, "", microseconds, spread)
    return replace(made, **changes)


def negate(gate_up, out):
    out.copy_(-gate_up[:, : out.shape[1]])


@pytest.mark.usefixtures("registry")
def test_each_fault_is_found_and_costs_nothing_else(monkeypatch, cache):
    monkeypatch.setenv("KEYE_TUNE_STUBS", "1")
    verdicts = _tune.run(LAYER_NORM, modules=["tests.kernels.tune_stubs"], limit=10.0)
    for stub, (status, reason) in tune_stubs.FAULTS.items():
        found = verdicts.bad("layer_norm", stub.__name__)
        assert found is not None, stub
        assert (found.status, found.reason[: len(reason)]) == (status, reason), found
    by_name = {one.candidate: one.status for one in verdicts.rows}
    assert by_name["is_slower"] == "right"
    assert by_name["is_refused"] == "refused"
    assert by_name["is_absent"] == "absent"
    chosen = {one.candidate for one in verdicts.rows if one.status == "chosen"}
    assert chosen == {"reference"}
    assert verdicts.path.parent == cache

    tune_stubs.register()
    x, weight, bias = torch.randn(130, 136), torch.randn(136), torch.randn(136)
    got = kk.layer_norm(x, weight, bias, 1e-6)
    torch.testing.assert_close(got, kk.reference.layer_norm(x, weight, bias, 1e-6))
    told = str(kk.backends("cpu")["layer_norm"])
    assert "reference for 1024 rows" in told
    assert "tuned just now" in told


@pytest.mark.usefixtures("registry")
def test_a_default_that_is_wrong_here_does_not_serve(monkeypatch):
    _backends.register("silu_mul", "triton", negate, device_types=("cpu",))
    x = torch.randn(2, 8)
    assert torch.equal(kk.silu_mul(x), -x[:, :4])
    bad = row("triton", "wrong", reason="largest error 1 exceeds 0.1")
    _verdicts.save("cpu", [bad, row("reference", "chosen", 1.0)])
    _verdicts.current.cache_clear()
    monkeypatch.setattr(_backends, "_chosen", {})
    torch.testing.assert_close(kk.silu_mul(x), kk.reference.silu_mul(x))
    served = kk.backends("cpu")["silu_mul"]
    assert served.backend == "reference"
    assert served.why_not["triton"] == "wrong on this machine: largest error 1 exceeds 0.1"
    with kk.use_backend("triton"):  # by name it is still what was asked for
        assert torch.equal(kk.silu_mul(x), -x[:, :4])


@pytest.mark.usefixtures("registry")
def test_auto_takes_the_verdict_of_the_nearest_shapes():
    _backends.register("silu_mul", "negate", negate, device_types=("cpu",))
    large = {"case": "large", "sizes": (2**16,)}
    _verdicts.save("cpu", [row("negate", "chosen", 1.0), row("reference", "chosen", 2.0, **large)])
    for numel, negated in ((8, True), (64, True), (2**10, False), (2**20, False)):
        x = torch.randn(1, numel)
        wanted = -x[:, : numel // 2] if negated else kk.reference.silu_mul(x)
        torch.testing.assert_close(kk.silu_mul(x), wanted)
    half = torch.randn(1, 8).half()  # no verdict of this dtype
    torch.testing.assert_close(kk.silu_mul(half), kk.reference.silu_mul(half))


@pytest.mark.usefixtures("registry")
def test_what_the_chosen_candidate_refuses_goes_to_the_default():
    _backends.register(
        "silu_mul", "negate", negate, device_types=("cpu",),
        refuses=lambda gate_up, _: "odd" if gate_up.shape[0] % 2 else None,
    )  # fmt: skip
    _verdicts.save("cpu", [row("negate", "chosen", 1.0)])
    odd, even = torch.randn(1, 8), torch.randn(2, 8)
    torch.testing.assert_close(kk.silu_mul(odd), kk.reference.silu_mul(odd))
    assert torch.equal(kk.silu_mul(even), -even[:, :4])


@pytest.mark.usefixtures("registry")
def test_a_candidate_that_is_gone_is_not_missed():
    on_cpu = {"device_types": ("cpu",), "why_not": lambda: "cannot be imported"}
    _backends.register("silu_mul", "removed", negate, **on_cpu)
    large = {"case": "large", "sizes": (2**16,)}
    rows = [row("not_registered_here", "chosen", 1.0), row("removed", "chosen", 1.0, **large)]
    _verdicts.save("cpu", rows)
    for width in (8, 2**16):
        x = torch.randn(1, width)
        torch.testing.assert_close(kk.silu_mul(x), kk.reference.silu_mul(x))


@pytest.mark.usefixtures("registry")
def test_the_choice_holds_for_the_life_of_a_process():
    x = torch.randn(1, 8)
    _backends.register("silu_mul", "negate", negate, device_types=("cpu",))
    kk.silu_mul(x)
    _verdicts.save("cpu", [row("negate", "chosen", 1.0)])
    torch.testing.assert_close(kk.silu_mul(x), kk.reference.silu_mul(x))


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([row("a", microseconds=10.0), row("b", microseconds=9.0)], "b"),
        ([row("a", microseconds=10.0, spread=0.6), row("b", microseconds=9.0, spread=0.5)], "a"),
        ([row("a", microseconds=10.0), row("b", "wrong"), row("c", "refused")], "a"),
        ([row("a", microseconds=9.0), row("b", microseconds=2.0), row("b", "hung")], "a"),
        ([row("a", "crashed"), row("b", microseconds=2.0)], "b"),
        ([row("a", microseconds=9.0), row("b", microseconds=8.0), row("c", microseconds=7.0)], "c"),
        ([row("a", "refused"), row("b", "absent")], None),
    ],
)
def test_the_simplest_stays_unless_another_wins_by_more_than_the_spread(rows, chosen):
    judged = judge(rows, ["a", "b", "c"])
    names = [one.candidate for one in judged if one.status == "chosen"]
    assert names == ([] if chosen is None else [chosen])


def changed(facts):
    for name in facts:
        if name != "type":
            yield name, {**facts, name: "other"}


def test_verdicts_of_another_driver_version_or_source_are_none(monkeypatch):
    _verdicts.save("cpu", [row("negate", "chosen", 1.0)])
    facts = _verdicts.machine("cpu")
    assert set(facts) == {"type", "device", "cores", "torch", "triton", "sources"}
    assert _verdicts.load("cpu")[0].rows[0].candidate == "negate"
    for name, other in changed(facts):
        monkeypatch.setattr(_verdicts, "machine", lambda _, other=other: other)
        verdicts, reason = _verdicts.load("cpu")
        assert verdicts is None
        elsewhere = "never tuned here" if name == "device" else "other versions were tuned here"
        assert reason.startswith(elsewhere)


def test_a_gpu_is_known_by_name_driver_and_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    facts = _verdicts.machine.__wrapped__("cuda")
    assert facts["device"] == "NVIDIA H100 80GB HBM3"
    assert {"driver", "cuda"} <= set(facts)
    assert _verdicts.path_of(facts).name.startswith("cuda-nvidia-h100-80gb-hbm3-")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "damaged: JSONDecodeError"),
        ("[]", "damaged: TypeError"),
        ("{}", "damaged: KeyError"),
        ('{"machine": {}, "made": 0, "rows": []}', "of another machine"),
    ],
)
def test_a_damaged_or_foreign_file_is_as_none(content, reason, cache):
    path = _verdicts.path_of(_verdicts.machine("cpu"))
    cache.mkdir()
    path.write_text(content)
    verdicts, why = _verdicts.load("cpu")
    assert verdicts is None
    assert reason in why
    x = torch.randn(1, 8)
    torch.testing.assert_close(kk.silu_mul(x), kk.reference.silu_mul(x))
    assert kk.verdicts("cpu") is None


@pytest.mark.parametrize("damage", [{"rows": 1}, {"made": "x"}, {"rows": [{"op": "a"}]}])
def test_damage_inside_the_file_is_found(damage):
    path = _verdicts.save("cpu", [row("negate", "chosen", 1.0)]).path
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    verdicts, why = _verdicts.load("cpu")
    assert verdicts is None
    assert "damaged" in why


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("KEYE_KERNELS_CACHE", str(blocked))
    verdicts = _verdicts.save("cpu", [row("negate", "chosen", 1.0)])
    assert verdicts.path is None
    assert verdicts.rows[0].candidate == "negate"
    assert "cannot be written" in capsys.readouterr().err
    assert _verdicts.load("cpu")[0] is None
    torch.testing.assert_close(kk.silu_mul(torch.ones(1, 2)), torch.tensor([[0.731059]]))


def test_ops_are_replaced_one_by_one():
    _verdicts.save("cpu", [row("a", "chosen", 1.0), row("b", op="gelu")])
    kept = _verdicts.save("cpu", [row("c", "chosen", 1.0)])
    assert [(one.op, one.candidate) for one in kept.rows] == [("gelu", "b"), ("silu_mul", "c")]


_SAVES = """
import sys
from keye_kernels import _verdicts
from tests.kernels.test_tune import row
for i in range(30):
    _verdicts.save("cpu", [row("x" * 2000, op=f"{sys.argv[1]}{i}")])
"""


def test_two_processes_at_once_lose_nothing():
    processes = [subprocess.Popen([sys.executable, "-c", _SAVES, name]) for name in "ab"]
    while any(process.poll() is None for process in processes):
        _, reason = _verdicts.load("cpu")
        assert reason in ("", "never tuned here")
        time.sleep(0.01)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(_verdicts.load("cpu")[0].rows) == 60


def test_one_line_says_that_nothing_was_tuned(monkeypatch, capsys):
    monkeypatch.setattr(_backends, "_chosen", {})
    kk.silu_mul(torch.ones(1, 2))
    assert capsys.readouterr().err == ""  # no terminal
    _verdicts.current.cache_clear()
    monkeypatch.setattr(_backends, "_chosen", {})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    kk.silu_mul(torch.ones(1, 2))
    kk.rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "never tuned here" in said
    assert "python -m keye_kernels tune" in said


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"op must be one of .*silu_mul.*, got 'softmax'"):
        kk.tune(op="softmax", device="cpu")
    with pytest.raises(ValueError, match="more than one candidate on cpu, got 'silu_mul'"):
        kk.tune(op="silu_mul", device="cpu")
    with pytest.raises(ValueError, match="device must be 'cuda' or 'cpu', got 'tpu'"):
        kk.tune(device="tpu")
    with pytest.raises(ValueError, match=r"dtype must be torch.bfloat16 or .*, got torch.int8"):
        kk.tune(device="cpu", dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device must be there, got 'cuda' without a GPU"):
            kk.verdicts("cuda")


def test_a_process_that_fails_itself_is_an_error():
    with pytest.raises(RuntimeError, match=r"(?s)got exit status 1: .*No module named 'not_there'"):
        _tune.run(LAYER_NORM, modules=["not_there"])


def test_an_interrupt_ends_all_processes(monkeypatch):
    monkeypatch.setenv("KEYE_TUNE_STUBS", "1")
    started = []

    def interrupt(*_):
        started.append(time.monotonic())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune.run(LAYER_NORM, interrupt, modules=["tests.kernels.tune_stubs"], limit=3600.0)
    assert len(started) == 1
    if sys.platform == "linux":
        here = str(Path(__file__).parents[2])
        commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        ours = f'"limit": {3600.0}'.encode()
        assert not [c for c in commands if b"_tune.race" in c and ours in c], here


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_op_has_edges_and_shapes(device_type):
    cases = all_cases(device_type)
    assert {case.op for case in cases} == set(_backends.ops())
    for op in _backends.ops():
        assert any(case.timed for case in cases if case.op == op)
        names = [case.name for case in cases if case.op == op]
        assert len(names) == len(set(names)), op
    quick = all_cases(device_type, quick=True)
    assert {case.op for case in quick if case.timed} == set(_backends.ops())
    assert len(quick) < len(cases)


@pytest.mark.parametrize("case", [c for c in all_cases("cpu") if not c.timed], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_definitions_are_right_at_all_edges(case, dtype):
    with torch.inference_mode():
        status, reason, (kind, sizes) = Trial(case.op, "reference", "cpu", dtype, 0).check(case)
    assert (status, reason) == ("right", "")
    assert kind[0] == str(dtype).removeprefix("torch.")
    assert all(size >= 0 for size in sizes)


@pytest.mark.parametrize("case", [c for c in all_cases("cpu") if not c.timed], ids=str)
def test_candidates_of_a_cpu_are_right_at_all_edges(case):
    for name in _backends.candidates(case.op, "cpu"):
        with torch.inference_mode():
            status, reason, _ = Trial(case.op, name, "cpu", torch.bfloat16, 0).check(case)
        assert status in ("right", "refused"), (name, reason)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_attention_are_right_at_all_edges(name):
    """On a CPU by Triton's interpreter."""
    found = {}
    for case in all_cases("cpu"):
        if case.op == "varlen_attention" and not case.timed:
            with torch.inference_mode():
                status, reason, _ = Trial(case.op, name, "cpu", torch.bfloat16, 0).check(case)
            found[case.name] = status, reason
    assert {status for status, _ in found.values()} <= {"right", "refused"}, found
    assert [status for status, _ in found.values()].count("right") >= 2, found


def test_prefill_in_pieces_is_right_at_all_edges():
    cases = [c for c in all_cases("cpu") if c.op == "paged_prefill_attention" and not c.timed]
    for case in cases:
        with torch.inference_mode():
            found = Trial(case.op, "triton", "cpu", torch.bfloat16, 0).check(case)
        assert found[:2] == ("right", ""), (case, found)


def test_the_command_line(capsys, cache):
    assert command.main(["tune", "--device", "cpu", "--show"]) == 1
    assert "no verdicts for cpu: never tuned here" in capsys.readouterr().err
    _verdicts.save("cpu", [row("negate", "chosen", 1.25, 0.5)])
    assert command.main(["tune", "--device", "cpu", "--show"]) == 0
    assert "1.2 us ± 0.5  chosen" in capsys.readouterr().out
    assert command.main(["tune", "--device", "cpu", "--op", "softmax"]) == 1
    assert "keye_kernels: op must be one of" in capsys.readouterr().err
    assert command.main(["tune", "--device", "cpu", "--clear"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert not list(cache.glob("*.json"))


def test_python_dash_m(cache):
    arguments = ["tune", "--device", "cpu", "--op", "rms_norm", "--quick"]
    done = subprocess.run(
        [sys.executable, "-m", "keye_kernels", *arguments],
        capture_output=True, text=True, env={**os.environ, "KEYE_KERNELS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tuned just now" in done.stdout
    assert "kept in" in done.stdout


def test_verdicts_are_a_table():
    table = Verdicts({"device": "GPU"}, time.time() - 7200, (row("a", "chosen", 3.0), row("b")))
    assert str(table).splitlines() == [
        "GPU, tuned 2 hours ago",
        "silu_mul, one",
        "  a           3.0 us ± 0.0  chosen",
        "  b                         right",
    ]
    assert table.describe("silu_mul") == ("a for one: 3.0 us, tuned 2 hours ago",)
