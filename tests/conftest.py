"""What every test gets: a device, a fixed seed, and allocations that hold no lucky zeros.

Without a GPU Triton kernels run under its interpreter, which must be asked for before the first
import of triton.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/conftest.py could set its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # tensors this small gain nothing from more; on busy cores they lose

from keye_kernels import _backends, _device

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Run the test with each backend; triton is skipped at an op that has no such kernel."""
    if request.param == "triton":
        find = _backends.find

        def find_or_skip(op: str, device_type: str):
            if "triton" not in _backends._registry[op]:
                pytest.skip(f"no triton kernel for {op} yet")
            return find(op, device_type)

        monkeypatch.setattr(_backends, "find", find_or_skip)
    with _backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def num_sms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Multiprocessors that launches count on where there is no GPU: 1 unless given."""
    count = getattr(request, "param", 1)
    monkeypatch.setattr(_device, "elsewhere", _device.Device((9, 0), count))
    return count


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 in the convolutions that set a bound on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch):
    """Fill torch.empty and its like with NaN, or the largest integer, so unwritten output shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.set_deterministic_debug_mode("warn")  # without it nothing is filled
    yield
    torch.set_deterministic_debug_mode("default")
