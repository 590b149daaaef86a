"""The CUDA extension of `csrc` is built from here once it exists; all else is in pyproject.toml."""

from setuptools import setup

setup()
