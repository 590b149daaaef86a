"""hardware.sh: every failure is written down, and none ends the run."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hardware.sh"


def run(*arguments, script=SCRIPT, **environment):
    return subprocess.run(
        [str(script), *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def test_goes_on_after_failures(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'nothing works here'\nexit 3\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    done = run("1000", PYTHON=str(python), OUT=str(out))
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.txt").read_text()
    assert "tests: FAILED with 3, " in summary
    assert "nothing works here" in summary
    assert "benchmark, sampling: FAILED with 3" in summary
    assert "total: " in summary.splitlines()[-1]
    assert {path.name for path in out.iterdir()} <= {"summary.txt", "tests.txt"}


def test_stops_what_takes_too_long_and_goes_on(tmp_path):
    """With a clock that only what hangs moves, by as much as it is given: all of pytest hangs."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $* in *slug*) echo cpu;; esac\n")
    python.chmod(0o755)
    stopped = tmp_path / "stopped"
    clock = f"""
unset SECONDS
SECONDS=0
timeout() {{
  [[ $1 == --* ]] || {{ shift && "$@" && return; }}
  [[ " $* " == *" -m pytest "* ]] || {{ "${{@:4}}" && return; }}
  echo "${{*:1:3}}" >>"{stopped}"
  ((SECONDS += $3))
  return 124
}}
"""
    script = SCRIPT.read_text().replace("set -u\n", f"set -u\n{clock}", 1)
    copy = tmp_path / "hardware.sh"
    copy.write_text(script.replace('"$(dirname "$0")/.."', f'"{SCRIPT.parents[1]}"'))
    copy.chmod(0o755)
    out = tmp_path / "out"
    done = run("1", script=copy, PYTHON=str(python), OUT=str(out))
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.txt").read_text()
    assert "tests: stopped after 10 s" in summary  # a quarter of 60 s, less 5 s for its last words
    assert "benchmark, varlen_attention: stopped after 7 s" in summary  # a fifth
    assert "benchmark, linear: stopped after 7 s" in summary
    # What is left, less a tenth of all for ncu, is 9 s; then 5 s, which is not enough to begin.
    assert "benchmark, generate: stopped after 4 s" in summary
    assert "benchmark, norm: not run, the time is used up" in summary
    limits = [f"--signal=INT --kill-after=5 {seconds}" for seconds in (10, 7, 7, 7, 7, 7, 4)]
    assert stopped.read_text().splitlines() == limits


def test_minutes_must_be_a_number():
    done = run("soon")
    assert done.returncode == 2
    assert "minutes must be a positive whole number, got soon" in done.stderr


def test_model_is_importable_with_the_stand_in_for_pyav():
    stand_ins = SCRIPT.parent / "stand_ins"
    code = "import av; from keye_model import *; print(av.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SCRIPT.parents[1],
        env=os.environ | {"PYTHONPATH": f"{stand_ins}:{SCRIPT.parents[1]}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(stand_ins))
