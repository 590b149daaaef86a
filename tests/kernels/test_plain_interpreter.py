"""The Triton kernels run under Triton's interpreter without our repairs, in fp32 and fp16."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import triton

from tests.kernels.test_registration import CASES


def version(text):
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4),
    reason="Triton 3.6 turns a tensor into an int in a way that NumPy 2.4 refuses",
)
def test_every_kernel_runs_without_repairs():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.plain_interpreter"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    without_kernel = {case for case in CASES if case.startswith("linear")}
    ran = {name.partition(",")[0] for name in found}
    assert CASES.keys() - ran <= without_kernel
    assert not {name: fault for name, fault in found.items() if fault}
