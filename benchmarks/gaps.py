"""Where our kernels lose most to another candidate, by what `keye_kernels tune` measured.

`python -m benchmarks.gaps` prints the largest gaps, a line each. `python -m benchmarks.gaps N` runs
both candidates of line N once between the marks of a profiler: for `ncu --profile-from-start off`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import keye_kernels
from benchmarks.timing import DEVICE
from keye_kernels import _backends
from keye_kernels._tune.cases import Make, all_cases
from keye_kernels._tune.trial import arguments_of
from keye_kernels._verdicts import FAULTS, Row

_OURS = ("cuda", "triton")
_LEAST = 10.0  # microseconds; of shorter kernels the launch decides, which a profiler does not time


@dataclass(frozen=True)
class Gap:
    """Our fastest candidate and the fastest other one, at one case of one op."""

    ours: Row
    other: Row

    @property
    def ratio(self) -> float:
        """Our time over theirs: above 1 we are slower."""
        return self.ours.microseconds / self.other.microseconds

    def __str__(self) -> str:
        times = [f"{r.candidate} {r.microseconds:.1f} us" for r in (self.ours, self.other)]
        return f"{self.ours.op}, {self.ours.case}: {', '.join(times)}, {self.ratio:.2f}x"


def largest(rows: Sequence[Row], count: int = 3) -> list[Gap]:
    """The gaps with the largest ratios, the largest first, at most one of each op.

    A candidate with a fault does not count, nor a case that ours does in less than 10 us.
    """
    faulty = {(row.op, row.candidate) for row in rows if row.status in FAULTS}
    timed = [r for r in rows if r.microseconds and (r.op, r.candidate) not in faulty]
    found: dict[str, Gap] = {}
    for op, case in dict.fromkeys((row.op, row.case) for row in timed):
        rivals = sorted(
            (row for row in timed if (row.op, row.case) == (op, case)),
            key=lambda row: row.microseconds,
        )
        ours = next((row for row in rivals if row.candidate in _OURS), None)
        other = next((row for row in rivals if row.candidate not in _OURS), None)
        if ours is None or other is None or ours.microseconds < _LEAST:
            continue
        gap = Gap(ours, other)
        if op not in found or gap.ratio > found[op].ratio:
            found[op] = gap
    return sorted(found.values(), key=lambda gap: -gap.ratio)[:count]


def profile(gap: Gap) -> None:
    """Run both once to warm up, and once between the marks."""
    for row in (gap.ours, gap.other):
        cases = all_cases(DEVICE.type)
        case = next(case for case in cases if (case.op, case.name) == (row.op, row.case))
        args = arguments_of(case, Make(DEVICE, getattr(torch, row.kind[0]), seed=0))
        for marked in (False, True):
            if marked:
                torch.cuda.profiler.start()
            _backends.run_candidate(row.op, row.candidate, args)
            torch.cuda.synchronize()
            if marked:
                torch.cuda.profiler.stop()


def main(arguments: Sequence[str]) -> None:
    verdicts = keye_kernels.verdicts(DEVICE.type)
    gaps = largest(verdicts.rows) if verdicts is not None else []
    if arguments:
        with torch.inference_mode():
            profile(gaps[int(arguments[0]) - 1])
        return
    for gap in gaps:
        print(gap)


if __name__ == "__main__":
    main(sys.argv[1:])
