"""Which implementation serves each op: a registry filled by the op families, and the choice."""

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_ORDER = ("cuda", "triton", "reference")  # "auto" takes the first that serves
_VARIABLE = "KEYE_KERNELS_BACKEND"
# TRITON_INTERPRET=1 counts when triton is imported: tl.sum is then no JITFunction.
_INTERPRETED = not isinstance(tl.sum, triton.JITFunction)


@dataclass(frozen=True)
class _Implementation:
    run: Callable[..., None]  # takes the arguments of the op's schema, in order
    device_types: tuple[str, ...]


@dataclass(frozen=True)
class ServedBy:
    """Who serves one op: ``backend`` (None: nobody can) and, for the others, ``why_not``."""

    backend: str | None
    why_not: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {why}" for name, why in self.why_not.items())
        return f"{self.backend or 'nothing'} ({reasons})"


_registry: dict[str, dict[str, _Implementation]] = {}
# By op, device type and backend asked for, so that a thread that still works with an earlier
# request never writes where the next one reads.
_chosen: dict[tuple[str, str, str], Callable[..., None]] = {}


def _checked(source: str, name: str) -> str:
    if name != "auto" and name not in _ORDER:
        raise ValueError(f"{source} must be one of auto, {', '.join(_ORDER)}, got {name!r}")
    return name


_default = os.environ.get(_VARIABLE, "auto")  # checked at first use: importing never fails
# Of this thread, as torch.no_grad: two servers in one process must not choose for each other.
_asked: ContextVar[str | None] = ContextVar("keye_kernels_backend", default=None)


def requested() -> str:
    """The backend asked for here and now."""
    return _asked.get() or _default


def register(
    op: str, backend: str, run: Callable[..., None], *, device_types: tuple[str, ...] = ("cuda",)
) -> None:
    """Let ``backend`` serve ``op`` for tensors on ``device_types``.

    ``run`` takes the arguments of the op's schema by position and writes its outputs. Triton
    kernels serve CPU tensors too, under the interpreter and only by name.
    """
    global _chosen
    _registry.setdefault(op, {})[backend] = _Implementation(run, device_types)
    _chosen = {}


def _why_not(op: str, backend: str, device_type: str, requested: str) -> str | None:
    implementation = _registry[op].get(backend)
    if implementation is None:
        return f"no {backend} kernel for {op} yet"
    if device_type in implementation.device_types:
        return None
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


def find(op: str, device_type: str) -> Callable[..., None]:
    """Implementation of ``op`` for tensors on ``device_type``, chosen once and remembered.

    Raises:
        RuntimeError: The backend asked for cannot serve; the message says why.
    """
    chosen, asked = _chosen, requested()
    run = chosen.get((op, device_type, asked))
    if run is None:
        served = _choose(op, device_type, asked)
        if served.backend is None:
            raise RuntimeError(
                f"backend {asked!r} cannot serve {op}: {served.why_not[asked]}; "
                "backend 'auto' falls back"
            )
        run = chosen[op, device_type, asked] = _registry[op][served.backend].run
    return run


def backends(device_type: str | None = None) -> dict[str, ServedBy]:
    """Tell which backend serves each op, and why the others do not.

    Args:
        device_type: Of the tensors, "cuda" or "cpu". Default: "cuda" where there is a GPU, else
            "cpu". "cuda" can be asked about anywhere.

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
    return {op: _choose(op, device_type, requested()) for op in _registry}


class use_backend:
    """Choose the backend of every op from here on, or inside a ``with`` block.

    ``auto`` takes the fastest that serves, per op. A named backend is binding: an op that it
    cannot serve raises RuntimeError when called. The choice holds for this thread, as that of
    ``torch.no_grad``; where none was made, the environment variable KEYE_KERNELS_BACKEND holds,
    else ``auto``.

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
