"""Every kernel once, at small shapes: what `hardware.sh` runs under compute-sanitizer.

Those of all our backends, not just of the one that "auto" takes.
"""

from dataclasses import replace

import torch

from benchmarks.cases import all_cases, call
from benchmarks.shapes import SMALL, Decode
from benchmarks.timing import DEVICE
from keye_kernels import backends, use_backend

# So long that attention is divided among blocks, which then exchange their sums.
SHAPES = replace(SMALL, decode=SMALL.decode | {"batch 2, 200": Decode(2, 200)})


def main() -> None:
    torch.manual_seed(0)
    for name in ("cuda", "triton"):
        with torch.inference_mode(), use_backend(name):
            served = backends()
            for case in all_cases(SHAPES):
                if served[case.op].backend == name:
                    call(case, case.arguments(DEVICE))
                    print(f"{case}: {name}", flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
