"""All candidates of each op, each in a process of its own: tried, timed in turn, judged.

Run as a process that touches no GPU and computes nothing, so that it can fork. It prints a line of
JSON per event: ``{"case": …, "done": …, "total": …}`` before a case, ``{"op": …, "rows": […]}``
after an op.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from keye_kernels import _backends
from keye_kernels._tune.cases import Case, all_cases
from keye_kernels._tune.trial import median_and_spread, serve
from keye_kernels._verdicts import FAULTS, Row


@dataclass(frozen=True)
class Effort:
    """Seconds that a candidate may take for one answer, rounds of a case, and seconds of each."""

    limit: float
    rounds: int
    seconds: float


EFFORTS = {
    # (device type, quick); the first call of a Triton kernel compiles it.
    ("cuda", False): Effort(30.0, 9, 0.01),
    ("cuda", True): Effort(30.0, 5, 0.005),
    ("cpu", False): Effort(30.0, 5, 0.02),
    ("cpu", True): Effort(30.0, 5, 0.01),
}


@dataclass
class _Runner:
    """A candidate's process, and what is known of the candidate."""

    op: str
    candidate: str
    process: multiprocessing.Process
    connection: Any
    limit: float
    rows: list[Row] = field(default_factory=list)
    fault: Row | None = None

    @classmethod
    def start(
        cls, op: str, candidate: str, device: str, dtype: torch.dtype, seed: int, limit: float
    ) -> _Runner:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        arguments = theirs, op, candidate, device, dtype, seed

        def child() -> None:
            ours.close()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            serve(*arguments)

        process = context.Process(target=child, daemon=True)
        process.start()
        theirs.close()
        return cls(op, candidate, process, ours, limit)

    def ask(self, what: str, value: Any) -> Any:
        """The answer; or (status, reason, None) of a process that hangs or dies."""
        try:
            self.connection.send((what, value))
            if not self.connection.poll(self.limit):
                self.end()
                return "hung", f"no answer in {self.limit:g} s", None
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            died = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
            return "crashed", f"the process died: {died}", None

    def end(self) -> None:
        """Stop the process, whatever it is doing."""
        self.connection.close()
        self.process.join(0.2)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)


def _try_case(runner: _Runner, case: Case, shape_class: tuple) -> tuple:
    """Let one candidate be checked; returns the class of shapes, known from whoever ran first."""
    status, reason, found = runner.ask("check", case)
    kind, sizes = shape_class = found or shape_class
    row = Row(runner.op, runner.candidate, case.name, kind, sizes, status, reason)
    if status == "absent" or status in FAULTS:
        runner.fault = row
    if case.timed or runner.fault is not None:
        runner.rows.append(row)
    return shape_class


def _time_case(runners: list[_Runner], case: Case, effort: Effort) -> None:
    """Time the candidates that were right, in turn, so that all meet the same machine."""
    able = [r for r in runners if r.fault is None and r.rows and r.rows[-1].status == "right"]
    able = [runner for runner in able if runner.rows[-1].case == case.name]
    times: dict[str, list[float]] = {runner.candidate: [] for runner in able}
    for _ in range(effort.rounds):
        for runner in able:
            if runner.fault is None:
                answer = runner.ask("time", effort.seconds)
                if isinstance(answer, tuple):
                    runner.rows[-1] = runner.fault = Row(
                        **{**asdict(runner.rows[-1]), "status": answer[0], "reason": answer[1]}
                    )
                else:
                    times[runner.candidate].append(answer)
    for runner in able:
        if runner.fault is None:
            middle, spread = median_and_spread(times[runner.candidate])
            timed = {"microseconds": round(middle, 3), "spread": round(spread, 3)}
            runner.rows[-1] = Row(**{**asdict(runner.rows[-1]), **timed})


def judge(rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Mark per case which row is chosen, among candidates without a fault.

    Another than the first of ``order``, which is what "auto" takes without a verdict, is chosen if
    it is faster by more than both spreads.
    """
    faulty = {row.candidate for row in rows if row.status in FAULTS}
    judged = list(rows)
    for case in dict.fromkeys(row.case for row in rows):
        able = [
            (order.index(row.candidate), i, row)
            for i, row in enumerate(rows)
            if row.case == case and row.candidate not in faulty and row.microseconds is not None
        ]
        if not able:
            continue
        able.sort()
        _, chosen, best = able[0]
        for _, i, row in able[1:]:
            if row.microseconds + row.spread < best.microseconds - best.spread:
                chosen, best = i, row
        judged[chosen] = Row(**{**asdict(best), "status": "chosen"})
    return judged


def race(
    op: str,
    cases: Iterable[Case],
    device: str,
    dtype: torch.dtype,
    effort: Effort,
    say: Callable[[Case], None],
) -> list[Row]:
    """Rows of all candidates of ``op`` at ``cases``."""
    names, seed = _backends.candidates(op, device), secrets.randbits(31)
    runners = [_Runner.start(op, name, device, dtype, seed, effort.limit) for name in names]
    try:
        for case in cases:
            say(case)
            shape_class = (), ()
            for runner in runners:
                if runner.fault is None:
                    shape_class = _try_case(runner, case, shape_class)
            if case.timed:
                _time_case(runners, case, effort)
    finally:
        for runner in runners:
            runner.end()
    return judge([row for runner in runners for row in runner.rows], names)


def main(job: dict[str, Any]) -> None:
    """Run the job that `tune` hands over; see the head of this file for what is printed."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a candidate prints is none of our lines
    for module in job["modules"]:
        importlib.import_module(module)
    device, quick = job["device"], job["quick"]
    dtype = getattr(torch, job["dtype"])
    effort = EFFORTS[device, quick]
    if job["limit"] is not None:
        effort = Effort(job["limit"], effort.rounds, effort.seconds)
    cases: dict[str, list[Case]] = {}
    for case in all_cases(device, quick=quick):
        wanted = job["op"] in (None, case.op)
        if wanted and len(_backends.candidates(case.op, device)) > 1:
            cases.setdefault(case.op, []).append(case)
    total, done = sum(map(len, cases.values())), 0

    def say(case: Case) -> None:
        nonlocal done
        events.write(json.dumps({"case": str(case), "done": done, "total": total}) + "\n")
        done += 1

    for op, those in cases.items():
        rows = race(op, those, device, dtype, effort, say)
        events.write(json.dumps({"op": op, "rows": [asdict(row) for row in rows]}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
