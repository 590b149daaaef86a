"""Backends that "auto" does not choose by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from keye_kernels import _backends


@contextmanager
def trusting_cuda() -> Iterator[None]:
    """Inside this context "auto" also takes CUDA kernels that have never run on hardware."""
    trusted = {
        op: {name: replace(one, proven=True) for name, one in served.items()}
        for op, served in _backends._registry.items()
    }
    with mock.patch.multiple(_backends, _registry=trusted, _chosen={}):
        yield
