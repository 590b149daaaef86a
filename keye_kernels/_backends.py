"""The implementations of each op, registered by the op families, and the choice among them."""

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_ORDER = ("cuda", "triton", "reference")  # "auto" takes the first that can serve
_VARIABLE = "KEYE_KERNELS_BACKEND"
# TRITON_INTERPRET=1 must be set when triton is imported; tl.sum is then not a JITFunction.
_INTERPRETED = not isinstance(tl.sum, triton.JITFunction)


@dataclass(frozen=True)
class _Implementation:
    run: Callable[..., None]  # takes the arguments of the op's schema, in order
    device_types: tuple[str, ...]
    why_not: Callable[[], str | None]  # why it cannot serve on this machine; None if it can
    refuses: Callable[..., str | None] | None  # why it does not serve these arguments
    max_rows: int | None  # "auto" gives calls with more rows (first argument) to the next backend
    proven: bool  # has run on hardware


@dataclass(frozen=True)
class ServedBy:
    """The ``backend`` that serves one op (None if none can), and why each other one does not."""

    backend: str | None
    why_not: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {why}" for name, why in self.why_not.items())
        return f"{self.backend or 'nothing'} ({reasons})"


_registry: dict[str, dict[str, _Implementation]] = {}
# Keyed by (op, device type, requested backend), so threads never overwrite each other. The value is
# the record and the function to call, None if no backend serves.
_chosen: dict[tuple[str, str, str], tuple[ServedBy, Callable[..., None] | None]] = {}


def _checked(source: str, name: str) -> str:
    if name != "auto" and name not in _ORDER:
        raise ValueError(f"{source} must be one of auto, {', '.join(_ORDER)}, got {name!r}")
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
    max_rows: int | None = None,
    proven: bool = True,
) -> None:
    """Let ``backend`` serve ``op`` for tensors on ``device_types``.

    ``run`` takes the arguments of the op's schema by position and writes its outputs. Triton
    kernels serve CPU tensors too, under the interpreter and only by name.

    Args:
        why_not: Says why the backend cannot serve on this machine; None if it can.
        refuses: Takes the arguments of ``run`` and tells why it cannot serve them, None if it can.
            A backend asked for by name then raises; under "auto" the next one serves that call.
        max_rows: Under "auto" calls whose first argument has more rows go to the next backend.
        proven: The kernel has run on hardware. If not, it serves only when asked for by name.
    """
    global _chosen
    _registry.setdefault(op, {})[backend] = _Implementation(
        run, device_types, why_not, refuses, max_rows, proven
    )
    _chosen = {}


def _why_not(op: str, backend: str, device_type: str, requested: str) -> str | None:
    implementation = _registry[op].get(backend)
    if implementation is None:
        return f"no {backend} kernel for {op}"
    if device_type in implementation.device_types:
        reason = implementation.why_not()
        if reason is None and requested == "auto" and not implementation.proven:
            return "never run on hardware; ask for it by name"
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
    why_not = {
        name: f"backend {requested!r} was asked for" for name in _ORDER if name not in candidates
    }
    chosen = None
    for name in candidates:
        reason = _why_not(op, name, device_type, requested)
        if reason is not None:
            why_not[name] = reason
        elif chosen is None:
            chosen = name
        else:
            why_not[name] = f"{chosen} comes first"
    return ServedBy(chosen, why_not)


def _with_limits(
    op: str, backend: str, implementation: _Implementation, fall_back: Callable[..., None] | None
) -> Callable[..., None]:
    """``implementation.run`` where it serves the arguments, else ``fall_back`` or an error."""
    run, refuses = implementation.run, implementation.refuses
    max_rows = implementation.max_rows if fall_back is not None else None

    def run_within_limits(*args: object) -> None:
        if max_rows is not None and args[0].shape[0] > max_rows:
            return fall_back(*args)
        reason = refuses(*args) if refuses is not None else None
        if reason is None:
            return run(*args)
        if fall_back is not None:
            return fall_back(*args)
        raise NotImplementedError(
            f"backend {backend!r} cannot serve this call of {op}: {reason}; backend 'auto' falls "
            "back"
        )

    return run_within_limits


def _bound(op: str, device_type: str, requested: str, backend: str) -> Callable[..., None]:
    """The function to call for ``backend``; under "auto" it falls back to the next ones."""
    implementation = _registry[op][backend]
    if implementation.refuses is None and (implementation.max_rows is None or requested != "auto"):
        return implementation.run
    fall_back = None
    if requested == "auto":
        rest = _ORDER[_ORDER.index(backend) + 1 :]
        after = next(name for name in rest if not _why_not(op, name, device_type, requested))
        fall_back = _bound(op, device_type, requested, after)
    return _with_limits(op, backend, implementation, fall_back)


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

    ``auto`` takes, for each op, the first of cuda, triton and reference that can serve it and has
    run on hardware. A named backend is binding: an op that it cannot serve raises RuntimeError when
    called. The choice holds for this thread, like ``torch.no_grad``. The default is the environment
    variable KEYE_KERNELS_BACKEND, else ``auto``.

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
