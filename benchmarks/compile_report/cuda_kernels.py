"""What nvcc makes of the kernels of csrc: registers, spills, widths of accesses, tensor cores.

``python -m benchmarks.compile_report.cuda_kernels`` builds what changed and prints the table;
``make kernels`` adds it to docs/kernels.md. Needs nvcc, no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.compile_report.report import counted, table
from benchmarks.compile_report.sass import count, cuobjdump, parse

ARCHITECTURES = ("80", "90a", "100a", "120")
_ROOT = Path(__file__).parents[2]
_HEAD = ["kernel", "sm", "registers", "stack", "shared", "loads", "stores", "tensor cores"]
_MAX_SHARED = 99 * 1024  # of a block on sm_120, the least of those we build for
# Registers that leave room for as many blocks as the kernel counts on; 255 is what there is.
_MAX_REGISTERS = {"linear_kernel": 168, "qk_norm_mrope_store_kernel": 128}

Kernel = dict[str, object]


def find_nvcc() -> str | None:
    """The compiler that setup.py would find."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [*(f"{home}/bin" for home in homes), None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def build() -> Path:
    """Compile what changed; returns the library.

    Raises:
        RuntimeError: The build fails; the message is its output.
    """
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=_ROOT,
        env=os.environ | {"KEYE_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return _ROOT / "keye_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _readable(mangled: str) -> str:
    """``rope_kernel<bf16, 128>`` from the name of the instance in the library."""
    name = re.search(r"(?<=4keye)\d+([a-z]\w*?_kernel)", mangled)[1]
    arguments = [
        {"13__nv_bfloat16": "bf16", "6__half": "fp16", "b0": "false", "b1": "true"}.get(text, text)
        for text in re.findall(r"13__nv_bfloat16|6__half|(?<=L)b[01](?=E)|(?<=Li)\d+(?=E)", mangled)
    ]
    return f"{name}<{', '.join(arguments)}>"


def _shared_bytes() -> dict[str, int]:
    """Shared memory of a block, by "kernel number", the one among its template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(__file__).with_name("shared_bytes.cu"), Path(folder, "shared_bytes")
        command = [find_nvcc(), "-std=c++17", f"-I{_ROOT}/csrc/include", source, "-o", program]
        output = subprocess.run(
            [*command, "--run"], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(size) for key, size in re.findall(r"(.+) (\d+)\n", output)}


def read(library: Path, architectures: Iterable[str] = ARCHITECTURES) -> list[Kernel]:
    """Facts about each kernel in ``library``, by name, then architecture."""
    sizes = {}
    arch = ""
    for line in cuobjdump("-res-usage", str(library)).splitlines():
        if match := re.search(r"arch = sm_(\w+)|compiled for sm_(\w+)", line):
            arch = match[1] or match[2]
        elif match := re.search(r"Function (\w+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            sizes[function, arch] = int(match[1]), int(match[2])
    found = []
    for arch in architectures:
        sass = cuobjdump("-sass", "-arch", f"sm_{arch}", str(library))
        for body in sass.split("Function : ")[1:]:
            function = re.match(r"\w+", body)[0]
            registers, stack = sizes[function, arch]
            facts = {"kernel": _readable(function), "arch": arch, "registers": registers}
            found.append(facts | {"stack": stack} | count(parse(body)))
    shared = _shared_bytes()
    for kernel in found:
        kernel["shared"] = shared[re.sub(r"<\w+, (\d+)>", r" \1", kernel["kernel"])]
    return sorted(found, key=lambda kernel: (kernel["kernel"], int(kernel["arch"].rstrip("a"))))


def faults(kernels: list[Kernel]) -> list[str]:
    """What is wrong, one line each.

    Wrong is: registers in memory; an access to global memory below 4 bytes; none of 16 bytes among
    loads or stores; more shared memory than every GPU has; more registers than the kernel's blocks
    per multiprocessor allow.
    """
    found = []
    for kernel in kernels:
        where = f"sm_{kernel['arch']}, {kernel['kernel']}"
        if kernel["stack"] or kernel["local"]:
            found.append(f"{where}: {kernel['stack']} bytes of stack")
        for kind in ("loads", "stores"):
            if not kernel[kind].get("128"):
                found.append(f"{where}: no {kind} of 16 bytes")
            narrow = sum(kernel[kind].get(bits, 0) for bits in ("8", "16"))
            if narrow:
                found.append(f"{where}: {narrow} {kind} of 1 or 2 bytes")
        if kernel["shared"] > _MAX_SHARED:
            found.append(f"{where}: {kernel['shared']} bytes of shared memory")
        most = _MAX_REGISTERS.get(kernel["kernel"].partition("<")[0], 255)
        if kernel["registers"] > most:
            found.append(f"{where}: {kernel['registers']} registers, more than {most}")
    return found


def report(kernels: list[Kernel]) -> str:
    """The table as Markdown, with faults below."""
    rows = [_HEAD] + [
        [str(kernel[name]) for name in ("kernel", "arch", "registers", "stack", "shared")]
        + [counted(kernel[kind]) for kind in ("loads", "stores", "mma")]
        for kernel in kernels
    ]
    lines = [
        "## CUDA C++",
        "",
        "From the extension as nvcc builds it. Loads and stores count the instructions on global",
        "memory by their bits per thread, copies to shared memory among them.",
        "",
        *table(rows),
    ]
    wrong = faults(kernels)
    lines += ["", *(f"- {fault}" for fault in wrong)] if wrong else ["", "No faults."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every CUDA kernel and report.")
    parser.add_argument("--append", metavar="FILE", help="also add the report to this one")
    options = parser.parse_args()
    if find_nvcc() is None:
        print("The CUDA kernels are not in the report: there is no nvcc.")
        return
    kernels = read(build())
    text = report(kernels)
    print(text, end="")
    if options.append:
        with open(options.append, "a") as file:
            file.write(f"\n{text}")
    sys.exit(1 if faults(kernels) else 0)


if __name__ == "__main__":
    main()
