"""The native tests once more under AddressSanitizer: no access outside of a tensor or of shared
memory. In a process of its own, since the sanitizer must be loaded before all else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

HERE = Path(__file__).resolve().parent
EXCEPT = ("test_sanitizer.py", "test_barriers.py")  # the latter is slow, and wrong on purpose


@pytest.fixture(scope="module")
def done(pytestconfig: pytest.Config) -> subprocess.CompletedProcess:
    """The tests, then an access that is none of theirs: it ends the process."""
    # libstdc++ too: the sanitizer looks for it once, at the start, to follow exceptions.
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("g++ has no libasan.so")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python keeps much until it ends; a fiber's stack is none that the sanitizer knows.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "KEYE_NATIVE_SANITIZE": "1",
        "KEYE_NATIVE_CACHE": str(pytestconfig.cache.mkdir("native")),
    }
    tests = sorted(str(path) for path in HERE.glob("test_*.py") if path.name not in EXCEPT)
    options = ["-v", "-s", "-p", "no:cacheprovider", "-o", "addopts="]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests, str(HERE / "outside.py")],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_no_access_outside_of_tensors(done):
    """Every test passed, and the one that follows them began."""
    tests, _, rest = done.stdout.partition("outside.py::")
    assert rest, done.stdout[-4000:] + done.stderr[-4000:]
    outcomes = set(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", tests))
    assert outcomes == {"PASSED"}, tests[-4000:]


def test_an_access_outside_is_found(done):
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout[-4000:]
