"""What the tests of kernels share."""

import pytest

from keye_kernels import _device


@pytest.fixture
def num_sms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Multiprocessors that launches count on where there is no GPU: 1 unless given."""
    count = getattr(request, "param", 1)
    monkeypatch.setattr(_device, "elsewhere", _device.Device((9, 0), count))
    return count
