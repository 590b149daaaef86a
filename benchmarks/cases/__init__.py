"""Ops at the shapes a request gives them: what is compiled for the report and raced in benchmarks.

Each module holds one op family: ``cases(shapes)`` gives its cases at the sizes asked for.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import keye_kernels
from benchmarks.shapes import Shapes


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: Public name in keye_kernels.
        name: The shape, in words.
        arguments: From a device ("cuda", "cpu", or "meta": shapes without contents) to the keyword
            arguments of the public function, with contents fit for a benchmark.
        num_bytes: What must move: inputs that are read, once, and outputs, once.
        flops: Work of dots, padding not counted. 0: the op has none and needs no tensor core.
        load_width, store_width: Bytes of the widest access that the layout allows.
        loop_flops: From the constants of a launch to the useful work of one turn of its loop, to
            which the compiled tensor-core instructions are compared. None: they are not.
    """

    op: str
    name: str
    arguments: Callable[[torch.device], dict[str, Any]]
    num_bytes: int
    flops: int = 0
    load_width: int = 16
    store_width: int = 16
    loop_flops: Callable[[dict[str, Any]], int | None] | None = None

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


def call(case: Case, arguments: dict[str, Any]) -> Any:
    """The op as its users call it."""
    return getattr(keye_kernels, case.op)(**arguments)


def all_cases(shapes: Shapes) -> list[Case]:
    """Cases of every family, in the order of the modules' names."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").cases(shapes) for name in modules]
    return [case for family in found for case in family]


def attention_loop_flops(constants: dict[str, Any]) -> int | None:
    """Both products of a tile of queries with a tile of keys; None for the launch without any."""
    if "BLOCK_M" not in constants:
        return None
    return 4 * constants["BLOCK_M"] * constants["BLOCK_N"] * constants["HEAD_DIM"]
