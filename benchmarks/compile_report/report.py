"""Facts about the Triton kernels as Markdown, and what is wrong with them."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
_ROOT = Path(__file__).parents[2]
_HEAD = (
    "sm", "triton", "warps", "stages", "registers", "stack", "shared", "warps/SM",
    "loads", "stores", "tensor cores", "padding",
)  # fmt: skip

_MAX_PADDING = 1.15

Kernel = dict[str, Any]  # as compiled.compile_all yields them


def compile_kernels(
    architectures: Iterable[int] = ARCHITECTURES,
    *,
    triton: str | None = None,
    ops: Iterable[str] = (),
    first: bool = False,
    cache: str | None = None,
) -> list[Kernel]:
    """Compile in a process of its own, since Triton's interpreter and compiler exclude each other.

    Args:
        architectures: 80, 90, 100.
        triton: Directory of another triton than the installed one.
        ops: These only. Default: all.
        first: Only the first case of each op.
        cache: Directory for what Triton compiled, by source, signature and version.

    Raises:
        RuntimeError: A launch could not even be described; the message is the traceback.
    """
    options = ["--arch", *map(str, architectures)]
    options += ["--op", *ops] if ops else []
    options += ["--first"] if first else []
    # Fusing multiply and add is what every version up to 3.9 does by default.
    environment = {"TRITON_INTERPRET": None, "TRITON_DEFAULT_FP_FUSION": "1"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = cache
    if triton is not None:
        paths = [triton, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return _run_apart("compiled", options, environment)


def count_traffic(ops: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Bytes that the kernels ask for at the small shapes, from the interpreter, also apart."""
    options = ["--op", *ops] if ops else []
    return _run_apart("traffic", options, {"TRITON_INTERPRET": "1"})


def _run_apart(module: str, options: list[str], environment: dict[str, str | None]) -> list[dict]:
    merged = {k: v for k, v in (os.environ | environment).items() if v is not None}
    command = [sys.executable, "-m", f"benchmarks.compile_report.{module}", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=merged, cwd=_ROOT)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _reaches(accesses: dict[str, int], width: int) -> bool:
    return any(bits == "tma" or int(bits) >= 8 * width for bits in accesses)


def faults(kernels: list[Kernel]) -> list[str]:
    """What is wrong with compiled kernels, one line each.

    Wrong is: the compiler failed; no multiprocessor has room for a program; stack (spills) is used;
    an access to global memory has less than 4 bytes though the layout allows more; no access of a
    case is as wide as its layout allows; no tensor-core instruction in a case that has a dot; more
    than 1.15 times the useful work in the tensor-core instructions of a loop (or less than it: then
    it was not counted right).
    """
    found = []
    by_case: dict[tuple, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        where = f"triton {kernel['triton']}, sm_{kernel['arch']}, {kernel['kernel']}"
        names = "; ".join(case["name"] for case in kernel["cases"])
        if "error" in kernel:
            found.append(f"{where} ({names}): {kernel['error']}")
            continue
        if kernel["warps_per_sm"] == 0:
            found.append(f"{where} ({names}): {kernel['shared']} bytes of shared memory, too many")
        if kernel["stack"]:
            found.append(f"{where} ({names}): {kernel['stack']} bytes of stack")
        if kernel["padding"] is not None and not 1 <= kernel["padding"] <= _MAX_PADDING:
            found.append(
                f"{where} ({names}): {kernel['padding']:.3f} of the useful FLOP in its loop"
            )
        for kind in ("loads", "stores"):
            width = min(case[f"{kind[:-1]}_width"] for case in kernel["cases"])
            narrow = {b: n for b, n in kernel[kind].items() if b in ("8", "16") and width >= 4}
            if narrow:
                found.append(f"{where} ({names}): narrow {kind} {counted(narrow)}")
        for case in kernel["cases"]:
            key = (kernel["triton"], kernel["arch"], kernel["op"], case["name"])
            by_case[key].append(kernel)
    for (version, arch, op, name), parts in by_case.items():
        where = f"triton {version}, sm_{arch}, {op} ({name})"
        case = next(case for case in parts[0]["cases"] if case["name"] == name)
        for kind in ("loads", "stores"):
            width = case[f"{kind[:-1]}_width"]
            if not any(_reaches(kernel[kind], width) for kernel in parts):
                found.append(f"{where}: no {kind} of {width} bytes")
        if case["flops"] and not any(kernel["mma"] for kernel in parts):
            found.append(f"{where}: no tensor-core instruction")
    return found


def counted(counts: dict[str, int]) -> str:
    """``tma`` first, then from the widest access to the narrowest."""
    ordered = sorted(counts.items(), key=lambda item: (item[0] != "tma", -len(item[0]), item[0]))
    return ", ".join(f"{count} x {name}" for name, count in ordered) or "none"


def _row(kernel: Kernel) -> list[str]:
    if "error" in kernel:
        return [str(kernel["arch"]), kernel["triton"], kernel["error"]]
    numbers = ("num_warps", "num_stages", "registers", "stack", "shared", "warps_per_sm")
    row = [str(kernel["arch"]), kernel["triton"]]
    row += [str(kernel[number]) for number in numbers]
    row += [counted(kernel[kind]) for kind in ("loads", "stores", "mma")]
    return [*row, f"{kernel['padding']:.3f}" if kernel["padding"] else ""]


def table(rows: list[list[str]]) -> Iterator[str]:
    """Lines of a Markdown table; the first row is its head, a short row is filled up."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = row + [""] * (len(widths) - len(row))
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield "| " + " | ".join(padded) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _traffic_table(moved: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["small shape", "must move, KB", "asks for, KB", "ratio"]]
    for case in moved:
        asked = case["loaded"] + case["stored"]
        ratio = f"{asked / case['num_bytes']:.2f}"
        rows.append([case["name"], f"{case['num_bytes'] / 1e3:.4g}", f"{asked / 1e3:.4g}", ratio])
    return rows


def report(kernels: list[Kernel], moved: Iterable[dict[str, Any]] = ()) -> str:
    """The whole report as Markdown, the same for the same compiler output.

    Args:
        kernels: From compile_kernels, of any versions.
        moved: From count_traffic.
    """
    lines = [
        "# What the kernels compile to",
        "",
        "Written by `make kernels`. Compiler output, not measurements: each op is called at the",
        "shapes of the published checkpoint (`benchmarks/cases`), and what its launches would",
        "compile is compiled ahead of time.",
        "",
        "Loads and stores count the instructions on global memory by their bits per thread; stack",
        "(spills) and shared memory are in bytes. Warps/SM is the bound that registers and shared",
        "memory set, of at most 64. Bytes and FLOP are what each shape must move and compute:",
        "inputs once, outputs once, padding not counted. Padding is the FLOP of the tensor-core",
        "instructions in the loop of attention over the useful ones.",
        "",
        "What a kernel asks for is counted by Triton's interpreter at small shapes. Where the",
        "ratio passes 1, caches must serve the rest: weights that every row reads, keys that every",
        "block of queries reads.",
    ]
    by_op: dict[str, dict[tuple, list[Kernel]]] = defaultdict(lambda: defaultdict(list))
    for kernel in kernels:
        names = tuple(case["name"] for case in kernel["cases"])
        by_op[kernel["op"]][kernel["kernel"], names].append(kernel)
    for op, variants in sorted(by_op.items()):
        lines += ["", f"## {op}"]
        mine = [case for case in moved if case["op"] == op]
        lines += ["", *table(_traffic_table(mine))] if mine else []
        for (name, _), versions in variants.items():
            shapes = [["shape", "programs", "MB", "GFLOP"]]
            for case in versions[0]["cases"]:
                work = f"{case['flops'] / 1e9:.3g}" if case["flops"] else ""
                size = f"{case['num_bytes'] / 1e6:.4g}"
                shapes.append([case["name"], str(case["num_programs"]), size, work])
            rows = [list(_HEAD)] + [_row(kernel) for kernel in versions]
            lines += ["", f"### `{name}`", "", *table(shapes), "", *table(rows)]
    wrong = faults(kernels)
    lines += ["", "## Faults", "", *(f"- {fault}" for fault in wrong)]
    if not wrong:
        lines.append("None: no spills, no narrow accesses, tensor cores wherever there is a dot.")
    return "\n".join(lines) + "\n"
