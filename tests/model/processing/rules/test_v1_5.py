"""How many frames for 1.5: the published formula written a second time."""

from hypothesis import given
from hypothesis import strategies as st

from keye_model.processing.rules.v1_5 import frame_count

TOKEN = 784


@given(
    total=st.integers(1, 100_000),
    rate=st.sampled_from([0.5, 1.0, 7.5, 25.0, 30000 / 1001, 60.0]),
    fps=st.sampled_from([None, 0.1, 1, 2, 120.0]),
    most=st.sampled_from([None, 1, 7, 5000]),
    pixels=st.sampled_from([None, 64 * TOKEN]),
)
def test_frame_count_1_5(total, rate, fps, most, pixels):
    given_keys = {"fps": fps, "max_frames": most, "min_pixels": pixels}
    options = {key: value for key, value in given_keys.items() if value is not None}
    bound = int(65536 * TOKEN / (pixels or 48 * TOKEN))
    count = min(int(total / rate * min(fps or 2.0, rate)), bound, most or bound)
    assert frame_count(total, rate, options) == max(1, count)
