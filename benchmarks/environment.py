"""Where a number was measured: machine, versions, commit."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

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
    return facts | {"commit": _commit(), "sources": _sources()}


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
