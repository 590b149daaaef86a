"""The launchers of the extension take exactly their arguments, each by its name."""

from types import SimpleNamespace

import pytest
import torch

import keye_kernels as kk
from keye_kernels import _ext
from tests.kernels.paged import Cache

pytestmark = pytest.mark.usefixtures("num_sms")


@pytest.fixture
def call(native, monkeypatch):
    """(launcher, its arguments as the op gives them, the tensor that it writes)."""
    cache, q = Cache([20], 16, 1, 64, torch.bfloat16, "cpu"), torch.randn(1, 1, 64).bfloat16()
    arguments = {}
    recorder = SimpleNamespace(paged_decode_attention=arguments.update)
    out = torch.zeros_like(q)
    with monkeypatch.context() as patch:
        patch.setattr(_ext, "_C", recorder)
        tensors = (q, cache.k, cache.v, cache.table, cache.lengths)
        kk.paged_decode_attention(*tensors, max_seqlen_k=20, out=out)
    assert (out == 0).all()
    yield native.module.paged_decode_attention, arguments, out
    del tensors  # the arguments hold addresses only


def test_arguments_in_another_order_are_refused(call):
    launch, arguments, out = call
    launch(**arguments)
    assert out.abs().max() > 0
    strides = {name: arguments.pop(name) for name in ("stride_lse", "stride_table")}
    with pytest.raises(TypeError, match="argument 16 must be stride_table"):
        launch(**arguments | strides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride_row": 1}, "no argument may follow stream"),
        ({"q": None}, "q cannot be None"),
        ({"group": 1.5}, "group cannot be 1.5"),
        ({"num_splits": 2**40}, "num_splits cannot be 1099511627776"),
        ({"k_strides": (1024, 64, 1)}, r"k_strides cannot be \(1024, 64, 1\)"),
        ({"out_strides": 64}, "out_strides cannot be 64"),
    ],
    ids=["unknown", "None", "float", "overflow", "strides of another tensor", "one stride"],
)
def test_other_arguments_are_refused(call, changes, message):
    launch, arguments, out = call
    with pytest.raises(TypeError, match=message):
        launch(**arguments | changes)
    assert (out == 0).all()


def test_a_missing_or_positional_argument_is_refused(call):
    launch, arguments, _ = call
    del arguments["stride_table"]
    with pytest.raises(TypeError, match="argument 16 must be stride_table"):
        launch(**arguments)
    with pytest.raises(TypeError, match="argument 0 must be dtype"):
        launch()
    with pytest.raises(TypeError, match="all arguments must come by keyword"):
        launch(0, **arguments)


def test_what_the_launcher_throws_is_raised(call):
    launch, arguments, _ = call
    with pytest.raises(RuntimeError, match="paged_decode_attention: no kernel for head_dim 32"):
        launch(**arguments | {"head_dim": 32})
