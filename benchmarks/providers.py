"""Who computes a result: ours, plain PyTorch, torch.compile of it, libraries that may be absent.

A provider is a function of one set of inputs. A library that is not installed, and a shape that one
refuses, become a row of the table that says so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import DEVICE, ON_GPU, Run
from keye_kernels import backends, use_backend

SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Provider:
    """One way to a result.

    Attributes:
        run: Takes a set of inputs as keywords, returns the result. None: see `absent`.
        absent: Why there is nothing to run.
        context: Entered around the calls, outside of each of them.
        ours: Not a peer.
        capture: False: no CUDA graph; see `launched` of `timing.race`.
        differs: Why its result is wrong ("" if it is not), where it need not be the definition's.
    """

    run: Run | None
    absent: str = ""
    context: Callable[[], AbstractContextManager] = nullcontext
    ours: bool = False
    capture: bool = True
    differs: Callable[[object, object], str] | None = None


Providers = dict[str, Provider]
T = TypeVar("T")


def absent(reason: str) -> Provider:
    return Provider(None, absent=reason)


def ours(op: str, run: Run) -> Providers:
    """One provider for each backend that serves `op` here."""
    found = {}
    for name in ("cuda", "triton", "reference"):
        with use_backend(name):
            served = backends()[op].backend
        if served is not None:
            context = functools.partial(use_backend, name)
            found[f"ours ({name})"] = Provider(run, context=context, ours=True)
    return found


def our_model(run: Run, *, capture: bool = True) -> Providers:
    """Our model as a user gets it, and on the definitions alone where that is something else."""
    found = {"ours": Provider(run, ours=True, capture=capture)}
    if {served.backend for served in backends().values()} != {"reference"}:
        context = functools.partial(use_backend, "reference")
        found["ours (reference)"] = Provider(run, context=context, ours=True, capture=False)
    return found


def plain(eager: Run, *, compiled: bool = True) -> Providers:
    """PyTorch as one writes it, and the same through torch.compile."""
    found = {"eager": Provider(eager)}
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself, whatever came before
        found["torch.compile"] = Provider(torch.compile(eager, dynamic=False))
    return found


def library(module: str, bind: Callable[[ModuleType], Run]) -> Provider:
    """A provider out of a library: `bind` takes the imported module and gives the function.

    Whatever goes wrong with the import or in `bind` is the reason of its absence.
    """
    try:
        return Provider(bind(importlib.import_module(module)))
    except Exception as error:
        return absent(reason_of(error))


def gpu_library(module: str, bind: Callable[[ModuleType], Run]) -> Provider:
    """As `library`, for one whose kernels need a GPU."""
    return library(module, bind) if ON_GPU else absent("needs a GPU")


def sdpa(run: Run) -> Providers:
    """`run` under each of PyTorch's fused attention backends."""
    found = {}
    for label, backend in SDPA_BACKENDS.items():
        if ON_GPU or backend is SDPBackend.FLASH_ATTENTION:
            found[label] = Provider(run, context=functools.partial(sdpa_kernel, backend))
        else:
            found[label] = absent("needs a GPU")
    return found


def accepted(function: Callable, wanted: dict[str, object]) -> dict[str, object]:
    """The keywords of `wanted` that `function` knows: libraries rename them between releases."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


def first(result: object) -> torch.Tensor:
    """The output of a function that also returns a log-sum-exp in some releases."""
    return result[0] if isinstance(result, tuple) else result


def torch_varlen(*, causal: bool, grouped: bool = False) -> Callable[[ModuleType], Run]:
    """Binds `torch.nn.attention.varlen` to a function of our names, causal or not.

    Release 2.10 has `is_causal`, later ones `window_size`; `enable_gqa` came after both.
    """

    def bind(module: ModuleType) -> Run:
        function = module.varlen_attn
        mask = {"is_causal": causal, "window_size": (-1, 0 if causal else -1)}
        keywords = accepted(function, mask)
        if causal and not keywords:
            raise NotImplementedError("varlen_attn has no causal mask in this release")
        if grouped:
            keywords |= accepted(function, {"enable_gqa": True})

        def run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **x):
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return first(function(q, k, v, *lengths, **keywords, **accepted(function, x)))

        return run

    return bind


def flashinfer_plan(
    module: str, plan: Callable[[ModuleType, torch.Tensor], object]
) -> Callable[[], object]:
    """Gives what `plan` made of the module and a workspace, or raises what it raised.

    Planned at once and not when it is first run: it is not what is timed.
    """
    try:
        loaded = importlib.import_module(module) if ON_GPU else None
        workspace = torch.empty(2**27 if ON_GPU else 0, dtype=torch.uint8, device=DEVICE)
        planned = plan(loaded, workspace) if loaded else None
    except Exception as error:
        failed = error

        def give() -> object:
            raise failed

        return give
    return lambda: planned


def reason_of(error: BaseException) -> str:
    """One line: the kind of the error and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def only(providers: dict[str, T], names: Sequence[str]) -> dict[str, T]:
    """Those whose name contains one of `names`; all if there are none."""
    if not names:
        return providers
    return {k: p for k, p in providers.items() if any(name in k for name in names)}
