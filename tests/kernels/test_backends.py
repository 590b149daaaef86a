"""The choice of a backend per op: what is told, what is refused, what falls back."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
import torch

import keye_kernels as kk
from keye_kernels import _backends, _ops
from testing.backends import trusting_cuda


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry and of the choice, for a test to change."""
    monkeypatch.setattr(
        _backends, "_registry", {op: {**b} for op, b in _backends._registry.items()}
    )
    monkeypatch.setattr(_backends, "_chosen", {})
    monkeypatch.setattr(_backends, "_default", "auto")
    monkeypatch.setattr(_backends, "_asked", ContextVar("asked", default=None))


def negate_gate(gate_up, out):
    out.copy_(-gate_up[:, : out.shape[1]])


@pytest.mark.usefixtures("registry")
def test_backends_tells_who_serves_and_why_not(monkeypatch):
    monkeypatch.setattr(_backends, "_registry", {"silu_mul": {}})
    _backends.register("silu_mul", "reference", negate_gate, device_types=("cpu", "cuda"))
    served = kk.backends()["silu_mul"]
    assert served.backend == "reference"
    assert served.why_not == {
        "cuda": "no cuda kernel for silu_mul",
        "triton": "no triton kernel for silu_mul",
    }
    assert str(served).startswith("reference (not cuda: no cuda kernel for silu_mul; not tri")


@pytest.mark.usefixtures("registry")
def test_a_registered_kernel_serves_at_once(device):
    x = torch.randn(2, 8, device=device)
    kk.silu_mul(x)
    _backends.register("silu_mul", "triton", negate_gate, device_types=("cpu", "cuda"))
    assert torch.equal(kk.silu_mul(x), -x[:, :4])
    served = kk.backends()["silu_mul"]
    assert served.backend == "triton"
    assert served.why_not["reference"] == "triton comes first"
    with kk.use_backend("reference"):
        assert not torch.equal(kk.silu_mul(x), -x[:, :4])
        assert kk.backends()["silu_mul"].why_not["triton"] == "backend 'reference' was asked for"
    assert torch.equal(kk.silu_mul(x), -x[:, :4])


@pytest.mark.usefixtures("registry")
def test_kernels_without_a_verdict_are_trusted_inside_only(device):
    on = {"device_types": ("cpu", "cuda")}
    _backends.register("silu_mul", "cuda", lambda _, out: out.fill_(2), **on)
    x = torch.zeros(1, 8, device=device)
    with trusting_cuda():
        assert kk.backends()["silu_mul"].backend == "cuda"
        assert (kk.silu_mul(x) == 2).all()
    assert (kk.silu_mul(x) == 0).all()


@pytest.mark.usefixtures("registry")
def test_a_kernel_for_another_device_does_not_serve():
    x = torch.randn(2, 8)
    expected = kk.silu_mul(x)
    _backends.register("silu_mul", "cuda", negate_gate)
    assert torch.equal(kk.silu_mul(x), expected)
    with (
        kk.use_backend("cuda"),
        pytest.raises(RuntimeError, match="cuda kernel for silu_mul does not run on cpu tensors"),
    ):
        kk.silu_mul(x)


@pytest.mark.usefixtures("registry")
def test_auto_passes_on_what_a_kernel_does_not_serve(device):
    def refuses(gate_up, out):  # noqa: ARG001
        return "width must not be 6, got 6" if out.shape[1] == 6 else None

    for name in ("triton", "cuda"):
        limits = {"device_types": ("cpu", "cuda"), "refuses": refuses}
        _backends.register("silu_mul", name, negate_gate, **limits)
    served, wide = (torch.randn(2, width, device=device) for width in (8, 12))
    torch.testing.assert_close(kk.silu_mul(wide), kk.reference.silu_mul(wide))
    assert torch.equal(kk.silu_mul(served), -served[:, :4])
    with kk.use_backend("cuda"):
        assert torch.equal(kk.silu_mul(served), -served[:, :4])
        with pytest.raises(
            NotImplementedError,
            match="backend 'cuda' cannot serve this call of silu_mul: width must not be 6, got 6",
        ):
            kk.silu_mul(wide)


@pytest.mark.usefixtures("registry")
def test_auto_waits_for_a_verdict_on_cuda_kernels(device):
    x = torch.randn(2, 8, device=device)
    _backends.register("silu_mul", "cuda", negate_gate, device_types=("cpu", "cuda"))
    torch.testing.assert_close(kk.silu_mul(x), kk.reference.silu_mul(x))
    reason = kk.backends()["silu_mul"].why_not["cuda"]
    assert reason == "not proven on this machine, which `keye tune` does"
    with kk.use_backend("cuda"):
        assert torch.equal(kk.silu_mul(x), -x[:, :4])
    _backends.register(
        "silu_mul", "cuda", negate_gate, device_types=("cpu", "cuda"), why_not=lambda: "not built"
    )
    assert kk.backends()["silu_mul"].why_not["cuda"] == "not built"
    with kk.use_backend("cuda"), pytest.raises(RuntimeError, match="serve silu_mul: not built"):
        kk.silu_mul(x)


@pytest.mark.usefixtures("registry")
def test_triton_serves_a_cpu_by_name_under_the_interpreter_only(monkeypatch):
    x = torch.randn(2, 8)
    expected = kk.silu_mul(x)
    _backends.register("silu_mul", "triton", negate_gate)
    monkeypatch.setattr(_backends, "_INTERPRETED", True)
    assert torch.equal(kk.silu_mul(x), expected)
    assert kk.backends("cpu")["silu_mul"].why_not["triton"] == (
        "the interpreter serves only when backend 'triton' is asked for"
    )
    with kk.use_backend("triton"):
        assert torch.equal(kk.silu_mul(x), -x[:, :4])
    monkeypatch.setattr(_backends, "_INTERPRETED", False)
    monkeypatch.setattr(_backends, "_chosen", {})
    message = "the triton kernel for silu_mul runs on a CPU only under TRITON_INTERPRET=1"
    assert kk.backends("cpu")["silu_mul"].why_not["triton"] == message
    with kk.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        kk.silu_mul(x)


@pytest.mark.usefixtures("registry")
def test_backends_answers_for_a_gpu_anywhere():
    _backends.register("silu_mul", "triton", negate_gate)
    assert kk.backends("cuda")["silu_mul"].backend == "triton"
    with kk.use_backend("reference"):
        assert kk.backends("cuda")["silu_mul"].backend == "reference"
    with pytest.raises(ValueError, match="device_type must be 'cpu' or 'cuda', got 'tpu'"):
        kk.backends("tpu")


@pytest.mark.usefixtures("registry")
def test_a_choice_made_during_a_change_does_not_outlive_it(monkeypatch):
    """As in another thread that looks an op up while this one changes the backend."""
    choose = _backends._choose

    def choose_and_change(op, device_type, requested):
        served = choose(op, device_type, requested)
        _backends.use_backend("cuda")
        return served

    with monkeypatch.context() as patch:
        patch.setattr(_backends, "_choose", choose_and_change)
        _backends.find("silu_mul", "cpu")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve silu_mul"):
        kk.silu_mul(torch.zeros(1, 2))


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    """The launch function of an op is called with that device current."""
    current, seen = [0], []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *exception):
            current[0] = self.before

    class OnDevice:
        def __init__(self, index):
            self.get_device = lambda: index

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    run = _ops.on_own_device(lambda: lambda *_: seen.append(current[0]), 1)
    run("tanh", OnDevice(1))
    run("tanh", OnDevice(0))
    assert seen == [1, 0]
    assert current == [0]


@pytest.mark.usefixtures("registry")
def test_a_named_backend_never_falls_back(monkeypatch, device):
    monkeypatch.delitem(_backends._registry["silu_mul"], "triton", raising=False)
    x = torch.randn(2, 8, device=device)
    message = "backend 'triton' cannot serve silu_mul: no triton kernel for silu_mul"
    with kk.use_backend("triton"):
        assert kk.backends()["silu_mul"].backend is None
        with pytest.raises(RuntimeError, match=message):
            kk.silu_mul(x)
    kk.silu_mul(x)


@pytest.mark.usefixtures("registry")
def test_use_backend_holds_as_a_function_and_nests(device):
    kk.use_backend("reference")
    assert _backends.requested() == "reference"
    with kk.use_backend("auto"):
        with kk.use_backend("cuda"):
            assert _backends.requested() == "cuda"
        assert _backends.requested() == "auto"
    assert _backends.requested() == "reference"
    with pytest.raises(ZeroDivisionError), kk.use_backend("cuda"):
        _ = 1 / 0
    assert _backends.requested() == "reference"
    assert kk.silu_mul(torch.zeros(1, 2, device=device)).item() == 0


@pytest.mark.usefixtures("registry")
def test_threads_choose_for_themselves():
    """Overlapping blocks of two threads leave neither the other's choice nor a stale one."""
    with ThreadPoolExecutor(max_workers=1) as pool:

        def there(function, *args):
            return pool.submit(function, *args).result()

        with kk.use_backend("reference"):
            assert there(_backends.requested) == "auto"
            choice = there(kk.use_backend, "cuda")
            assert there(_backends.requested) == "cuda"
            assert _backends.requested() == "reference"
        assert _backends.requested() == "auto"
        assert there(_backends.requested) == "cuda"
        there(choice.__exit__)
        assert there(_backends.requested) == "auto"


def test_unknown_names_are_refused():
    message = "backend must be one of auto, cuda, triton, reference, got 'numpy'"
    with pytest.raises(ValueError, match=message):
        kk.use_backend("numpy")


def load_again():
    """The module once more, as a process that starts now would get it."""
    spec = importlib.util.spec_from_file_location("backends_again", _backends.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("KEYE_KERNELS_BACKEND", "triton")
    assert load_again().requested() == "triton"
    monkeypatch.setenv("KEYE_KERNELS_BACKEND", "numpy")
    again = load_again()  # importing never fails
    again._registry = _backends._registry
    for use in (again.backends, lambda: again.find("rms_norm", "cpu")):
        with pytest.raises(
            ValueError, match=r"KEYE_KERNELS_BACKEND must be one of auto, .* got 'numpy'"
        ):
            use()
    monkeypatch.delenv("KEYE_KERNELS_BACKEND")
    assert load_again().requested() == "auto"


def test_only_torch_and_numpy_are_imported():
    """The ops are usable without the model and without what only the model needs."""
    code = (
        "import sys, keye_kernels; "
        "print([m for m in ('keye_model', 'transformers', 'PIL', 'av') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
