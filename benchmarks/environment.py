"""Where a number was measured: machine, versions, commit, verdicts.

`python -m benchmarks.environment` prints that, and what `hardware.sh` needs and does not find.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import time
from importlib import metadata
from pathlib import Path

import torch

import keye_kernels
from benchmarks.timing import CORES, DEVICE, ON_GPU

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("triton", "transformers", "liger-kernel", "flashinfer-python", "flash-attn-4")


def environment() -> dict[str, str]:
    """Facts by name; an empty one is not there. Without "gpu" the run is one of a CPU."""
    facts = {
        "gpu": torch.cuda.get_device_name(DEVICE) if ON_GPU else "",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if ON_GPU
        else "",
        "cpu": f"{cpu_model()}, {CORES.count} cores, {torch.get_num_threads()} threads",
        "CUDA": torch.version.cuda or "",
        "cuDNN": str(torch.backends.cudnn.version() or ""),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    facts |= {name: _version(name) for name in _PACKAGES}
    return facts | {"commit": _commit(), "sources": _sources(), "verdicts": _verdicts()}


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the CPU, its architecture where the system does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*?)\s*$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def slug(facts: dict[str, str]) -> str:
    """Name of the folder for results of such a machine: "nvidia-h200", or "cpu"."""
    return re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or "cpu").lower()).strip("-")


def missing() -> list[str]:
    """What `hardware.sh` needs and does not find, and what that costs."""
    found = []
    python = Path(sysconfig.get_path("include"), "Python.h")
    if not python.is_file():
        found.append(f"{python} (python3-dev has it): Triton and csrc cannot be built")
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
        found.append("gcc or clang: Triton cannot build what launches its kernels")
    costs = {
        "transformers": "no peer of the whole model",
        "xdist": "a kernel's fault ends its step of the tests",
        "pytest_timeout": "a test that hangs takes all the time of its step",
        "av": "tests that read videos are skipped",
        "ninja": "csrc cannot be built, unless ninja is on PATH",
    }
    absent = (name for name in costs if importlib.util.find_spec(name) is None)
    return found + [f"Python's {name}: {costs[name]}" for name in absent]


def _verdicts() -> str:
    """Which verdicts of `tune` serve here."""
    found = keye_kernels.verdicts(DEVICE.type)
    if found is None:
        return ""
    made = time.strftime("%FT%TZ", time.gmtime(found.made))
    digest = hashlib.sha256(repr(found.rows).encode()).hexdigest()[:12]
    return f"{found.machine['device']}, made {made}, digest {digest}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _commit() -> str:
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12")


def _sources() -> str:
    """Digest of what was measured, for a copy of the repository that has no history."""
    digest = hashlib.sha256()
    for folder in ("csrc", "keye_kernels", "keye_model", "benchmarks"):
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp"):
                digest.update(path.relative_to(_ROOT).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    extension = {"csrc": keye_kernels.describe_extension()}
    for name, value in (environment() | extension | keye_kernels.backends()).items():
        print(f"{name}: {value}")
    for name in missing():
        print(f"MISSING {name}")


if __name__ == "__main__":
    main()
