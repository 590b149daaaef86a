"""Every op with a kernel once, at small shapes: what `hardware.sh` runs under compute-sanitizer."""

import torch

from benchmarks.cases import all_cases, call
from benchmarks.shapes import SMALL
from benchmarks.timing import DEVICE
from keye_kernels import backends


def main() -> None:
    served = backends()
    torch.manual_seed(0)
    with torch.inference_mode():
        for case in all_cases(SMALL):
            if served[case.op].backend != "reference":
                call(case, case.arguments(DEVICE))
                print(f"{case}: {served[case.op].backend}", flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
