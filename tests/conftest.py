"""Fixtures of every test: a device, a fixed seed, and allocations filled with NaN, not with zeros.

Without a GPU, Triton kernels run in Triton's interpreter, which must be switched on before triton
is imported.
"""

import os
import sys
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/conftest.py could set its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # small tensors gain nothing from more threads

# What `keye tune` found on this machine is not what tests are about.
os.environ["KEYE_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), "keye-kernels-never-tuned")

from keye_kernels import _backends, _device, _ext
from tests.broken_cuda import pytest_runtest_protocol  # noqa: F401

if os.environ.get("TRITON_INTERPRET") == "1":
    from testing import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


# "cuda" only where its kernels can run; elsewhere tests/native runs them on the CPU.
_BACKENDS = ["reference", "triton"]
if torch.cuda.is_available() and _ext.why_not() is None:
    _BACKENDS.append("cuda")


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Run the test with each backend; skip one that does not serve the op or its arguments."""
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
    """Set the number of multiprocessors that launches assume without a GPU, by default 1."""
    count = getattr(request, "param", 1)
    monkeypatch.setattr(_device, "elsewhere", _device.Device((9, 0), count))
    return count


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_given_back():
    """Let other processes have the GPU's memory: tensors with large offsets take up to 17 GB."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch TF32 off: on a GPU, convolutions of plain PyTorch set the bound for errors."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch):
    """Fill torch.empty and the like with NaN or the largest integer, to reveal unwritten output."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.set_deterministic_debug_mode("warn")  # without it nothing is filled
    yield
    torch.set_deterministic_debug_mode("default")
