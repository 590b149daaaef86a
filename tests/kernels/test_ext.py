"""The CUDA extension: how it is built or not, and what is told about it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import keye_kernels as kk
from keye_kernels import _backends, _cuda, _ext
from keye_kernels.paged_decode_attention import _num_runs
from tests.kernels.paged import Cache

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CUDA_OPS = {op for op, found in _backends._registry.items() if "cuda" in found}
UNPROVEN = "not proven on this machine, which `keye tune` does"


@pytest.fixture
def extension(monkeypatch):
    """A stand-in for an extension with code for 8.0 and 9.0a."""
    module = SimpleNamespace(architectures="80 90a", capture_id=lambda _: 0)
    monkeypatch.setattr(_ext, "_C", module)
    monkeypatch.setattr(_backends, "_chosen", {})
    return module


@pytest.fixture
def no_extension(monkeypatch, tmp_path):
    """No extension, and a package folder of its own."""
    monkeypatch.setattr(_ext, "_C", None)
    monkeypatch.setattr(_backends, "_chosen", {})
    monkeypatch.setattr(_ext, "__file__", str(tmp_path / "_ext.py"))
    return tmp_path


def test_reason_of_the_build_is_told(no_extension):
    assert _ext.why_not() == "the CUDA extension is not built: no build was tried"
    (no_extension / "_not_built.txt").write_text("no nvcc on PATH\n")
    assert kk.describe_extension() == "the CUDA extension is not built: no nvcc on PATH"
    assert _ext.architectures() == ()
    served = kk.backends("cuda")["paged_decode_attention"]
    assert served.why_not["cuda"] == "the CUDA extension is not built: no nvcc on PATH"


def test_an_extension_that_cannot_be_loaded_is_told(no_extension, monkeypatch):
    (no_extension / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(_ext, "_error", "undefined symbol: x")
    assert _ext.why_not() == "the CUDA extension cannot be loaded: undefined symbol: x"


@pytest.mark.usefixtures("extension")
def test_architectures():
    assert kk.describe_extension() == "built for sm_80, sm_90a"
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        assert _ext.why_not_on(capability) is None
    for capability in ((7, 5), (10, 0), (12, 0)):
        major, minor = capability
        assert _ext.why_not_on(capability) == (
            f"the CUDA extension holds code for sm_80, sm_90a, not for sm_{major}{minor}"
        )


@pytest.mark.usefixtures("extension")
def test_auto_leaves_out_what_never_ran_on_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for op in CUDA_OPS:
        assert kk.backends("cuda")[op].why_not["cuda"] == UNPROVEN
        with kk.use_backend("cuda"):
            assert kk.backends("cuda")[op].backend == "cuda"


def test_counters_belong_to_one_stream_or_graph(extension, monkeypatch):
    monkeypatch.setattr(_cuda.Counters, "NUM_SLICES", 3)
    counters, cpu = _cuda.Counters(), torch.device("cpu")

    def get(stream, count=8, capture=0):
        extension.capture_id = lambda _: capture
        found = counters.get(cpu, stream, count)
        assert len(found) >= count
        assert (found == 0).all()
        return found.data_ptr()

    # In a capture nothing can be prepared: cleared by a node of the graph.
    assert get(1, capture=5) != get(1, capture=5)
    first = get(1)
    assert get(1) == first
    others = {get(2), get(1, capture=6), first}
    assert len(others) == 3
    assert get(1, capture=6) in others
    # Past the slices there are, and past the size of one: cleared at each launch.
    assert get(3) not in others
    assert get(1, count=_cuda.Counters.SIZE + 1) not in others


@pytest.mark.parametrize("num_sms", [132, 148, 188], indirect=True)
def test_a_batch_of_long_contexts_takes_counters_of_the_pool(extension, num_sms, monkeypatch):
    """128 rows at 8 key/value heads: nothing is allocated, so no launch clears counters."""
    monkeypatch.setattr(_cuda, "counters", counters := _cuda.Counters())
    launched = []
    extension.paged_decode_attention = lambda **arguments: launched.append(arguments)
    q = torch.zeros(128, 32, 64).bfloat16()
    pages = torch.zeros(1, 16, 8, 64).bfloat16()
    table = torch.zeros(128, 256, dtype=torch.int32)
    lengths = torch.full((128,), 4096, dtype=torch.int32)
    run = _backends._registry["paged_decode_attention"]["cuda"].run
    run(q, pages, pages, table, lengths, 0.125, 4096, torch.empty_like(q), None)
    assert launched[0]["num_splits"] == 2
    (taken,) = counters._slices.values()
    assert launched[0]["counters"] == taken.data_ptr()
    # No launch that splits needs more.
    largest = 8 * num_sms
    assert _num_runs(largest, 1, 2**20, num_sms) == 2
    assert _num_runs(largest + 1, 1, 2**20, num_sms) == 1
    assert largest <= len(taken)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_and_streams_at_once():
    """Each has counters of its own, so launches side by side do not count each other's blocks."""
    if (reason := _cuda._why_not()) is not None:
        pytest.skip(reason)
    cache = Cache([3000, 700], 16, 2, 128, torch.bfloat16, "cuda")
    q = torch.randn(2, 8, 128, device="cuda").bfloat16()

    def decode():
        tensors = (q, cache.k, cache.v, cache.table, cache.lengths)
        return kk.paged_decode_attention(*tensors, max_seqlen_k=cache.max_seqlen)

    with kk.use_backend("cuda"):
        expected = decode()
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        results = []
        for graph in graphs:
            with torch.cuda.graph(graph):
                results.append(decode())
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for _ in range(100):
            for graph, stream in zip(graphs, streams, strict=False):
                with torch.cuda.stream(stream):
                    graph.replay()
            with torch.cuda.stream(streams[2]):
                results.append(decode())
        torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, expected)


@pytest.fixture
def checkout(tmp_path):
    """As much of the project as a build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "keye_kernels").mkdir()
    (tmp_path / "keye_kernels" / "__init__.py").touch()
    return tmp_path


def build_in(folder, **environment):
    """Builds with what `environment` says, whatever this machine's says of CUDA."""
    kept = {key: x for key, x in os.environ.items() if not key.startswith(("CUDA_", "KEYE_"))}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
    )


def test_build_is_skipped_with_the_reason(checkout):
    stale = checkout / "keye_kernels" / f"_C{SUFFIX}"
    stale.touch()
    done = build_in(checkout, KEYE_CUDA="0")
    assert done.returncode == 0, done.stderr
    record = checkout / "keye_kernels" / "_not_built.txt"
    assert record.read_text() == "KEYE_CUDA=0 was set at the build\n"
    assert not stale.exists()


def test_build_that_is_asked_for_fails_loudly(checkout):
    broken = checkout / "bin"
    broken.mkdir()
    (broken / "nvcc").write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && exec echo sm_80\n'
        'echo "error: no memory" >&2; exit 1\n'
    )
    (broken / "nvcc").chmod(0o755)
    path = f"{broken}:{os.environ['PATH']}"
    done = build_in(checkout, KEYE_CUDA="1", PATH=path)
    assert done.returncode != 0
    assert "KEYE_CUDA=1: " in done.stderr
    done = build_in(checkout, PATH=path)
    assert done.returncode == 0, done.stderr
    reason = (checkout / "keye_kernels" / "_not_built.txt").read_text()
    assert reason == "nvcc failed: error: no memory\n" or reason.startswith(
        ("ninja is not", "pybind11 is not", "the headers of")
    )
    done = build_in(checkout, KEYE_CUDA="yes")
    assert done.returncode != 0
    assert "KEYE_CUDA must be 0, 1 or unset, got 'yes'" in done.stderr


def test_build_in_a_folder_with_a_space(checkout):
    folder = checkout.rename(checkout.with_name("a checkout"))
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && exec echo sm_80\n'
        'for each; do case $each in *.d | *.o | *.so) : >"$each" ;; esac; done\n'
    )
    nvcc.chmod(0o755)
    done = build_in(folder, PATH=f"{nvcc.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    if not (folder / "keye_kernels" / f"_C{SUFFIX}").exists():
        reason = (folder / "keye_kernels" / "_not_built.txt").read_text()
        assert reason.startswith(("ninja is not", "pybind11 is not", "the headers of"))
