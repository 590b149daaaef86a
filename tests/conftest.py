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

from keye_kernels import _backends, _device, _ext

if os.environ.get("TRITON_INTERPRET") == "1":
    from testing import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


# The CUDA kernels where they can run; elsewhere tests/native runs them on the CPU.
_BACKENDS = ["reference", "triton"]
if torch.cuda.is_available() and _ext.why_not() is None:
    _BACKENDS.append("cuda")


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Run the test with each backend; skipped where it has no kernel for op or arguments."""
    name = request.param
    if name != "reference":
        find = _backends.find

        def find_or_skip(op: str, device_type: str):
            if name not in _backends._registry[op]:
                pytest.skip(f"no {name} kernel for {op}")
            run = find(op, device_type)

            def run_or_skip(*args: object) -> None:
                try:
                    run(*args)
                except NotImplementedError as reason:
                    pytest.skip(str(reason))

            return run_or_skip

        monkeypatch.setattr(_backends, "find", find_or_skip)
    with _backends.use_backend(name):
        yield name


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
