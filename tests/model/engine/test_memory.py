"""Bounds of memory."""

import pytest

from keye_model.engine.memory import Limits


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_limits_refuse(value):
    with pytest.raises(
        ValueError, match=f"max_prefill_tokens must be a positive integer, got {value}"
    ):
        Limits(max_prefill_tokens=value)
