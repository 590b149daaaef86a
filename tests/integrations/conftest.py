"""What the tests of integrations get where they ask for it."""

import pytest
import torch


@pytest.fixture
def on_device(device: torch.device):
    """New tensors are on the GPU where there is one."""
    if device.type == "cuda":
        torch.set_default_device(device)
    yield
    torch.set_default_device(None)
