"""The sweep over launch choices: what it compiles, measures and refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sweep
from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", *arguments],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_a_family_is_compiled_at_each_choice(pytestconfig):
    cache = str(pytestconfig.cache.mkdir("triton"))
    done = run("activation", "--set", "block=256", "--set", "num_warps=1,3", cache=cache)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    by_choice = {row[1]: row for row in rows if row[0] == "silu_mul, 1k tokens"}
    assert list(by_choice) == [
        "* block=1024 num_warps=4", "block=256 num_warps=1", "block=256 num_warps=3"
    ]  # fmt: skip
    present, other, broken = by_choice.values()
    for row in (present, other):
        registers, spills, shared, instructions = map(int, row[2:6])
        assert 0 < registers <= 255
        assert (spills, shared) == (0, 0)
        assert instructions > registers
        assert row[6:] == ["", "", ""]
    assert broken[2:8] == [""] * 6
    assert "num_warps must be a power of 2" in broken[8]
    # What a shape takes anyway stands there once.
    few = [row[1] for row in rows if row[0] == "silu_mul, batch 1"]
    assert few == ["* block=256 num_warps=1", "block=256 num_warps=3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["soup"], "invalid choice: 'soup'"),
        (["rope", "--set", "block=2"], "field of rope must be one of width, pairs, heads"),
        (["rope", "--set", "pairs=2,0"], "pairs must be an int above 0, got '0'"),
        (["rope", "--set", "pairs"], "pairs must be an int above 0, got ''"),
        (["varlen_attention", "--set", "max_registers=all"], "0 or none, got 'all'"),
        (["rope", "--arch", "sm_70"], "invalid choice: 'sm_70'"),
    ],
    ids=["family", "field", "zero", "nothing", "word", "arch"],
)
def test_what_is_not_known_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        sweep.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", sweep.FAMILIES)
def test_each_family_has_fields_and_shapes(family):
    fields = sweep.module_of(family).LaunchConfig._fields
    assert fields
    assert sweep.cases_of(family)
    assert len(sweep._parse(family, [f"{fields[0]}=1,2", f"{fields[-1]}=4,8,16"])) == 6


def tiny(device):
    return {"gate_up": torch.randn(2, 600, device=device)}


def test_choices_are_checked_then_timed():
    case = Case("silu_mul", "tiny", tiny, 2 * 900 * 4)
    variants = [{}, {"block": 512}, {"num_warps": 2, "rows": 2}]
    trials = [sweep.Trial(case, variant, str(variant)) for variant in variants]
    rows = sweep.measure("activation", trials, seconds=0)
    assert [row.provider for row in rows] == ["{}", "{'block': 512}", str(variants[2])]
    assert all(row.seconds > 0 for row in rows)
    line = sweep.row_of(trials[1], [{"registers": 8}], rows)
    assert line[:3] == ["silu_mul, tiny", "{'block': 512}", "8"]
    assert float(line[7]) == pytest.approx(rows[0].seconds / rows[1].seconds, abs=0.01)


def test_a_wrong_choice_is_not_timed(monkeypatch):
    case = Case("silu_mul", "tiny", tiny, 2 * 900 * 4)
    monkeypatch.setattr(sweep.reference, "silu_mul", lambda gate_up: gate_up[:, :300] * 2)
    trials = [sweep.Trial(case, {}, "*")]
    rows = sweep.measure("activation", trials, seconds=0)
    assert rows[0].seconds is None
    assert "wrong, relative error" in sweep.row_of(trials[0], [], rows)[-1]
