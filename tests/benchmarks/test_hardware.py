"""hardware.sh without a GPU: its order, limits, continuation, and what each failure leaves.

All its commands are stand-ins, and only they move its clock.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hardware.sh"
KEY = "nvidia-h200-0123abcd"
# In place of `timeout`: a command takes the seconds that it leaves in the file `took`.
CLOCK = """
unset SECONDS
SECONDS=0
timeout() {
  while [[ $1 == --* ]]; do shift; done
  local limit=$1 code took=0
  shift
  "$@"
  code=$?
  [[ -e took ]] && took=$(<took) && rm took
  ((took <= limit)) || { took=$limit code=124; }
  ((SECONDS += took))
  return $code
}
"""
STEPS = [
    "facts",
    "build",
    "tune",
    "end to end, decode_step",
    "end to end, tower",
    "end to end, request",
    "tests, graphs",
    "tests, large kernels",
    "tests, small kernels",
    "ncu, linear: 1.3x",
    "ncu, gelu: 1.1x",
    "smallest",
    "sanitizer, memcheck",
    "sanitizer, racecheck",
    "sanitizer, synccheck",
    "sanitizer, initcheck",
]
# Of which command each step is, as a pattern of a shell's `case`.
COMMANDS = {
    "facts": "*-m benchmarks.environment",
    "build": "*setup.py build_ext --inplace",
    "tune": "*print(tune(op=*progress))",
    **{f"end to end, {x}": f"*::bench_{x} *" for x in ("decode_step", "tower", "request")},
    "tests, graphs": "*tests/model/engine/test_workspace.py*",
    "tests, large kernels": "*tests/kernels/test_linear.py*",
    "tests, small kernels": "*tests/kernels/test_norm.py*",
    "ncu, linear: 1.3x": "ncu *-m benchmarks.gaps 1",
    "ncu, gelu: 1.1x": "ncu *-m benchmarks.gaps 2",
    "smallest": "python -m benchmarks.smallest",
    **{
        f"sanitizer, {x}": f"compute-sanitizer --tool {x} *"
        for x in ("memcheck", "racecheck", "synccheck", "initcheck")
    },
}


class Machine:
    """A copy of the script, and stand-ins for what it calls.

    `behave` maps patterns of command lines to shell code; `takes`, `fails` make such code.
    """

    def __init__(self, root):
        self.root, self.bin, self.out = root, root / "bin", root / "out"
        self.folder = root / "build" / "hardware" / KEY
        self.verdicts = root / "build" / "hardware" / "verdicts" / "verdicts.json"
        self.behave = {
            "*slug*": f"echo {KEY}",
            COMMANDS["tune"]: self.tunes(),
            "*-m keye_kernels tune --show": f"[ -e {self.verdicts} ]",
            "*-m benchmarks.gaps": "echo linear: 1.3x; echo gelu: 1.1x",
        }
        (root / "benchmarks").mkdir()
        (root / "keye_kernels").mkdir()
        script = SCRIPT.read_text().replace("set -u\n", f"set -u\n{CLOCK}", 1)
        self.script = root / "benchmarks" / "hardware.sh"
        self.script.write_text(script)
        self.script.chmod(0o755)
        self.bin.mkdir()
        for name in ("python", "nvidia-smi", "nvcc", "ncu", "compute-sanitizer"):
            self.stand_in(name)
        for name in ("awk", "bash", "cat", "cp", "cut", "date", "dirname", "env", "grep", "gzip"):
            (self.bin / name).symlink_to(shutil.which(name))
        for name in ("head", "mkdir", "mv", "nproc", "rm", "sh", "tail", "tar", "tee", "touch"):
            (self.bin / name).symlink_to(shutil.which(name))

    def tunes(self, left=""):
        """Tunes all ops but those in `left`."""
        return f"echo {left!r} >{self.verdicts}"

    def stand_in(self, name):
        path = self.bin / name
        # What the script asks for untuned ops is answered from the stand-in for the verdicts.
        path.write_text(
            f'#!/bin/sh\nline="{name} $*"\nPATH="{os.environ["PATH"]}"\n'
            f'case $line in *"not in tuned"*) cat {self.verdicts}; exit;; esac\n'
            f'case $line in *slug*) ;; *) echo "$line" >>{self.root}/calls;; esac\n'
            f". {self.root}/behave\n"
        )
        path.chmod(0o755)

    def call(self, *minutes):
        """Runs the script; gives what it printed, without the line with the date."""
        cases = "".join(
            f"  {re.sub(r'[ =:()]', lambda m: chr(92) + m[0], pattern)})\n    {code};;\n"
            for pattern, code in self.behave.items()
        )
        (self.root / "behave").write_text(f"case $line in\n{cases}esac\n")
        (self.root / "calls").write_text("")
        done = subprocess.run(
            [str(self.script), *minutes],
            env={"PATH": str(self.bin), "PYTHON": "python", "OUT": str(self.out)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        first, *lines = done.stdout.splitlines()
        assert first.startswith("-- 20")
        assert f" minutes, {KEY}" in first
        return lines

    def calls(self):
        return (self.root / "calls").read_text().splitlines()

    def read(self, name):
        return (self.folder / name).read_text()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def takes(seconds, then="exit 0"):
    return f"echo {seconds} >took; {then}"


def names(lines):
    """Of the steps that ran, in order."""
    return [found[1] for x in lines if (found := re.match(r"(.*): (ok|FAILED|stopped)\b", x))]


def test_the_order(machine):
    lines = machine.call()
    assert names(lines) == STEPS
    assert all(line.endswith(": ok, 0 s") for line in lines[:-1])
    assert lines[-1] == f"total: 0 s of 330 s, results in build/hardware/{KEY}"
    assert machine.read("ended.txt").splitlines() == STEPS


def test_what_the_commands_are_told(machine):
    machine.call()
    calls = "\n".join(machine.calls())
    assert "--max-worker-restart 40" in calls
    assert "--maxfail" not in calls
    for tool in re.findall("(?:ncu|compute-sanitizer) .*", calls):
        assert "--target-processes application-only" in tool
    results = f"--results {machine.folder} "
    assert calls.count(results) == 3
    for line in calls.splitlines():
        if "pytest" in line and "tests/" in line:
            assert " -v " in line
    tests = set(re.findall(r"tests/\S+\.py", calls))
    assert len(tests) == 17
    assert all((SCRIPT.parents[1] / path).is_file() for path in tests)


def test_a_failure_is_noted_and_the_next_step_starts(machine):
    machine.behave |= dict.fromkeys(COMMANDS.values(), "echo 'nothing works here'; exit 3")
    lines = machine.call()
    assert lines[:-1] == [f"{name}: FAILED with 3, 0 s: nothing works here" for name in STEPS]
    assert names(machine.call()) == [], "nor is one tried again"


def test_each_step_has_a_limit(machine):
    machine.behave |= dict.fromkeys(COMMANDS.values(), takes(10**6))
    lines = machine.call("100")
    assert names(lines) == STEPS
    for line in lines[:-1]:
        limit = int(re.search(r": stopped after (\d+) s, its limit$", line)[1])
        assert 30 < limit < 240
    assert names(machine.call("100")) == []


def test_the_second_call_goes_on(machine):
    seconds = dict.fromkeys(COMMANDS.values(), 30) | {COMMANDS["tune"]: 150}
    for pattern, count in seconds.items():
        machine.behave[pattern] = takes(count, machine.behave.get(pattern, "exit 0"))
    first = machine.call("5.5")
    # 30 + 30 + 150 + 3 * 30, and 30 s more that this call does not have to its end.
    assert names(first) == STEPS[:7]
    assert first[6] == "tests, graphs: stopped after 17 s, the end of this call"
    assert first[-2].startswith("left for the next call: tests, graphs; tests, large kernels; ")
    second = machine.call("5.5")
    assert names(second) == STEPS[6:]
    assert "left for the next call" not in "".join(second)
    assert "environment" not in "".join(machine.calls())


def test_short_steps_take_what_long_ones_leave(machine):
    machine.behave[COMMANDS["tune"]] = takes(37, machine.tunes())
    lines = machine.call("1")
    ran = names(lines)
    assert "tests, graphs" not in ran
    assert [name for name in ran if name.startswith(("ncu", "sanitizer"))]
    assert "left for the next call: end to end, decode_step; " in lines[-2]


def test_tuning_goes_on_op_by_op(machine):
    """Where one process was stopped, by the end of a call here, or failed."""
    machine.behave[COMMANDS["tune"]] = machine.tunes("gelu sample") + "; " + takes(10**6)
    machine.behave["*print(tune(op=*progress)) sample"] = "echo 'it cannot'; exit 1"
    lines = machine.call("1")
    assert lines[2] == "tune: stopped after 55 s, the end of this call"
    assert "left for the next call: tune; tune, gelu; tune, sample; end to end" in lines[-2]
    lines = machine.call()
    assert lines[:2] == ["tune, gelu: ok, 0 s", "tune, sample: FAILED with 1, 0 s: it cannot"]
    assert names(lines)[2:] == STEPS[3:]
    assert names(machine.call()) == []


def test_tuning_that_failed_goes_on_op_by_op(machine):
    machine.behave[COMMANDS["tune"]] = f"{machine.tunes('linear')}; exit 1"
    assert names(machine.call())[2:5] == ["tune", "tune, linear", "end to end, decode_step"]


def test_results_are_out_after_each_step(machine):
    machine.behave[COMMANDS["build"]] = "echo built >keye_kernels/_C.cpython-312.so"
    machine.behave[COMMANDS["tests, graphs"]] = f"cp {machine.out}/* {machine.root}; exit 1"
    machine.call()
    assert {path.name for path in machine.out.iterdir()} == {"summary.txt", "hardware.tar.gz"}
    assert "end to end, request: ok" in (machine.root / "summary.txt").read_text()
    elsewhere = machine.root / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["tar", "-xzf", machine.root / "hardware.tar.gz"], cwd=elsewhere, check=True)
    assert (elsewhere / machine.verdicts.relative_to(machine.root)).exists()
    kept = elsewhere / "build" / "hardware" / KEY
    assert (kept / "ended.txt").read_text().splitlines() == STEPS[:6]
    assert "== end to end, tower: exit 0" in (kept / "end_to_end.txt").read_text()
    assert (machine.out / "summary.txt").read_text() == machine.read("summary.txt")


def test_verdicts_outlive_a_change_of_other_sources(machine):
    machine.call()
    machine.behave["*slug*"] = f"echo {KEY}-changed"
    assert names(machine.call()) == [name for name in STEPS if name != "tune"]
    machine.verdicts.unlink()
    machine.behave["*slug*"] = f"echo {KEY}-whose-kernels-changed"
    assert names(machine.call()) == STEPS


def test_another_copy_gets_the_extension_that_was_tuned(machine):
    library = machine.root / "keye_kernels" / "_C.cpython-312.so"
    machine.behave[COMMANDS["build"]] = f"echo built >{library}"
    machine.call()
    library.unlink()
    machine.call()
    assert library.read_text() == "built\n"


def test_what_is_missing_is_said_early(machine):
    machine.behave[COMMANDS["facts"]] = "echo gpu: H200; echo MISSING gcc: no Triton"
    assert machine.call()[:2] == ["facts: ok, 0 s", "MISSING gcc: no Triton"]
    assert "gpu: H200" in machine.read("facts.txt")


def test_without_the_tools(machine):
    for name in ("nvcc", "ncu", "compute-sanitizer"):
        (machine.bin / name).unlink()
    lines = machine.call()
    elsewhere = Path("/usr/local/cuda/bin/nvcc").exists()
    assert ("build: not run, there is no nvcc" in lines) is not elsewhere
    assert "ncu: not run, it is not there" in lines
    assert "sanitizer: not run, compute-sanitizer is not there" in lines


def test_without_xdist_av_and_the_model(machine):
    machine.behave["*import xdist"] = machine.behave["*import pytest_timeout"] = "exit 1"
    machine.behave["*import av"] = "exit 1"
    machine.behave["*from keye_model import*"] = "echo ModuleNotFoundError: no PIL; exit 1"
    machine.behave[COMMANDS["tests, small kernels"]] = "echo $PYTHONPATH"
    lines = machine.call()
    reason = "keye_model cannot be imported, what needs it is not run: ModuleNotFoundError: no PIL"
    assert reason in lines
    assert names(lines) == [*STEPS[:3], *STEPS[7:]]
    calls = "\n".join(machine.calls())
    assert "--max-worker-restart" not in calls
    assert "--timeout" not in calls
    assert f"{machine.root}/benchmarks/stand_ins" in machine.read("tests.txt")


def test_without_a_working_python(tmp_path):
    """Real clock and real `timeout`: each step fails at once."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'nothing works here'\nexit 3\n")
    python.chmod(0o755)
    (tmp_path / "benchmarks").mkdir()
    copy = shutil.copy(SCRIPT, tmp_path / "benchmarks")
    environment = {k: v for k, v in os.environ.items() if k != "OUT"}
    done = subprocess.run(
        [copy, "1000"],
        env=environment | {"PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "build" / "hardware" / "unknown" / "summary.txt").read_text()
    assert "the benchmarks cannot be imported: nothing works here" in summary
    assert "tune: FAILED with 3, " in summary
    assert "tests, small kernels: FAILED with 3, " in summary
    assert "total: " in summary.splitlines()[-1]


@pytest.mark.parametrize("minutes", ["soon", "0", "-1", "1,5", "5.5m"])
def test_minutes_must_be_a_number(minutes):
    done = subprocess.run([SCRIPT, minutes], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"minutes must be a positive number, got {minutes}" in done.stderr


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
