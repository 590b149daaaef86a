"""A decoder layer's whole step on CUDA kernels, run by g++: six launches and nothing else."""

from copy import deepcopy

import pytest
import torch

from keye_kernels import use_backend
from keye_model.checkpoint.config import PREVIEW
from keye_model.network.cache import PagedCache
from tests.compare import assert_close
from tests.model import tiny

pytestmark = pytest.mark.usefixtures("native", "num_sms")


def decode(layer, config, backend, dtype):
    """Three sequences get one token each, after caches of the same random keys and values."""
    torch.manual_seed(1)
    cache = PagedCache(config, 6, dtype=dtype, device="cpu")
    for pages in (cache.k, cache.v):
        pages.copy_(torch.randn(pages.shape).bfloat16())
    handles = [cache.add() for _ in range(3)]
    cache.append(handles, [70, 3, 20])
    x = torch.randn(3, config.hidden_size).bfloat16().to(dtype)
    positions = torch.tensor([[70, 3, 20]]).expand(3, -1).contiguous()
    with use_backend(backend), torch.no_grad():
        return layer.to(dtype)(x, positions, cache, cache.append(handles, [1, 1, 1]))


@pytest.mark.parametrize("num_sms", [132], indirect=True)
def test_step_on_cuda_kernels_only():
    config = tiny.tiny_keye(PREVIEW).model.config.text_config
    layer = deepcopy(tiny.tiny_keye(PREVIEW).model.language_model.layers[0]).bfloat16()
    got = decode(layer, config, "cuda", torch.bfloat16)
    plain = decode(layer, config, "reference", torch.bfloat16)
    exact = decode(layer, config, "reference", torch.float32)
    assert_close(got, plain, exact.double())
