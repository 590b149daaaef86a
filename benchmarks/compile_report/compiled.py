"""What Triton makes of the ops' launches, compiled for GPUs that are not here.

``python -m benchmarks.compile_report.compiled --arch 90`` prints one JSON line per kernel. Every
case is called as its users call it, on meta tensors of its real shapes; each launch is noted
instead of started, then compiled. So there is no second description of a launch that could drift.

Needs no GPU. TRITON_INTERPRET must not be set. The triton used is the first on PYTHONPATH.
"""

import argparse
import json
import math
import multiprocessing
import re
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.cases import Case, all_cases, call, paged_prefill_attention, varlen_attention
from benchmarks.compile_report.sass import (
    Instruction,
    count,
    count_loop,
    cuobjdump,
    loop_mma_flops,
    parse,
)
from benchmarks.shapes import REAL
from keye_kernels import _backends, _device

NUM_SMS = {80: 108, 90: 132, 100: 148, 120: 188}
_SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}


@dataclass
class Launch:
    """One specialisation of a kernel, and the cases that come to it. Equal keys: equal code."""

    key: str
    function: triton.JITFunction
    args: tuple
    kwargs: dict[str, Any]
    cases: list[tuple[Case, int]] = field(default_factory=list)  # with the number of programs


class _Target:
    """As much of Triton's driver as compiling needs. Each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:  # noqa: ARG002
        return 0


class _AsOnCuda(TorchDispatchMode):
    """Tensors without contents take the kernel that CUDA tensors would take."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "keye":
            return _backends.find(func._schema.name.partition("::")[2], "cuda")(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _noted(launches: dict[str, Launch], case: Case):
    """Note what a launch would compile, and neither compile nor start it."""
    run = triton.JITFunction.run

    def note(self, *args, grid, warmup, **kwargs):  # noqa: ARG001
        def hook(*, key: str, **_: Any) -> bool:
            num_programs = math.prod(grid({**kwargs}) if callable(grid) else grid)
            key = f"{self.__name__}{key}"
            launch = launches.setdefault(key, Launch(key, self, args, kwargs))
            launch.cases.append((case, num_programs))
            return True  # do not compile

        with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
            return run(self, *args, grid=grid, warmup=True, **kwargs.copy())

    with mock.patch.object(triton.JITFunction, "run", note):
        yield


def launches_of(cases: Iterable[Case], arch: int) -> list[Launch]:
    """Launches of the Triton kernels of ``cases`` on ``arch``, alike ones once."""
    driver.set_active(_Target(arch))
    gpu = _device.Device(divmod(arch, 10), NUM_SMS[arch])
    launches: dict[str, Launch] = {}
    with mock.patch.object(_device, "elsewhere", gpu), _backends.use_backend("triton"):
        for case in cases:
            if "triton" not in _backends._registry[case.op]:
                continue
            arguments = case.arguments(torch.device("meta"))
            with _noted(launches, case), _AsOnCuda():
                call(case, arguments)
    return list(launches.values())


def _warps_per_sm(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """Bound on resident warps: registers come per warp in 256s, in four equal files.

    0: a program asks for more shared memory than there is, so that no launch succeeds.
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // per_warp) // num_warps
    by_shared = _SHARED_PER_SM[arch] // (shared + 1024)  # 1 KB per block is the system's
    by_warps = (48 if arch == 120 else 64) // num_warps
    return min(by_registers, by_shared, by_warps, 32) * num_warps


def _read(cubin: bytes) -> tuple[dict[str, Any], list[Instruction]]:
    """Registers, stack and counts of a cubin with one kernel, and its code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        code = parse(cuobjdump("-sass", file.name))
    size = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    sizes = {"registers": size["REG"], "stack": size["STACK"], "instructions": len(code)}
    return sizes | count(code) | {"loop": count_loop(code)}, code


def _padding(launch: Launch, code: list[Instruction], num_warps: int) -> float | None:
    """Tensor-core work of a turn of the loop over the useful. None: nobody says what is useful."""
    loop_flops = launch.cases[0][0].loop_flops
    useful = None if loop_flops is None else loop_flops(launch.kwargs)
    return None if useful is None else loop_mma_flops(code, num_warps) / useful


def _compile(launch: Launch, arch: int) -> dict[str, Any]:
    driver.set_active(_Target(arch))
    compiled = launch.function.warmup(*launch.args, grid=(1,), **launch.kwargs)
    facts, code = _read(compiled.asm["cubin"])
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return facts | {
        "padding": _padding(launch, code, num_warps),
        "num_warps": num_warps,
        "num_stages": compiled.metadata.num_stages,
        "shared": shared,
        "warps_per_sm": _warps_per_sm(arch, facts["registers"], shared, num_warps),
    }


def _compile_apart(launch: Launch, arch: int, results: Connection) -> None:
    try:
        results.send(_compile(launch, arch))
    except Exception as error:
        cause = error.__cause__ or error  # Triton's own error ends in a line of source
        results.send({"error": f"{type(cause).__name__}: {cause}".strip().splitlines()[-1]})


def compile_all(jobs: list[tuple[Launch, int]], num_processes: int = 2) -> Iterable[dict]:
    """Compile each launch in a process of its own: a compiler that aborts takes its process.

    Yields:
        triton, arch, op, kernel; cases, each with name, num_programs, num_bytes, flops, load_width
        and store_width; then num_warps, num_stages, registers, stack and shared (bytes),
        instructions, warps_per_sm (bound from registers and shared memory), what sass.count
        returns, loop (what sass.count_loop returns), padding (tensor-core work in the loop
        relative to the useful, None where no case says what is useful); or error alone.
    """
    context = multiprocessing.get_context("fork")  # launches hold functions and tensors
    waiting, running = list(enumerate(jobs)), {}
    finished: dict[int, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < num_processes:
            index, job = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_compile_apart, args=(*job, sender))
            process.start()
            sender.close()
            running[receiver] = index, process
        for receiver in wait(list(running)):
            index, process = running.pop(receiver)
            try:
                finished[index] = receiver.recv()
            except EOFError:
                process.join()
                finished[index] = {"error": f"the compiler died with code {process.exitcode}"}
            process.join()
    for index, (launch, arch) in enumerate(jobs):
        yield _identity(launch, arch) | finished[index]


def _identity(launch: Launch, arch: int) -> dict[str, Any]:
    """What is known before compiling: the kernel, and the cases that launch it."""
    described = [
        {
            "name": case.name,
            "num_programs": num_programs,
            "num_bytes": case.num_bytes,
            "flops": case.flops,
            "load_width": case.load_width,
            "store_width": case.store_width,
        }
        for case, num_programs in launch.cases
    ]
    return {
        "triton": triton.__version__,
        "arch": arch,
        "op": launch.cases[0][0].op,
        "kernel": launch.function.__name__,
        "cases": described,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the ops' launches and describe them.")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(NUM_SMS), default=[90])
    parser.add_argument("--op", nargs="*", default=[], help="these ops only")
    parser.add_argument("--first", action="store_true", help="the first case of each op only")
    options = parser.parse_args()

    cases = [
        *all_cases(REAL),
        *paged_prefill_attention.compiled_cases(),
        *varlen_attention.compiled_cases(),
    ]
    cases = [case for case in cases if not options.op or case.op in options.op]
    if options.first:
        cases = list({case.op: case for case in reversed(cases)}.values())
    jobs = [(launch, arch) for arch in options.arch for launch in launches_of(cases, arch)]
    for kernel in compile_all(jobs):
        print(json.dumps(kernel), flush=True)


if __name__ == "__main__":
    main()
