"""The candidates of each op, registered by the op families, and the choice among them."""

import math
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from keye_kernels import _verdicts
from keye_kernels._verdicts import Kind, Sizes

_NAMES = ("cuda", "triton", "reference")  # candidates that can be asked for by name
_ORDER = ("triton", "reference")  # without a verdict "auto" takes the first that serves
_VARIABLE = "KEYE_KERNELS_BACKEND"
# TRITON_INTERPRET=1 must be set when triton is imported; tl.sum is then not a JITFunction.
_INTERPRETED = not isinstance(tl.sum, triton.JITFunction)


@dataclass(frozen=True)
class _Implementation:
    run: Callable[..., None]  # takes the arguments of the op's schema, in order
    device_types: tuple[str, ...]
    why_not: Callable[[], str | None]  # why it cannot serve on this machine; None if it can
    refuses: Callable[..., str | None] | None  # why it does not serve these arguments


@dataclass(frozen=True)
class ServedBy:
    """What serves one op.

    Attributes:
        backend: Serves where no verdict says otherwise; None if nothing does.
        why_not: Why each other backend does not.
        verdicts: What `tune` chose on this machine, a line per class of shapes.
    """

    backend: str | None
    why_not: dict[str, str]
    verdicts: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {why}" for name, why in self.why_not.items())
        tuned = "".join(f"; {verdict}" for verdict in self.verdicts)
        return f"{self.backend or 'nothing'} ({reasons}){tuned}"


_registry: dict[str, dict[str, _Implementation]] = {}
_classes: dict[str, Callable[..., tuple[tuple, Sizes]]] = {}
# Keyed by (op, device type, requested backend), so threads never overwrite each other. The value is
# the record and the function to call, None if no backend serves.
_chosen: dict[tuple[str, str, str], tuple[ServedBy, Callable[..., None] | None]] = {}


def _checked(source: str, name: str) -> str:
    if name != "auto" and name not in _NAMES:
        raise ValueError(f"{source} must be one of auto, {', '.join(_NAMES)}, got {name!r}")
    return name


_default = os.environ.get(_VARIABLE, "auto")  # checked at first use: importing never fails
# Per thread, like torch.no_grad: two servers in one process choose independently.
_asked: ContextVar[str | None] = ContextVar("keye_kernels_backend", default=None)


def requested() -> str:
    """The backend this thread asked for, else that of the environment variable, else "auto"."""
    return _asked.get() or _default


def register(
    op: str,
    backend: str,
    run: Callable[..., None],
    *,
    device_types: tuple[str, ...] = ("cuda",),
    why_not: Callable[[], str | None] = lambda: None,
    refuses: Callable[..., str | None] | None = None,
) -> None:
    """Let the candidate ``backend`` serve ``op`` for tensors on ``device_types``.

    ``run`` takes the arguments of the op's schema by position and writes its outputs. Triton
    kernels serve CPU tensors too, under the interpreter and only by name. "cuda", "triton" and
    "reference" can be asked for by name; candidates of other names serve where `tune` chose them.

    Args:
        why_not: Says why the backend cannot serve on this machine; None if it can.
        refuses: Takes the arguments of ``run`` and tells why it cannot serve them, None if it can.
            A backend asked for by name then raises; under "auto" the next one serves that call.
    """
    global _chosen
    _registry.setdefault(op, {})[backend] = _Implementation(run, device_types, why_not, refuses)
    _chosen = {}


def register_class(op: str, class_of: Callable[..., tuple[tuple, Sizes]]) -> None:
    """Let ``class_of`` tell the class of shapes of a call of ``op``, from the op's arguments.

    Its kind must be that of a tuned case, its sizes are compared with those of all such cases.
    Without it, the kind is nothing and the size that of the first argument.
    """
    _classes[op] = class_of


def classify(op: str, args: Sequence[Any]) -> tuple[Kind, Sizes]:
    """Class of shapes of a call: dtype and the op's kind, and sizes rounded to powers of two."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    kind, sizes = _classes[op](*args) if op in _classes else ((), (tensors[0].numel(),))
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)
    dtype = str(dtype).removeprefix("torch.")
    rounded = tuple(1 << round(math.log2(size)) if size > 1 else size for size in sizes)
    return (dtype, *map(str, kind)), rounded


def ops() -> list[str]:
    """Names of all ops."""
    return list(_registry)


def candidates(op: str, device_type: str) -> list[str]:
    """Candidates of ``op`` for tensors on the device; first what "auto" takes without a verdict."""
    found = [name for name, one in _registry[op].items() if device_type in one.device_types]
    return sorted(found, key=lambda name: (*_ORDER, name).index(name))


def run_candidate(op: str, name: str, args: Sequence[Any]) -> str | None:
    """Call one candidate; returns why it refuses these arguments, None if it ran."""
    implementation = _registry[op][name]
    reason = implementation.refuses(*args) if implementation.refuses is not None else None
    if reason is None:
        implementation.run(*args)
    return reason


def _why_not(op: str, backend: str, device_type: str, requested: str) -> str | None:
    implementation = _registry[op].get(backend)
    if implementation is None:
        return f"no {backend} kernel for {op}"
    if device_type in implementation.device_types:
        reason = implementation.why_not()
        if reason is None and requested == "auto":
            verdicts = _verdicts.current(device_type)
            bad = verdicts.bad(op, backend) if verdicts is not None else None
            return None if bad is None else f"{bad.status} on this machine: {bad.reason}"
        return reason
    if backend == "triton" and device_type == "cpu":
        if not _INTERPRETED:
            return f"the triton kernel for {op} runs on a CPU only under TRITON_INTERPRET=1"
        if requested != "triton":
            return "the interpreter serves only when backend 'triton' is asked for"
        return None
    return f"the {backend} kernel for {op} does not run on {device_type} tensors"


def _choose(op: str, device_type: str, requested: str) -> ServedBy:
    candidates = _ORDER if _checked(_VARIABLE, requested) == "auto" else (requested,)
    why_not, chosen = {}, None
    for name in _NAMES:
        if name not in candidates:
            reason = f"backend {requested!r} was asked for"
            if requested == "auto":  # CUDA C++ waits for a verdict
                unproven = "not proven on this machine, which `keye tune` does"
                reason = _why_not(op, name, device_type, requested) or unproven
            why_not[name] = reason
    for name in candidates:
        reason = _why_not(op, name, device_type, requested)
        if reason is not None:
            why_not[name] = reason
        elif chosen is None:
            chosen = name
        else:
            why_not[name] = f"{chosen} comes first"
    verdicts = _verdicts.current(device_type) if requested == "auto" else None
    return ServedBy(chosen, why_not, verdicts.describe(op) if verdicts is not None else ())


def _bound(op: str, device_type: str, requested: str, backend: str) -> Callable[..., None]:
    """The function to call for ``backend``; under "auto" verdicts come before it."""
    names = [backend]
    if requested == "auto":
        rest = _ORDER[_ORDER.index(backend) + 1 :]
        names += [name for name in rest if not _why_not(op, name, device_type, requested)]
        verdicts = _verdicts.current(device_type)
        if verdicts is not None and verdicts.of(op):
            return _by_verdict(op, verdicts, _first_that_serves(op, names))
    return _first_that_serves(op, names)


def _first_that_serves(op: str, names: Sequence[str]) -> Callable[..., None]:
    """Call the first of ``names`` that does not refuse the arguments."""
    first = _registry[op][names[0]]
    if first.refuses is None:
        return first.run

    def run(*args: Any) -> None:
        reasons = []
        for name in names:
            reason = run_candidate(op, name, args)
            if reason is None:
                return
            reasons.append(reason)
        raise NotImplementedError(
            f"backend {names[0]!r} cannot serve this call of {op}: {reasons[0]}; backend 'auto' "
            "falls back"
        )

    return run


def _by_verdict(
    op: str, verdicts: _verdicts.Verdicts, otherwise: Callable[..., None]
) -> Callable[..., None]:
    """The candidate that was chosen for the nearest class of shapes, else ``otherwise``."""
    names: dict[tuple[Kind, Sizes], str] = {}

    def run(*args: Any) -> None:
        key = classify(op, args)
        name = names.get(key)
        if name is None:
            row = verdicts.choice(op, *key)
            chosen = _registry[op].get(row.candidate) if row is not None else None
            able = chosen is not None and not chosen.why_not()  # a library may have been removed
            name = names[key] = row.candidate if able else ""
        if not name or run_candidate(op, name, args) is not None:
            otherwise(*args)

    return run


def _remembered(
    op: str, device_type: str, asked: str
) -> tuple[ServedBy, Callable[..., None] | None]:
    chosen, key = _chosen, (op, device_type, asked)
    found = chosen.get(key)
    if found is None:
        served = _choose(*key)
        run = None if served.backend is None else _bound(*key, served.backend)
        found = chosen[key] = served, run
    return found


def find(op: str, device_type: str) -> Callable[..., None]:
    """Implementation of ``op`` for tensors on ``device_type``, chosen once and remembered.

    Raises:
        RuntimeError: The backend asked for cannot serve; the message says why.
    """
    asked = requested()
    served, run = _remembered(op, device_type, asked)
    if run is None:
        raise RuntimeError(
            f"backend {asked!r} cannot serve {op}: {served.why_not[asked]}; "
            "backend 'auto' falls back"
        )
    return run


def backends(device_type: str | None = None) -> dict[str, ServedBy]:
    """Tell which backend serves each op, and why the others do not.

    Args:
        device_type: Device of the tensors, "cuda" or "cpu". "cuda" works without a GPU too.
            Default: "cuda" if there is a GPU, else "cpu".

    Returns:
        Op name to a record with ``backend`` (None when the backend asked for cannot serve the op)
        and ``why_not`` (backend name to reason); ``str()`` of it is one readable line.

    Raises:
        ValueError: Another device type.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type must be 'cpu' or 'cuda', got {device_type!r}")
    asked = requested()
    return {op: _remembered(op, device_type, asked)[0] for op in _registry}


class use_backend:
    """Choose the backend of every op from here on, or inside a ``with`` block.

    ``auto`` takes what `tune` found fastest on this machine; without that, Triton kernels on a GPU
    and plain PyTorch on a CPU. A named backend is binding: an op that it cannot serve raises
    RuntimeError when called. The choice holds for this thread, like ``torch.no_grad``. The default
    is the environment variable KEYE_KERNELS_BACKEND, else ``auto``.

    Args:
        backend: "auto", "cuda", "triton" or "reference".

    Raises:
        ValueError: Another name.
    """

    def __init__(self, backend: str) -> None:
        self._token = _asked.set(_checked("backend", backend))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _asked.reset(self._token)
