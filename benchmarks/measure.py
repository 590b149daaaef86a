"""One case: check every provider against the definition, then time all of them in turns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import keye_kernels
from benchmarks import options
from benchmarks.cases import Case, all_cases
from benchmarks.providers import Provider, Providers, only, ours, reason_of
from benchmarks.ranges import named, ranges
from benchmarks.record import Report, Row
from benchmarks.shapes import REAL, SMALL, own_shapes
from benchmarks.timing import (
    CORES,
    DEVICE,
    ON_GPU,
    Cores,
    Inputs,
    Make,
    Run,
    Timing,
    contention,
    race,
)
from keye_kernels import reference

TOLERANCE = 1e-2  # relative RMS; bf16 results of different but right rounding lie near 3e-3

_PROFILED_CALLS = 3


def cases_of(op: str) -> list[Any]:
    """At the checkpoint's shapes on a GPU, at small ones elsewhere, or at those of the options.

    An op that does not understand an option has one case, which is skipped with the reason.
    """
    reason = options.chosen.refuses(op)
    if not reason:
        shapes = REAL if ON_GPU else SMALL
        if options.chosen.tokens is not None:
            shapes = own_shapes(options.chosen.tokens, shapes)
        found = [case for case in all_cases(shapes) if case.op == op]
        if found:
            return found
        reason = f"{op} has no case of these options: too many tokens"
    return [pytest.param(op, marks=pytest.mark.skip(reason=reason))]


def difference(got: object, want: object, tolerance: float = TOLERANCE) -> str:
    """Why `got` is not `want`; "" if they agree.

    Tensors are compared by relative RMS error, which must be 0 where they hold ints.
    """
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=False))
    if len(tree_leaves(got)) != len(tree_leaves(want)):
        return f"{len(tree_leaves(got))} results instead of {len(tree_leaves(want))}"
    for x, y in pairs:
        if x.shape != y.shape:
            return f"shape {tuple(x.shape)} instead of {tuple(y.shape)}"
        most = tolerance if y.is_floating_point() else 0
        x, y = x.float(), y.float()
        error = ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
        if not error <= most:  # NaN must not pass
            return f"relative error {error:.2g}"
    return ""


class Measure:
    """Measures cases into a report.

    Args:
        report: Takes the rows. None: nothing is timed.
        seconds: Of timing, per case.
        names: Providers whose name holds one of these; empty: all.
        trace_folder: Instead of timing, write a torch profiler trace of each case here.
        marked: Instead of timing, call each provider once inside named ranges, for an outer
            profiler.
        cores: Whose load is looked at before and after each case.
    """

    def __init__(
        self,
        report: Report | None,
        *,
        seconds: float,
        names: tuple[str, ...] = (),
        trace_folder: Path | None = None,
        marked: bool = False,
        cores: Cores = CORES,
    ) -> None:
        self.cores = cores
        self.report, self.seconds, self.names = report, seconds, names
        self.trace_folder, self.marked = trace_folder, marked

    def __call__(
        self,
        case: Case,
        peers: Providers,
        *,
        outputs: Callable[[object, Inputs], object] = lambda result, inputs: result,  # noqa: ARG005
        prepare: Callable[[Inputs], Inputs] | None = None,
        size: float | None = None,
        differs: Callable[[object, object], str] = difference,
    ) -> None:
        """Check and time one op: each backend of ours that serves here, and `peers`.

        Args:
            case: Names the op, makes its keyword arguments, counts its work.
            peers: Called with the same keyword arguments, to give what `outputs` gives for ours.
            outputs: The result to compare, from what our op returned and its arguments (for an op
                that writes into them).
            prepare: What only peers are given, from the arguments of our op, and not timed: tables
                and plans that a model makes once for all layers.
            size: Place among the cases of a plot; default: rows of the first tensor.
            differs: As in `compare`.
        """
        shapes = case.arguments(torch.device("meta"))

        def call(function: Run) -> Run:
            def run(**inputs: Any) -> object:
                arguments = {name: inputs[name] for name in shapes}
                return outputs(function(**arguments), arguments)

            return run

        def make() -> Inputs:
            inputs = case.arguments(DEVICE)
            return inputs if prepare is None else inputs | prepare(inputs)

        if size is None:
            size = next(x.shape[0] for x in shapes.values() if isinstance(x, torch.Tensor))
        self.compare(
            case.op,
            case.name,
            make=make,
            definition=call(getattr(reference, case.op)),
            providers=ours(case.op, call(getattr(keye_kernels, case.op))) | peers,
            num_bytes=case.num_bytes,
            flops=case.flops,
            size=size,
            differs=differs,
        )

    def compare(
        self,
        op: str,
        case: str,
        *,
        make: Make,
        providers: Providers,
        definition: Run,
        num_bytes: int = 0,
        flops: int = 0,
        size: float | None = None,
        differs: Callable[[object, object], str] = difference,
        models: tuple[nn.Module, ...] = (),
    ) -> None:
        """Check and time `providers` on what `make` makes.

        Args:
            op, case: Name the rows.
            make: One set of inputs, the same for the same seed of torch.
            providers: Each is called with one set of inputs as keywords.
            definition: The right result from one set of inputs.
            num_bytes: Each input byte that must be read, once, plus each output byte written, once.
                Intermediate results, padding and second reads are not work.
            flops: Of matrix products alone (a multiply and an add are two), at the real sizes.
            size: Place among the cases of a plot.
            differs: Why a result is wrong, from it and the right one; "" if it is not.
            models: Whose stages and layers get ranges under a profiler.

        Raises:
            AssertionError: One of ours is wrong or raises. The rows of the others are recorded.
        """
        providers = only(providers, self.names)
        want = _once(definition, make)
        faults: dict[str, str] = {}
        for name, provider in providers.items():
            faults[name] = _fault(provider, make, want, differs)
        del want
        right = {name: p for name, p in providers.items() if not faults[name]}

        if self.trace_folder is not None:
            self._trace(f"{op}-{case}", right, make, models)
        elif self.marked:
            with ranges(*models):
                _call(f"{op} {case}", right, make)
        else:
            row = Row(op, case, "", size=size, num_bytes=num_bytes, flops=flops)
            self._time(row, providers, faults, make)
        broken = {n: f for n, f in faults.items() if f and providers[n].ours}
        assert not broken, f"{op}, {case}: {broken}"

    def _time(
        self,
        row: Row,
        providers: Providers,
        faults: dict[str, str],
        make: Make,
    ) -> None:
        """Record one row like `row` for each provider."""
        right = {name: p for name, p in providers.items() if not faults[name]}
        if not providers:
            return
        before = self.cores.load()
        timings = race(
            {name: p.run for name, p in right.items()},
            make,
            seconds=self.seconds,
            launched=[name for name, p in right.items() if not p.capture],
            contexts={name: p.context for name, p in right.items()},
        )
        limit = self.report.ceilings.limit(row.num_bytes, row.flops) or None
        loads = before, self.cores.load()
        rows = []
        for name, p in providers.items():
            mine = replace(row, provider=name, ours=p.ours, limit=limit, note=faults[name])
            if not faults[name]:
                mine = mine.timed(timings[name], self._contended([timings[name]], loads))
            rows.append(mine)
        self.report.add(rows)

    def _contended(self, timings: list[Timing], loads: tuple[float, float]) -> str:
        """Why times, or the ceilings they are compared with, mean little; "" if nothing says so."""
        ceilings = self.report.ceilings.contended
        return contention(timings, loads, self.cores.count) or (
            f"the ceilings of this run, {ceilings}" if ceilings else ""
        )

    def stages(
        self,
        op: str,
        case: str,
        runs: dict[str, Callable[[], dict[str, float]]],
        *,
        turns: int = 5 if ON_GPU else 1,
    ) -> None:
        """Record runs that time their own stages; `runs` give seconds by stage.

        The turn with the median total is the one recorded, after a turn that warms up.
        """
        if self.report is None:
            return
        runs = only(runs, self.names)
        if not runs:
            return
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        before = self.cores.load()
        for turn in range(turns + 1):
            for name, run in runs.items():
                stages = run()
                if turn > 0:
                    found[name].append(stages)
        loads = before, self.cores.load()
        rows = []
        for name, measured in found.items():
            measured.sort(key=lambda stages: sum(stages.values()))
            totals = [sum(stages.values()) for stages in measured]
            middle = measured[len(measured) // 2]
            timing = Timing(sum(middle.values()), (totals[-1] - totals[0]) / 2, len(totals))
            contended = contention([timing], loads, self.cores.count)
            rows.append(
                Row(
                    op,
                    case,
                    name,
                    ours=name.startswith("ours"),
                    seconds=timing.median,
                    spread=timing.spread,
                    stages=middle,
                    flag=f"contended: {contended}" if contended else "",
                    note=", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in middle.items()),
                )
            )
        self.report.add(rows)

    def _trace(
        self, title: str, right: Providers, make: Make, models: tuple[nn.Module, ...]
    ) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if ON_GPU:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile, ranges(*models):
            for _ in range(_PROFILED_CALLS):
                _call(title, right, make)
        self.trace_folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9_]+", "-", title).strip("-")
        profile.export_chrome_trace(str(self.trace_folder / f"{name}.json.gz"))


def _once(run: Run, make: Make) -> object:
    torch.manual_seed(0)
    with torch.inference_mode():
        return run(**make())


def _fault(
    provider: Provider, make: Make, want: object, differs: Callable[[object, object], str]
) -> str:
    """What the table says instead of a time; "" if there is nothing to say."""
    if provider.run is None:
        return f"absent: {provider.absent}"
    try:
        with provider.context():
            got = _once(provider.run, make)
        why = (provider.differs or differs)(got, want)
    except Exception as error:
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises when the fault has ended this process's CUDA context
        return f"absent: refused, {reason_of(error)}"
    return f"absent: wrong, {why}" if why else ""


def _call(title: str, right: Providers, make: Make) -> None:
    for name, provider in right.items():
        inputs = make()
        with provider.context(), named(f"{title} {name}"), torch.inference_mode():
            provider.run(**inputs)
        if ON_GPU:
            torch.cuda.synchronize()
