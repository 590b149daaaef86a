"""Candidates of layer_norm with one fault each, which `tune` must find."""

import os
import signal
import time

import torch

from keye_kernels import _backends, reference


def is_right(x, weight, bias, eps, residual, out, residual_out):
    total = x if residual is None else torch.add(x, residual, out=residual_out)
    reference.layer_norm(total, weight, bias, eps, out=out)


def is_wrong_in_one_element(*args):
    is_right(*args)
    args[5].view(-1)[-1] += 1


def is_nan_at_one_edge(*args):
    is_right(*args)
    if args[5].shape == (3, 72):
        args[5][1, 7] = float("nan")


def leaves_a_row_unwritten(x, weight, bias, eps, residual, out, residual_out):
    rows = slice(0, 129)
    is_right(x[rows], weight, bias, eps, residual[rows], out[rows], residual_out[rows])


def differs_from_call_to_call(*args):
    is_right(*args)
    is_right.calls = getattr(is_right, "calls", 0) + 1
    args[5].view(-1)[0] *= 1 + 2.0**-7 * (is_right.calls % 2)


def writes_past_its_output(*args):
    is_right(*args)
    out = args[5]
    torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(1)


def writes_into_an_input(*args):
    is_right(*args)
    args[0][0, 0] = 3


def raises(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def aborts(*_):
    os.abort()


def is_killed_at_one_shape(*args):
    if args[5].shape[0] == 130:
        os.kill(os.getpid(), signal.SIGKILL)
    is_right(*args)


def exits(*_):
    os._exit(3)


def sleeps_for_ever(*_):
    time.sleep(3600)


def sleeps_for_ever_once_timed(*args):
    is_right(*args)
    sleeps_for_ever_once_timed.calls = getattr(sleeps_for_ever_once_timed, "calls", 0) + 1
    if sleeps_for_ever_once_timed.calls > 8:  # two per case are checked
        time.sleep(3600)


def is_slower(*args):
    time.sleep(0.05)
    is_right(*args)


FAULTS = {
    is_wrong_in_one_element: ("wrong", "largest error"),
    is_nan_at_one_edge: ("wrong", "1 of 216 values are NaN or infinite"),
    leaves_a_row_unwritten: ("wrong", "136 of 17680 values are NaN or infinite"),
    differs_from_call_to_call: ("wrong", "two calls with the same arguments differ"),
    writes_past_its_output: ("wrong", "it writes outside of its output"),
    writes_into_an_input: ("wrong", "it writes into an input"),
    raises: ("failed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    aborts: ("crashed", "the process died: SIGABRT"),
    is_killed_at_one_shape: ("crashed", "the process died: SIGKILL"),
    exits: ("crashed", "the process died: exit 3"),
    sleeps_for_ever: ("hung", "no answer in"),
    sleeps_for_ever_once_timed: ("hung", "no answer in"),
}


def register():
    """All of them, as a library would."""
    for stub in (*FAULTS, is_slower):
        _backends.register("layer_norm", stub.__name__, stub, device_types=("cpu",))
    _backends.register(
        "layer_norm", "is_refused", is_right, device_types=("cpu",),
        refuses=lambda x, *_: "x must have other columns" if x.shape[1] == 1152 else None,
    )  # fmt: skip
    _backends.register(
        "layer_norm", "is_absent", is_right, device_types=("cpu",), why_not=lambda: "not built"
    )


if os.environ.get("KEYE_TUNE_STUBS"):
    register()
