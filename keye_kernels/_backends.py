"""Which implementation serves each op: a registry filled by the op families, and the choice."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ORDER = ("cuda", "triton", "reference")  # "auto" takes the first that serves
_VARIABLE = "KEYE_KERNELS_BACKEND"


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
_chosen: dict[tuple[str, str], Callable[..., None]] = {}


def _checked(source: str, name: str) -> str:
    if name != "auto" and name not in _ORDER:
        raise ValueError(f"{source} must be one of auto, {', '.join(_ORDER)}, got {name!r}")
    return name


_requested = _checked(_VARIABLE, os.environ.get(_VARIABLE, "auto"))


def register(
    op: str, backend: str, run: Callable[..., None], *, device_types: tuple[str, ...] = ("cuda",)
) -> None:
    """Let ``backend`` serve ``op`` for tensors on ``device_types``."""
    _registry.setdefault(op, {})[backend] = _Implementation(run, device_types)
    _chosen.clear()


def _why_not(op: str, backend: str, device_type: str) -> str | None:
    implementation = _registry[op].get(backend)
    if implementation is None:
        return f"no {backend} kernel for {op} yet"
    if device_type not in implementation.device_types:
        return f"the {backend} kernel for {op} does not run on {device_type} tensors"
    return None


def _choose(op: str, device_type: str) -> ServedBy:
    candidates = _ORDER if _requested == "auto" else (_requested,)
    why_not = {
        name: f"backend {_requested!r} was asked for" for name in _ORDER if name not in candidates
    }
    chosen = None
    for name in candidates:
        reason = _why_not(op, name, device_type)
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
    run = _chosen.get((op, device_type))
    if run is None:
        served = _choose(op, device_type)
        if served.backend is None:
            raise RuntimeError(
                f"backend {_requested!r} cannot serve {op}: {served.why_not[_requested]}; "
                "backend 'auto' falls back"
            )
        run = _chosen[op, device_type] = _registry[op][served.backend].run
    return run


def backends() -> dict[str, ServedBy]:
    """Tell which backend serves each op on this machine, and why the others do not.

    Answers for CUDA tensors where there is a GPU, for CPU tensors elsewhere.

    Returns:
        Op name to a record with ``backend`` (None when the backend asked for cannot serve the op)
        and ``why_not`` (backend name to reason); ``str()`` of it is one readable line.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return {op: _choose(op, device_type) for op in _registry}


class use_backend:
    """Choose the backend of every op from here on, or inside a ``with`` block.

    ``auto`` takes the fastest that serves, per op. A named backend is binding: an op that it
    cannot serve raises RuntimeError when called. The choice holds for the whole process; its
    first value is the environment variable KEYE_KERNELS_BACKEND, else ``auto``.

    Args:
        name: "auto", "cuda", "triton" or "reference".

    Raises:
        ValueError: Another name.
    """

    def __init__(self, name: str) -> None:
        self._before = _requested
        self._set(_checked("name", name))

    @staticmethod
    def _set(name: str) -> None:
        global _requested
        _requested = name
        _chosen.clear()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._set(self._before)
