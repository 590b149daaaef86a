"""hardware.sh: every failure is written down, and none ends the run."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hardware.sh"


def run(*arguments, **environment):
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_goes_on_after_failures(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'nothing works here'\nexit 3\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    done = run("1", PYTHON=str(python), OUT=str(out))
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.txt").read_text()
    assert "tests: FAILED with 3, " in summary
    assert "nothing works here" in summary
    assert "benchmark, sampling: FAILED with 3" in summary
    assert "total: " in summary.splitlines()[-1]
    assert {path.name for path in out.iterdir()} <= {"summary.txt", "tests.txt"}


def test_stops_what_takes_too_long_and_goes_on(tmp_path):
    python = tmp_path / "python"
    hang = 'case "$*" in *" tests") exec sleep 100;; esac'
    python.write_text(f"#!/bin/sh\n{hang}\n")
    python.chmod(0o755)
    script = SCRIPT.read_text().replace("budget=$((60 * minutes))", "budget=$((33 * minutes))")
    short = tmp_path / "hardware.sh"
    short.write_text(script.replace('"$(dirname "$0")/.."', f'"{SCRIPT.parents[1]}"'))
    short.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run(
        [str(short), "1"],
        env=os.environ | {"PYTHON": str(python), "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert "tests: stopped after 3 s" in summary  # a quarter of 33 s, less 5 s for its last words
    # A fifth is not enough to begin with.
    assert "benchmark, sampling: not run, the time is used up" in summary


def test_minutes_must_be_a_number():
    done = run("soon")
    assert done.returncode == 2
    assert "minutes must be a positive whole number, got soon" in done.stderr


def test_model_is_importable_with_the_stand_in_for_pyav():
    stand_ins = SCRIPT.parent / "stand_ins"
    code = "import av, keye_model; print(av.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SCRIPT.parents[1],
        env=os.environ | {"PYTHONPATH": f"{stand_ins}:{SCRIPT.parents[1]}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(stand_ins))
