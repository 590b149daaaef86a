"""One small op through the whole harness, and what happens to a provider that is wrong."""

import gzip
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.measure import Measure, difference
from benchmarks.providers import (
    Provider,
    absent,
    accepted,
    library,
    only,
    reason_of,
    torch_varlen,
)
from benchmarks.record import Report
from benchmarks.timing import ON_GPU, Ceilings, Timing, race
from keye_kernels import reference

CEILINGS = Ceilings(copy_bandwidth=1e9, matmul_rate=1e12)


def arguments(device):
    return {"gate_up": torch.randn(3, 64, device=device)}


CASE = Case("silu_mul", "3 x 32", arguments, num_bytes=3 * 96 * 4)


def eager(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def refuse(gate_up):
    raise ValueError(f"no width of {gate_up.shape[1]}\nand more")


@pytest.fixture
def report():
    return Report({"gpu": ""}, CEILINGS)


@pytest.fixture
def measure(report):
    return Measure(report, seconds=0.01)


def test_an_op_end_to_end(measure, report):
    peers = {
        "eager": Provider(eager),
        "wrong": Provider(lambda gate_up: eager(gate_up) * 1.1),
        "unwritten": Provider(lambda gate_up: eager(gate_up) * float("nan")),
        "refuses": Provider(refuse),
        "liger": absent("needs a GPU"),
    }
    measure(CASE, peers)
    rows = {row.provider: row for row in report.rows}
    assert rows["ours (reference)"].ours
    assert rows["ours (reference)"].best_peer == rows["eager"].seconds > 0
    assert rows["eager"].limit == pytest.approx(1152e-9)
    assert rows["eager"].size == 3
    notes = {name: row.note for name, row in rows.items() if row.seconds is None}
    assert notes == {
        "wrong": "absent: wrong, relative error 0.1",
        "unwritten": "absent: wrong, relative error nan",
        "refuses": "absent: refused, ValueError: no width of 64",
        "liger": "absent: needs a GPU",
    }


def test_ours_must_be_right(measure, report):
    providers = {"ours": Provider(lambda x: x + 1, ours=True), "eager": Provider(lambda x: x)}
    with pytest.raises(AssertionError, match=r"op, case: .*relative error"):
        measure.compare(
            "op", "case", make=lambda: {"x": torch.ones(4)}, providers=providers, definition=abs_of
        )
    assert [row.provider for row in report.rows if row.seconds] == ["eager"]


def abs_of(x):
    return x.abs()


def test_what_an_op_writes_in_place_is_compared(measure, report):
    def arguments(device):
        return {
            "q": torch.randn(3, 2, 8, device=device),
            "k": torch.randn(3, 2, 8, device=device),
            "positions": torch.ones(3, 2, dtype=torch.int64, device=device),
        }

    def rotated(_, inputs):
        return inputs["q"], inputs["k"]

    def peer(q, k, positions, halved):
        reference.rope_2d_(q, k, positions)
        return (q / 2, k) if halved else (q, k)

    measure(
        Case("rope_2d_", "tiny", arguments, num_bytes=1),
        {"peer": Provider(peer)},
        outputs=rotated,
        prepare=lambda _: {"halved": True},
    )
    rows = {row.provider: row.note for row in report.rows}
    assert rows["ours (reference)"] == ""
    assert rows["peer"] == "absent: wrong, relative error 0.5"


def test_differences():
    x = torch.ones(2, 3)
    assert difference((x, x), (x, x)) == ""
    assert difference((x,), (x, x)) == "1 results instead of 2"
    assert difference(x[:1], x) == "shape (1, 3) instead of (2, 3)"
    assert difference(x * 1.005, x) == ""
    tokens = torch.tensor([1000, 2000])
    assert difference(tokens, tokens.clone()) == ""
    assert "relative error" in difference(tokens + 1, tokens)


@pytest.mark.skipif(ON_GPU, reason="a GPU tells the time by its events")
def test_providers_take_turns(monkeypatch):
    calls, now = [], 0.0

    def provider(name, duration):
        def run(x):
            nonlocal now
            calls.append(name)
            now += duration
            return x

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    timings = race(
        {"slow": provider("slow", 0.004), "fast": provider("fast", 0.002)},
        lambda: {"x": torch.ones(1)},
        seconds=0.057,  # a quarter of it before, as warm-up
    )
    assert calls == ["slow", "slow", "fast", "fast"] + ["slow", "fast"] * (3 + 10)
    assert timings["slow"] == Timing(pytest.approx(0.004), pytest.approx(0, abs=1e-9), 10)
    assert timings["fast"] == Timing(pytest.approx(0.002), pytest.approx(0, abs=1e-9), 10)


def test_limit_is_the_longer_of_both():
    assert CEILINGS.limit(10**9, 10**11) == 1.0
    assert CEILINGS.limit(10**6, 10**12) == 1.0


def test_profile_writes_a_trace_with_the_op_in_it(tmp_path):
    measure = Measure(None, seconds=0, trace_folder=tmp_path)
    measure(CASE, {"eager": Provider(eager)})
    (path,) = tmp_path.iterdir()
    assert path.name == "silu_mul-3-x-32.json.gz"
    trace = gzip.decompress(path.read_bytes()).decode()
    assert "silu_mul-3 x 32 eager" in trace
    assert "keye::silu_mul" in trace


def test_ranges_name_stages_layers_and_ops():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Module()
            self.visual.layers = torch.nn.ModuleList([torch.nn.Identity()])
            self.lm_head = torch.nn.Identity()

        def forward(self, x):
            return self.lm_head(self.visual.layers[0](x))

    model = Model()
    measure = Measure(None, seconds=0, marked=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        measure.compare(
            "op",
            "case",
            make=lambda: {"x": torch.ones(2)},
            providers={"peer": Provider(model)},
            definition=model,
            models=(model,),
        )
    names = {event.name for event in profile.events()}
    assert {"op case peer", "layer 0", "lm_head"} <= names
    assert not model.lm_head._forward_hooks, "nothing stays on the model"


def test_a_library_that_is_not_there_is_absent_with_the_reason():
    provider = library("no_such_library", lambda module: module.function)
    assert provider.run is None
    assert provider.absent == "ModuleNotFoundError: No module named 'no_such_library'"
    assert library("math", lambda module: module.no_such).absent.startswith("AttributeError")
    assert library("math", lambda module: module.sqrt).run(4) == 2


def test_reason_without_a_text():
    assert reason_of(KeyError()) == "KeyError"


def test_only_named_providers():
    providers = {"ours (triton)": absent(""), "eager": absent("")}
    assert list(only(providers, ["ours"])) == ["ours (triton)"]
    assert list(only(providers, [])) == ["ours (triton)", "eager"]


class Release:
    """A module with `varlen_attn` as some release of PyTorch has it."""

    def __init__(self, function):
        self.varlen_attn = function


def test_varlen_keywords_of_old_and_new_releases():
    def old(*_, is_causal=False):
        return {"is_causal": is_causal}

    def new(*_, window_size=(-1, -1), enable_gqa=False):
        return {"window_size": window_size, "enable_gqa": enable_gqa}

    lengths = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    inputs = dict.fromkeys(("q", "k", "v", *lengths))
    assert torch_varlen(causal=True)(Release(old))(**inputs) == {"is_causal": True}
    grouped = torch_varlen(causal=True, grouped=True)(Release(new))
    assert grouped(**inputs) == {"window_size": (-1, 0), "enable_gqa": True}
    full = torch_varlen(causal=False)(Release(new))
    assert full(**inputs) == {"window_size": (-1, -1), "enable_gqa": False}
    with pytest.raises(NotImplementedError, match="no causal mask"):
        torch_varlen(causal=True)(Release(lambda q: q))
    assert accepted(new, {"enable_gqa": True, "scale": 1.0}) == {"enable_gqa": True}
