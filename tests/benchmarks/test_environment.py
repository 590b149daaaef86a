"""Facts of a run, and what a run on hardware lacks."""

import importlib.util
import shutil
import sysconfig

import keye_kernels
from benchmarks.environment import cpu_model, environment, missing
from keye_kernels._verdicts import Row, Verdicts


def test_cpu_model(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R14 \n\nmodel name: no\n"
    )
    assert cpu_model(info) == "AMD EPYC 9R14"
    info.write_text("processor\t: 0\nBogoMIPS\t: 243.75\n")
    assert cpu_model(info) == cpu_model(tmp_path / "missing") != ""


def test_which_verdicts_served(monkeypatch):
    def facts(*rows):
        found = Verdicts({"device": "NVIDIA H200"}, 1.8e9, rows)
        monkeypatch.setattr(keye_kernels, "verdicts", lambda _: found)
        return environment()["verdicts"]

    one = Row("gelu", "triton", "1 token", ("float32",), (1,), "chosen", "", 3.0, 0.1)
    assert facts(one).startswith("NVIDIA H200, made 2027-01-15T08:00:00Z, digest ")
    assert facts(one) == facts(one) != facts(one, one)
    monkeypatch.setattr(keye_kernels, "verdicts", lambda _: None)
    assert environment()["verdicts"] == ""


def test_what_is_missing(monkeypatch, tmp_path):
    found = {"gcc": "/usr/bin/gcc"}
    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xdist" else 1)
    (tmp_path / "Python.h").touch()
    assert missing() == ["Python's xdist: a kernel's fault ends its step of the tests"]
    found.clear()
    (tmp_path / "Python.h").unlink()
    headers, compiler, _ = missing()
    assert headers.startswith(f"{tmp_path}/Python.h (python3-dev has it): Triton ")
    assert compiler.startswith("gcc or clang: Triton ")
    monkeypatch.setenv("CC", "cc")
    found["cc"] = "/usr/bin/cc"
    assert len(missing()) == 2
