"""Ints in a tuple argument of a kernel, encoded so that Triton does not specialise on them.

Triton compiles a kernel anew for an int that is 1 or a multiple of 16. ``do_not_specialize`` stops
that for an argument, not for the elements of a tuple. So n is passed as 2 n + 3: odd, never 1.
"""

from collections.abc import Iterable

import triton
import triton.language as tl


def encode(ints: Iterable[int]) -> tuple[int, ...]:
    """Encode ints of 0 and more."""
    return tuple([2 * n + 3 for n in ints])


@triton.jit
def decode(code):
    """Decode one int."""
    return (code - 3) >> 1


@triton.jit
def decode_all(codes):
    """Decode a tuple."""
    ints = ()
    for i in tl.static_range(len(codes)):
        ints += (decode(codes[i]),)
    return ints
