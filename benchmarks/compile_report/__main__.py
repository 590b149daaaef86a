"""The command: print the report of the Triton kernels. ``make kernels`` writes docs/kernels.md."""

import argparse
import sys
from pathlib import Path

from benchmarks.compile_report.report import (
    ARCHITECTURES,
    compile_kernels,
    count_traffic,
    faults,
    report,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel and report.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--triton", nargs="*", default=[], help="directories of other versions")
    parser.add_argument("--op", nargs="*", default=[], help="these ops only")
    parser.add_argument("--write", metavar="FILE", help="also write the report there")
    options = parser.parse_args()
    kernels = []
    for directory in (*options.triton, None):
        kernels += compile_kernels(options.arch, triton=directory, ops=options.op)
    text = report(kernels, count_traffic(options.op))
    print(text, end="")
    if options.write:
        Path(options.write).write_text(text)
    sys.exit(1 if faults(kernels) else 0)


if __name__ == "__main__":
    main()
