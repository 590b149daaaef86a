"""Tests after one that broke CUDA run in another process, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """
class cuda:
    broken = False
    is_initialized = lambda: True
    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
TESTS = """
import torch
def test_before():
    pass
def test_that_raises():
    torch.cuda.broken = True
    torch.cuda.synchronize()
def test_between():
    assert not torch.cuda.broken
def test_that_says_nothing():
    torch.cuda.broken = True
def test_after():
    assert not torch.cuda.broken
"""


@pytest.fixture
def report(tmp_path):
    """Runs pytest with a stand-in for torch, gives what it prints."""
    (tmp_path / "torch.py").write_text(FAKE)
    (tmp_path / "test_faults.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    root = Path(__file__).parents[1]
    # The hook alone: tests/conftest.py needs the real torch.
    (tmp_path / "conftest.py").write_text((root / "tests/broken_cuda.py").read_text())

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            [*command, "test_faults.py"],
            cwd=tmp_path,
            env=clean | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    return run


def test_the_worker_is_replaced(report):
    pytest.importorskip("xdist")
    text = report("-p", "xdist", "-n", "1", "--max-worker-restart", "5")
    for name in ("test_before", "test_between", "test_after"):
        assert f"PASSED test_faults.py::{name}" in text, text
    assert "RuntimeError: CUDA error: an illegal memory access" in text
    for name in ("test_that_raises", "test_that_says_nothing"):
        assert f"crashed while running 'test_faults.py::{name}'" in text
    assert "maximum crashed workers" not in text


def test_without_workers_the_run_stops(report):
    text = report()
    assert "CUDA is broken in this process since test_faults.py::test_that_raises" in text
    assert "1 failed, 1 passed" in text
