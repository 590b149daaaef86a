"""One candidate in a process of its own: compared with the definition, then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from keye_kernels import _backends
from keye_kernels._tune.cases import Case, Make

_GUARD = 4096  # elements before and after each output, which no candidate may write
_ROTATED_BYTES = 2**28  # of the copies that are timed in turn, so that no cache holds them
_COMPARED = 2**22  # elements that are compared at once
_COPIED_BYTES = 2**24  # larger inputs are not copied to see whether a candidate writes to them


def arguments_of(case: Case, make: Make) -> list[Any]:
    """What the public function hands to the op in ``case``."""
    calls: list[tuple[str, tuple]] = []
    find = _backends.find
    _backends.find = lambda op, _: lambda *args: calls.append((op, args))
    try:
        case.call(make)
    finally:
        _backends.find = find
    return list(next(args for op, args in calls if op == case.op))


def written(op: str) -> list[int]:
    """Positions of the arguments that the op writes."""
    arguments = getattr(torch.ops.keye, op).default._schema.arguments
    aliases = [argument.alias_info for argument in arguments]
    return [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]


def _fresh(op: str) -> set[int]:
    """Positions of the outputs that hold nothing before the call."""
    arguments = getattr(torch.ops.keye, op).default._schema.arguments
    return {i for i in written(op) if arguments[i].name in ("out", "lse", "residual_out")}


def _poison(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))


def _guarded(tensor: torch.Tensor, fresh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy with the same strides, and the memory around it."""
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = torch.empty(span + 2 * _GUARD, dtype=tensor.dtype, device=tensor.device)
    _poison(memory)
    inside = memory.as_strided(tensor.shape, tensor.stride(), _GUARD)
    if not fresh:
        inside.copy_(tensor)
    return inside, memory


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _copied(args: list[Any], convert: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    return [convert(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]


def _copy_of_small(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.numel() * tensor.itemsize <= _COPIED_BYTES else tensor


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 if it is that already, which the exact result is computed in."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float64 if tensor.dtype == torch.float32 else torch.float32)


def _distance(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> str | None:
    """Why ``got`` is further from ``exact`` than twice what plain PyTorch is; None if it is not."""
    if not got.is_floating_point():
        same = got == plain
        wrong = int((~same).sum())
        return f"{wrong} of {got.numel()} values differ from the definition's" if wrong else None
    worst = {"got": 0.0, "plain": 0.0}
    squares = {"got": 0.0, "plain": 0.0}
    largest, faults = 0.0, 0
    flat = [x.reshape(-1).split(_COMPARED) for x in (got, plain, exact)]
    for one, other, want in zip(*flat, strict=True):
        want = want.double()
        finite = want[want.isfinite()]
        largest = max(largest, finite.abs().max().item() if finite.numel() else 0.0)
        for name, x in (("got", one.double()), ("plain", other.double())):
            # Equal infinities differ by nothing, and so do NaNs: a hole that both leave.
            equal = (x == want) | (x.isnan() & want.isnan())
            error = torch.where(equal, 0.0, (x - want).abs())
            if name == "got":
                faults += int((~error.isfinite()).sum())
            error = error.nan_to_num(0.0, 0.0, 0.0)
            worst[name] = max(worst[name], error.max().item() if error.numel() else 0.0)
            squares[name] += error.square().sum().item()
    if faults:
        return f"{faults} of {got.numel()} values are NaN or infinite where they must not be"
    # Where inputs have 16 bits, the exact result is computed in fp32 too, with its roundings.
    slack = max(torch.finfo(got.dtype).eps, 2**-20) * largest
    count = max(got.numel(), 1)
    for what, error, bound in (
        ("largest", worst["got"], 2 * worst["plain"] + slack),
        ("RMS", (squares["got"] / count) ** 0.5, 2 * (squares["plain"] / count) ** 0.5 + slack),
    ):
        if error > bound:
            return f"{what} error {error:.3g} exceeds {bound:.3g}"
    return None


class Trial:
    """One candidate of one op.

    Args:
        op, candidate: Names in the registry.
        device, dtype: Of the tensors.
        seed: Of their contents.
    """

    def __init__(self, op: str, candidate: str, device: str, dtype: torch.dtype, seed: int) -> None:
        self.op, self.candidate = op, candidate
        self._make = Make(device, dtype, seed)
        self._cuda = device == "cuda"
        self._args: list[Any] = []
        self._copies: list[list[Any]] = []

    def check(self, case: Case) -> tuple[str, str, tuple]:
        """Status, reason, and class of shapes of the case; keeps its tensors for `time`."""
        self._args = args = arguments_of(case, self._make)
        self._copies = []
        shape_class = _backends.classify(self.op, args)
        outputs, fresh = written(self.op), _fresh(self.op)
        tries = []
        for _ in range(2):
            given = _copied(args, _copy_of_small)
            memories = {}
            for i in outputs:
                if given[i] is not None:
                    given[i], memories[i] = _guarded(args[i], i in fresh)
            before = {i: memory.clone() for i, memory in memories.items()}
            reason = _backends.run_candidate(self.op, self.candidate, given)
            if reason is not None:
                return "refused", reason, shape_class
            for i, arg in enumerate(given):
                if i in memories:
                    ends = memories[i], before[i]
                    edges = [torch.cat((m[:_GUARD], m[-_GUARD:])) for m in ends]
                    if not _same(*edges):
                        return "wrong", "it writes outside of its output", shape_class
                elif arg is not args[i] and not _same(arg, args[i]):
                    return "wrong", "it writes into an input", shape_class
            tries.append({i: given[i] for i in memories})
        for i in tries[0]:
            if not _same(tries[0][i], tries[1][i]):
                return "wrong", "two calls with the same arguments differ", shape_class
        if self.candidate == "reference":  # the definition itself
            return "right", "", shape_class
        plain, exact = self._defined(args, lambda tensor: tensor), self._defined(args, _wide)
        for i in tries[0]:
            reason = _distance(tries[0][i], plain[i], exact[i])
            if reason is not None:
                return "wrong", reason, shape_class
        return "right", "", shape_class

    def _defined(
        self, args: list[Any], convert: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[Any]:
        """Arguments after a call of the definition on converted tensors."""
        given, fresh = _copied(args, convert), _fresh(self.op)
        for i in written(self.op):
            if given[i] is not None:
                given[i] = given[i].clone()
                if i in fresh:
                    _poison(given[i])
        _backends.run_candidate(self.op, "reference", given)
        return given

    def time(self, seconds: float) -> float:
        """Microseconds per call, over about ``seconds``, of the case that was checked last."""
        if not self._copies:
            self._copies = [self._args]
            first = self._spent(self._call_each)
            size = sum(a.numel() * a.itemsize for a in self._args if isinstance(a, torch.Tensor))
            # As many as no cache holds, but no more than are called in the time.
            count = min(_ROTATED_BYTES // max(size, 1), 8, int(seconds / max(first, 1e-6)))
            self._copies += [_copied(self._args, torch.clone) for _ in range(count - 1)]
            self._turn = self._captured() if self._cuda else self._call_each
            self._turn()
        calls, spent = 0, 0.0
        while spent < seconds:
            spent += self._spent(self._turn)
            calls += len(self._copies)
        return 1e6 * spent / calls

    def _call_each(self) -> None:
        run = _backends._registry[self.op][self.candidate].run
        for args in self._copies:
            run(*args)

    def _captured(self) -> Callable[[], None]:
        """A graph of the calls: a decode step replays one; launches where nothing can capture."""
        self._call_each()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._call_each()
        except RuntimeError:  # the definitions read lengths on the host
            torch.cuda.synchronize()
            return self._call_each
        return graph.replay

    def _spent(self, turn: Callable[[], None]) -> float:
        if not self._cuda:
            started = time.perf_counter()
            turn()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        turn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def serve(
    connection: Connection, op: str, candidate: str, device: str, dtype: torch.dtype, seed: int
) -> None:
    """Answer ("check", case) and ("time", seconds) until the other end closes.

    An error of a kernel on a GPU outlives the call that met it, so an exception ends the process.
    """
    absent = _backends._registry[op][candidate].why_not()
    with torch.inference_mode():
        trial = Trial(op, candidate, device, dtype, seed)
        while True:
            try:
                what, value = connection.recv()
            except EOFError:
                return
            if absent is not None:
                connection.send(("absent", absent, None))
                return
            try:
                answer = trial.check(value) if what == "check" else trial.time(value)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                connection.send(("failed", f"{type(error).__name__}: {text[0]}"[:300], None))
                return
            connection.send(answer)


def median_and_spread(rounds: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles."""
    middle = statistics.median(rounds)
    if len(rounds) < 2:
        return middle, 0.0
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return middle, (high - low) / 2
