"""Tensors with any number of dims as matrices [rows, width], for ops that work row by row."""

import itertools
from collections.abc import Iterator

import torch


def matrices(*tensors: torch.Tensor | None) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Views [rows, width] of tensors with the same leading dims, each row once; None stays None.

    Nothing is copied. Leading dims with regular strides in all tensors are merged, in any order,
    since rows are independent. Of the dims left, the longest becomes the rows of a view and the
    others are looped over: a padded or transposed batch gives a view per sequence.
    """
    if tensors[0].dim() == 2:
        yield tensors
        return
    given = [tensor for tensor in tensors if tensor is not None]
    dims = [
        (size, *(tensor.stride(i) for tensor in given))
        for i, size in enumerate(given[0].shape[:-1])
        if size != 1
    ]
    dims = _merged(dims) or [(1, *(tensor.shape[-1] for tensor in given))]
    longest = dims.pop(dims.index(max(dims)))
    for at in itertools.product(*(range(size) for size, *_ in dims)):
        views = []
        for k, tensor in enumerate(given, start=1):
            walked = sum(i * dim[k] for i, dim in zip(at, dims, strict=True))
            shape, stride = (longest[0], tensor.shape[-1]), (longest[k], tensor.stride(-1))
            views.append(tensor.as_strided(shape, stride, tensor.storage_offset() + walked))
        rest = iter(views)
        yield tuple(None if tensor is None else next(rest) for tensor in tensors)


def _merged(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Merge dims whose outer stride is inner size * inner stride in every tensor, until none is."""
    for outer, inner in itertools.permutations(dims, 2):
        size, *strides = inner
        if all(a == size * b for a, b in zip(outer[1:], strides, strict=True)):
            rest = list(dims)
            rest.remove(outer)
            rest.remove(inner)
            return _merged([(outer[0] * size, *strides), *rest])
    return dims
