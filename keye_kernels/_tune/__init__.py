"""`tune`: prove and time the candidates of each op on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from keye_kernels import _backends, _verdicts
from keye_kernels._verdicts import Row, Verdicts

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def tune(
    *,
    op: str | None = None,
    quick: bool = False,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verdicts:
    """Prove and time the candidates of each op here; from then on "auto" takes the fastest.

    Each candidate runs in a process of its own: one that is wrong, crashes, hangs or raises costs
    a row of the table and is never chosen. It is compared with the definition, with random inputs
    and poisoned outputs, twice, at edges and at the shapes of the published checkpoint; what is
    right is timed, the candidates in turn. One that is not faster by more than the spread of the
    times does not replace a simpler one.

    The verdicts are written to a file of this device and these versions, in the directory that
    KEYE_KERNELS_CACHE names (default: keye_kernels in the user's cache directory). Processes read
    it once, so this one keeps what it chose before if it ran an op already.

    Args:
        op: Of this op alone; those of others stay. None: of all.
        quick: Fewer shapes and rounds.
        device: "cuda" or "cpu". Default: "cuda" where there is a GPU, else "cpu".
        dtype: Of the tensors: fp32, fp16 or bf16; a verdict serves its own dtype.
        progress: Called as ``progress(case, done, total)`` before each case.

    Returns:
        All verdicts of the device; ``str()`` is a table. Their ``path`` is None if the file could
        not be written.

    Raises:
        ValueError: There is no such op, device or dtype, or nothing to choose from for the op.
        RuntimeError: There is no GPU, or the process that tries the candidates failed itself.
    """
    device = checked_device(device)
    if dtype not in DTYPES:
        allowed = " or ".join(map(str, DTYPES))
        raise ValueError(f"dtype must be {allowed}, got {dtype}")
    if op is not None and op not in _backends.ops():
        raise ValueError(f"op must be one of {', '.join(_backends.ops())}, got {op!r}")
    if op is not None and len(_backends.candidates(op, device)) == 1:
        raise ValueError(f"op must have more than one candidate on {device}, got {op!r}")
    return run({"op": op, "quick": quick, "device": device, "dtype": DTYPES[dtype]}, progress)


def verdicts(device: str | None = None) -> Verdicts | None:
    """What `tune` found on this machine, as it stands in the file now; None if nothing counts.

    Args:
        device: "cuda" or "cpu". Default: "cuda" where there is a GPU, else "cpu".

    Raises:
        ValueError, RuntimeError: As for `tune`.
    """
    return _verdicts.load(checked_device(device))[0]


def checked_device(device: str | None) -> str:
    """The device type to tune for, by default that of the GPU if there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device must be there, got 'cuda' without a GPU")
    return device


def run(
    job: dict[str, object],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    modules: Sequence[str] = (),
    limit: float | None = None,
) -> Verdicts:
    """`tune`, with candidates that ``modules`` register too, and seconds an answer may take."""
    job = {**job, "modules": list(modules), "limit": limit}
    device = str(job["device"])
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "KEYE_KERNELS_BACKEND": "auto"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "keye_kernels._tune.race", json.dumps(job)]
    verdicts, rows = None, []
    with (
        _verdicts.locked("tune"),  # two that time at once measure each other
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            for line in process.stdout:
                event = json.loads(line)
                if "case" in event and progress is not None:
                    progress(event["case"], event["done"], event["total"])
                elif "rows" in event:  # at once: what is known survives a Ctrl-C
                    rows += [Row(**row) for row in event["rows"]]
                    verdicts = _verdicts.save(device, rows)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the candidates' processes
            raise
        if process.wait():
            errors.seek(0)
            raise RuntimeError(
                f"the process that tries candidates must end well, got exit status "
                f"{process.returncode}: {errors.read()[-2000:].strip()}"
            )
    if verdicts is None:
        verdicts = _verdicts.save(device, ())
    return verdicts
