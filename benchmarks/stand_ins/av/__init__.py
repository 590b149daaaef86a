"""Stands in for PyAV on a machine without it: what reads a video is skipped, all else runs.

`hardware.sh` puts this folder on the path when PyAV cannot be imported.
"""

import unittest
from types import SimpleNamespace

__version__ = "19.0.0"


def open(*_args, **_keywords):
    """Skips the test that asked for a video."""
    raise unittest.SkipTest("PyAV is not installed")


class FFmpegError(Exception):
    pass


class InvalidDataError(FFmpegError):
    pass


error = SimpleNamespace(FFmpegError=FFmpegError, InvalidDataError=InvalidDataError)
VideoFrame = SimpleNamespace(from_ndarray=open)
