"""Load the CUDA extension built from `csrc`, or say why it is missing."""

from pathlib import Path
from types import ModuleType

import torch

try:
    from keye_kernels import _C

    _error = ""
except ImportError as error:
    _C, _error = None, str(error)

# Codes of csrc/include/keye/types.cuh.
DTYPES = {torch.bfloat16: 0, torch.float16: 1}


def extension() -> ModuleType:
    """The extension; call it only if `why_not_on` returns None."""
    return _C


def architectures() -> tuple[str, ...]:
    """Architectures the extension holds code for, such as ("80", "90a"); empty without one."""
    return tuple(_C.architectures.split()) if _C is not None else ()


def why_not() -> str | None:
    """Why there is no extension; None if there is one."""
    if _C is not None:
        return None
    library = any(Path(__file__).parent.glob("_C.*.so"))
    if library:
        return f"the CUDA extension cannot be loaded: {_error}"
    record = Path(__file__).with_name("_not_built.txt")
    reason = record.read_text().strip() if record.is_file() else "no build was tried"
    return f"the CUDA extension is not built: {reason}"


def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run the extension; None if it can.

    Code for 8.0 runs on all of 8.x, that for 9.0a on 9.0 alone.
    """
    reason = why_not()
    if reason is not None:
        return reason
    major, minor = capability
    for name in architectures():
        exact, digits = name.endswith("a"), name.rstrip("a")
        if int(digits[:-1]) == major and (
            int(digits[-1]) == minor if exact else int(digits[-1]) <= minor
        ):
            return None
    held = ", ".join(f"sm_{name}" for name in architectures())
    return f"the CUDA extension holds code for {held}, not for sm_{major}{minor}"


def describe_extension() -> str:
    """One line: what the CUDA extension holds code for, or why there is none."""
    return why_not() or "built for " + ", ".join(f"sm_{name}" for name in architectures())


def stream_of(tensor: torch.Tensor) -> int:
    """Address of the current stream of the device of ``tensor``."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
