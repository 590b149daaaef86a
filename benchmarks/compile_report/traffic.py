"""The bytes that kernels ask for at the small shapes, counted by Triton's interpreter.

``TRITON_INTERPRET=1 python -m benchmarks.compile_report.traffic`` prints one JSON line per case.
"""

import argparse
import json

import torch

from benchmarks.cases import all_cases, call
from benchmarks.shapes import SMALL
from keye_kernels import _backends
from testing import triton_interpreter


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that kernels ask for.")
    parser.add_argument("--op", nargs="*", default=[], help="these ops only")
    options = parser.parse_args()
    triton_interpreter.install()
    for case in all_cases(SMALL):
        if options.op and case.op not in options.op:
            continue
        if case.op == "linear":  # a GEMM between other ops
            continue
        torch.manual_seed(0)
        arguments = case.arguments(torch.device("cpu"))
        with _backends.use_backend("triton"), triton_interpreter.traffic() as moved:
            call(case, arguments)
        line = {"op": case.op, "name": case.name, "num_bytes": case.num_bytes}
        line |= {"loaded": moved.loaded, "stored": moved.stored}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
