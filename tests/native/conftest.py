"""The CUDA kernels of csrc, compiled by g++ and run on CPU tensors, without nvcc or a GPU.

`shim/` replaces CUDA's headers and two of csrc's own, `launch.cuh` and `intrinsics.cuh`; everything
else, bindings.cpp included, is compiled unchanged. The result is the extension module `_C`, so a
test calls the public op and covers checks, registration, launch arguments, binding and kernel.

How to test a kernel:

1. `pytestmark = pytest.mark.usefixtures("native")` at the top of `tests/native/test_<op>.py`. The
   fixture replaces `keye_kernels._C` by the module and lets backend "cuda", asked for by name,
   serve CPU tensors. Take `native` as an argument for its methods (`Native`).
2. Call the op as a user does and compare with its reference (`tests/compare.py`). Fill memory that
   must not be read with NaN, and block tables with pages that do not exist. Shared memory starts
   as NaN. An MMA of a warp costs about 2 µs: keep a case below 10,000 of them.
3. `for run in native.schedules(): with run: ...` repeats a computation with threads and blocks in
   order, backwards and shuffled, each with asynchronous copies as early and as late as possible.
4. Add the case to `CASES` in `tests/native/test_barriers.py`. That test removes each
   `__syncthreads`, `__syncwarp` and `wait_for_copies` of the kernel, one at a time, and fails if
   the result stays right: then the barrier is not needed, or no case needs it.
5. `test_sanitizer.py` runs the same tests under AddressSanitizer: no access outside of a tensor.

Kernels use `dynamic_shared()` for shared memory, never `__shared__` variables, and intrinsics only
through `intrinsics.cuh`. A new intrinsic is a function there and another in `shim/keye/`.
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from keye_kernels import _backends, _ext

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "shim"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # `#pragma unroll` is unknown
POISON = "-ftrivial-auto-var-init=pattern"  # GCC 12 and up: uninitialised variables are NaN in fp16
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"]


def _included(source: Path, found: dict[str, Path]) -> dict[str, Path]:
    """Our own headers that ``source`` includes, directly or not: name in `#include` to path."""
    for name in re.findall(r'#include ["<]([^">]+)[">]', source.read_text()):
        for folder in (SHIM, ROOT / "csrc" / "include"):
            if name not in found and (folder / name).is_file():
                found[name] = folder / name
                _included(folder / name, found)
    return found


def _hash(paths: Iterable[Path], flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(cache: Path, *, sanitize: bool = False) -> Path:
    """Compile and link what changed; return the path of the module."""
    compiler, pybind11 = shutil.which("g++"), pytest.importorskip("pybind11")
    if compiler is None:
        pytest.skip("g++ is not installed")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    known = subprocess.run([compiler, POISON, "-xc++", "-E", os.devnull], capture_output=True)
    poison = [] if known.returncode else [POISON]

    def compile_one(source: Path) -> Path:
        flags = [*FLAGS, *poison, f"-I{SHIM}", f"-I{ROOT}/csrc/include"]
        if source.suffix == ".cu":
            flags += SANITIZE if sanitize else []
        else:
            flags += [f"-isystem{sysconfig.get_path('include')}", '-DKEYE_ARCHITECTURES=""']
            flags += [f"-isystem{pybind11.get_include()}"]
        out = cache / f"{source.stem}-{_hash([source, *_included(source, {}).values()], flags)}.o"
        if not out.exists():
            partial = out.with_suffix(".tmp")
            command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
            partial.rename(out)
        return out

    cache.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc" / "bindings.cpp"]
    with open(cache / "lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes compile once
        objects = list(pool.map(compile_one, sources))
        folder = cache / _hash(objects, SANITIZE if sanitize else [])
        module = folder / f"_C{suffix}"
        if not module.exists():
            folder.mkdir(exist_ok=True)
            link = [compiler, "-shared", *(SANITIZE if sanitize else []), *map(str, objects)]
            subprocess.run([*link, "-o", f"{module}.tmp"], check=True)
            Path(f"{module}.tmp").rename(module)
    return module


class Native:
    """The extension module, and control over how its kernels run."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_C", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))
        self._library.shim_places.restype = ctypes.c_char_p

    @contextmanager
    def schedule(
        self, order: int = 0, *, early_copies: bool = False, without: str = ""
    ) -> Iterator[None]:
        """Run threads and blocks in order (0), backwards (1) or shuffled with this seed (others).

        without: An entry of `places` whose barrier or wait is left out.
        """
        self._library.shim_configure(order, int(early_copies), without.encode())
        try:
            yield
        finally:
            self._library.shim_configure(0, 0, b"")

    def schedules(self, count: int = 4, without: str = "") -> Iterator:
        """Contexts for ``count`` orders, each with early and with late copies."""
        for order in range(count):
            for early_copies in (False, True):
                yield self.schedule(order, early_copies=early_copies, without=without)

    def places(self) -> set[str]:
        """Barriers and waits that kernels have reached so far, as "file:line"."""
        return set(self._library.shim_places().decode().split())


@pytest.fixture(scope="session")
def native_module(pytestconfig: pytest.Config) -> Native:
    cache = (
        pytestconfig.cache.mkdir("native")
        if pytestconfig.pluginmanager.hasplugin("cacheprovider")
        else Path(os.environ["KEYE_NATIVE_CACHE"])
    )
    sanitize = os.environ.get("KEYE_NATIVE_SANITIZE") == "1"
    return Native(build(Path(cache), sanitize=sanitize))


@pytest.fixture
def native(native_module: Native, monkeypatch: pytest.MonkeyPatch) -> Iterator[Native]:
    """Let backend "cuda" serve CPU tensors with the kernels compiled by g++."""
    monkeypatch.setattr(_ext, "_C", native_module.module)
    registry = {op: dict(served) for op, served in _backends._registry.items()}
    for served in registry.values():
        if "cuda" in served:
            served["cuda"] = dataclasses.replace(
                served["cuda"], device_types=("cpu",), why_not=lambda: None
            )
    monkeypatch.setattr(_backends, "_registry", registry)
    monkeypatch.setattr(_backends, "_chosen", {})
    with _backends.use_backend("cuda"):
        yield native_module
