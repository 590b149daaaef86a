"""What the launches of the CUDA kernels of `csrc` share: registration, limits, counters."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from keye_kernels import _backends, _ext
from keye_kernels._device import device_of


class CudaLimits(NamedTuple):
    """What a kernel serves. Names are those of the op's schema, "first" is its first tensor.

    `max_rows` and `head_dims` repeat the headers of `csrc`, since the extension may not be built;
    tests/native compares them.
    """

    aligned: tuple[str, ...]  # tensors, given or None, whose rows begin at multiples of 16 bytes
    dtypes: tuple[torch.dtype, ...] = tuple(_ext.DTYPES)  # of the first
    max_rows: int | None = None  # of the first
    head_dims: tuple[int, ...] | None = None  # sizes of the last dim of `head_dim_of`
    head_dim_of: str = ""
    multiples_of_8: tuple[tuple[str, str], ...] = ()  # tensors, and what their last dim is called


def register(op: str, run: Callable[..., None], limits: CudaLimits) -> None:
    """Let the CUDA kernel of ``op`` serve what is within ``limits``."""
    _backends.register(
        op,
        "cuda",
        run,
        why_not=_why_not,
        refuses=_refuses(op, limits),
    )


def _why_not() -> str | None:
    """Why no CUDA kernel can run on this machine; None if they can."""
    if torch.cuda.is_available():
        return _ext.why_not_on(torch.cuda.get_device_capability())
    return _ext.why_not()


def _refuses(op: str, limits: CudaLimits) -> Callable[..., str | None]:
    """Make a function that takes the op's arguments by position and tells why they are refused."""
    arguments = getattr(torch.ops.keye, op).default._schema.arguments
    places = {argument.name: place for place, argument in enumerate(arguments)}
    first = arguments[0].name
    aligned = [(name, places[name]) for name in limits.aligned]
    sizes = [(size, places[name]) for name, size in limits.multiples_of_8]
    head_dim_place = places.get(limits.head_dim_of)

    def refuses(*args: object) -> str | None:
        if limits.max_rows is not None and args[0].shape[0] > limits.max_rows:
            return f"{first} must have at most {limits.max_rows} rows, got {args[0].shape[0]}"
        for size, place in sizes:
            if args[place].shape[-1] % 8:
                return f"{size} must be a multiple of 8, got {args[place].shape[-1]}"
        if args[0].dtype not in limits.dtypes:
            return f"dtype must be {_any_of(limits.dtypes)}, got {args[0].dtype}"
        if limits.head_dims is not None and args[head_dim_place].shape[-1] not in limits.head_dims:
            got = args[head_dim_place].shape[-1]
            return f"head_dim must be {_any_of(limits.head_dims)}, got {got}"
        for name, place in aligned:
            if (tensor := args[place]) is None:
                continue
            size = tensor.itemsize
            if math.gcd(tensor.data_ptr() // size, *tensor.stride()[:-1]) * size % 16:
                return (
                    f"the rows of {name} must begin at multiples of 16 bytes, got address "
                    f"{tensor.data_ptr():#x} and strides {tensor.stride()}"
                )
        return None

    return refuses


def _any_of(values: tuple[object, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"


def address(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0, a null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether a launch may start while the previous kernel ends: from sm_90 on."""
    return tensor.is_cuda and device_of(tensor).capability >= (9, 0)


class Counters:
    """Counters in device memory that are 0 between launches.

    The blocks of a launch increment a counter; the last block finishes the result and resets it.
    So no launch clears counters, but launches that may run at the same time must not share them.
    Each stream has a slice of its own for good, and so has each captured graph, since it may be
    replayed on any stream. All slices of a device are one allocation, cleared before its first use.
    """

    # Per stream or graph. Attention takes most, one for each 16 query heads of a key/value head and
    # sequence. It splits while those are at most 8 per multiprocessor: 2048 serve 256 of these.
    SIZE = 2048
    NUM_SLICES = 512  # streams and graphs; all counters take 4 MiB per device

    def __init__(self) -> None:
        self._pools: dict[torch.device, list[torch.Tensor]] = {}
        self._slices: dict[tuple, torch.Tensor] = {}
        self._next: dict[torch.device, itertools.count] = {}

    def get(self, device: torch.device, stream: int, count: int) -> torch.Tensor:
        """At least ``count`` counters for launches on ``stream`` or, in a capture, in its graph."""
        capture = _ext.extension().capture_id(stream)  # 0: none
        found = self._slices.get((device, stream, capture))
        if found is not None and count <= self.SIZE:
            return found
        if count <= self.SIZE and (device in self._pools or not capture):
            number = next(self._numbers(device))
            if number < self.NUM_SLICES:
                found = self._pools[device][number]
                return self._slices.setdefault((device, stream, capture), found)
        # This launches a kernel that clears them, in a graph at each replay.
        return torch.zeros(count, dtype=torch.int32, device=device)

    def _numbers(self, device: torch.device) -> itertools.count:
        if device not in self._pools:
            pool = torch.zeros((self.NUM_SLICES, self.SIZE), dtype=torch.int32, device=device)
            if device.type == "cuda":  # other streams use it too
                torch.cuda.current_stream(device).synchronize()
            self._next.setdefault(device, itertools.count())
            self._pools.setdefault(device, list(pool))
        return self._next[device]


counters = Counters()
