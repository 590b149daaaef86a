"""`keye tune`, and the demo that tunes first."""

import pytest
import torch

from keye_kernels import _verdicts
from keye_kernels._verdicts import Row
from keye_model import cli, demo

ROW = Row("silu_mul", "reference", "one row", ("float32",), (8,), "chosen", "", 2.5, 0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYE_KERNELS_CACHE", str(tmp_path))
    _verdicts.current.cache_clear()
    yield tmp_path
    _verdicts.current.cache_clear()


def test_show_and_clear(capsys, cache):
    assert cli.main(["tune", "--device", "cpu", "--show"]) == 1
    assert "no verdicts for cpu: never tuned here" in capsys.readouterr().err
    _verdicts.save("cpu", [ROW])
    assert cli.main(["tune", "--device", "cpu", "--show"]) == 0
    assert (
        "silu_mul, one row\n  reference           2.5 us ± 0.5  chosen" in capsys.readouterr().out
    )
    assert cli.main(["tune", "--device", "cpu", "--clear"]) == 0
    assert not list(cache.glob("*.json"))


def test_mistakes_are_one_line(capsys):
    assert cli.main(["tune", "--device", "cpu", "--op", "softmax"]) == 1
    assert "keye: error: op must be one of" in capsys.readouterr().err
    assert cli.main(["tune", "--show", "--clear"]) == 2
    assert "not allowed with argument --show" in capsys.readouterr().err


@pytest.mark.parametrize("known", [None, "verdicts"])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_demo_tunes_a_gpu_that_was_never_tuned(gpu, known, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(demo, "verdicts", lambda device: known if device == "cuda" else 1 / 0)
    monkeypatch.setattr(demo, "tune", lambda **options: calls.append(options["quick"]))
    demo.tune_first()
    assert calls == ([True] if gpu and known is None else [])
    assert ("Proving and timing" in capsys.readouterr().out) == bool(calls)


def test_info_tells_verdicts(monkeypatch):
    _verdicts.save("cpu", [ROW])
    monkeypatch.setattr("keye_kernels._backends._chosen", {})
    monkeypatch.setattr("keye_kernels._backends._default", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = demo.describe_backends()
    assert told.endswith(
        "verdicts of keye tune\n  silu_mul: reference for one row: 2.5 us, tuned just now"
    )
