"""A kernel's fault ends the CUDA context of its process: the tests after it get another process."""

import os
import sys

import pytest


def _cuda_is_broken() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """End the process after a test that broke CUDA.

    The test's own reports are out by then; pytest-xdist adds that the worker crashed in it, and
    starts another for the tests that are left. Without pytest-xdist the run stops here.
    """
    result = yield
    if _cuda_is_broken():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        item.session.shouldstop = f"CUDA is broken in this process since {item.nodeid}"
    return result
