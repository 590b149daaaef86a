"""Machine code as cuobjdump prints it: accesses to memory, and tensor cores per turn of a loop."""

import importlib.util
import math
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of ``cuobjdump -sass``."""

    address: int
    guard: str  # "@!UP0", or "" where it always runs
    opcode: str  # with modifiers
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_mma(self) -> bool:
        return re.fullmatch(r"[HQI]G?MMA|UTC\w*MMA", self.name) is not None

    def __str__(self) -> str:
        text = f"{self.guard} {self.opcode} {', '.join(self.operands)}".strip()
        return f"{text} at {self.address:#x}"


def parse(sass: str) -> list[Instruction]:
    """Instructions of the one kernel in the output of ``cuobjdump -sass``."""
    # What "?" and "&" begin, at the end of a line, is how it is scheduled.
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;?&]*)[^;]*;"
    return [
        Instruction(
            int(address, 16), guard, opcode, tuple(x.strip() for x in rest.split(",") if x.strip())
        )
        for address, guard, opcode, rest in re.findall(pattern, sass)
    ]


def cuobjdump(*arguments: str) -> str:
    """Output of the cuobjdump that Triton brings along."""
    folder = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [str(folder / "cuobjdump"), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{folder}:{os.environ.get('PATH', '')}"},
    ).stdout


def count(code: list[Instruction]) -> dict[str, dict[str, int]]:
    """Number of instructions by kind.

    Returns:
        loads and stores of global memory, by bits per thread, or "tma"; mma by name; local: loads
        and stores of local memory (spills), by name.
    """
    found = {kind: Counter() for kind in ("loads", "stores", "mma", "local")}
    for instruction in code:
        name, *parts = instruction.opcode.split(".")
        if name in ("LDG", "LDGSTS"):
            found["loads"][_bits(parts)] += 1
        elif name == "STG":
            found["stores"][_bits(parts)] += 1
        elif name in ("UTMALDG", "UTMASTG", "UBLKCP"):
            found["stores" if name == "UTMASTG" else "loads"]["tma"] += 1
        elif name in ("LDL", "STL"):
            found["local"][name] += 1
        elif instruction.is_mma:
            found["mma"][name] += 1
    return {kind: dict(counts) for kind, counts in found.items()}


def _bits(parts: list[str]) -> str:
    """Width of a memory instruction from its modifiers, 32 if none."""
    for part in parts:
        if match := re.fullmatch(r"[US]?(8|16|64|128)|ENL2|256", part):
            return match[1] or "256"
    return "32"


def loop_mma_flops(code: list[Instruction], num_warps: int) -> int:
    """FLOP per program and turn of the innermost loops that have tensor-core instructions.

    Every warp issues HMMA and its quarter of HGMMA; one thread issues UTCHMMA for all.

    Raises:
        ValueError: The shape of an instruction, or where a branch goes, cannot be read.
    """
    inside, predecessors = _inside(code)
    flops = 0
    for number in sorted(inside):
        if not code[number].is_mma:
            continue
        if code[number].name.startswith("UTC"):
            flops += _descriptor_flops(code, predecessors, number)
        else:
            flops += _named_flops(code[number]) * num_warps
    return flops


def count_loop(code: list[Instruction]) -> dict[str, int]:
    """Instructions of the innermost loops that have tensor-core instructions, branches included.

    Returns:
        instructions; barriers of the program; waits for copies and products; exp2.
    """
    inside = [code[number] for number in _inside(code)[0]]
    waits = ("DEPBAR", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK")
    return {
        "instructions": len(inside),
        "barriers": sum(one.name == "BAR" for one in inside),
        "waits": sum(one.opcode.startswith(waits) for one in inside),
        "exp2": sum(one.opcode.startswith("MUFU.EX2") for one in inside),
    }


def _inside(code: list[Instruction]) -> tuple[set[int], list[list[int]]]:
    """Numbers of the instructions in those loops, and what may run before each of the code."""
    predecessors: list[list[int]] = [[] for _ in code]
    if not any(instruction.is_mma for instruction in code):
        return set(), predecessors
    successors = _successors(code)
    for number, following in enumerate(successors):
        for other in following:
            predecessors[other].append(number)
    return set().union(*_inner_loops(code, successors, predecessors)), predecessors


def _named_flops(instruction: Instruction) -> int:
    """FLOP per warp of an instruction that has its shape in its name."""
    _, *parts = instruction.opcode.split(".")
    sizes = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
    for part in parts:
        if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", part):  # of a warpgroup
            return 2 * math.prod(map(int, match.groups())) // 4
        if part in sizes:
            return 2 * sizes[part]
    raise ValueError(f"no shape known of {instruction}")


def _successors(code: list[Instruction]) -> list[list[int]]:
    """Numbers of the instructions that may run after each. A call is taken to return."""
    numbers = {hex(instruction.address): number for number, instruction in enumerate(code)}
    found = []
    for number, instruction in enumerate(code):
        name, operands = instruction.name, instruction.operands
        jumps = name in ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")
        following = set()
        if jumps or name == "CALL":
            if operands[-1] not in numbers:
                raise ValueError(f"no target known of {instruction}")
            following.add(numbers[operands[-1]])
        # A branch has its condition in front of it, or as an operand before its target.
        leaves = name in ("EXIT", "RET") or (jumps and len(operands) == 1)
        if (instruction.guard or not leaves) and number + 1 < len(code):
            following.add(number + 1)
        found.append(sorted(following))
    return found


def _reached(edges: list[list[int]], starts: list[int], without: int) -> set[int]:
    """What ``edges`` lead to from ``starts``, these included, not passing ``without``."""
    found: set[int] = set()
    waiting = list(starts)
    while waiting:
        number = waiting.pop()
        if number != without and number not in found:
            found.add(number)
            waiting += edges[number]
    return found


def _inner_loops(
    code: list[Instruction], successors: list[list[int]], predecessors: list[list[int]]
) -> list[set[int]]:
    """Innermost among the loops that have tensor-core instructions.

    A loop is what its head dominates and what leads back to it, wherever that lies: ptxas puts
    the turns that wait for a barrier behind the end of the kernel.
    """
    loops = []
    for head in range(len(code)):
        if len(predecessors[head]) < 2 and head > 0:
            continue
        around = _reached(successors, [0], without=head)
        back = [number for number in predecessors[head] if number not in around]
        loop = _reached(predecessors, back, without=head) | {head}
        if back and any(code[number].is_mma for number in loop):
            loops.append(loop)
    return [loop for loop in loops if not any(other < loop for other in loops)]


def _descriptor_flops(code: list[Instruction], predecessors: list[list[int]], number: int) -> int:
    """FLOP of a UTCHMMA of 16-bit numbers, from the descriptor in the register it names.

    Source: PTX ISA, "Instruction descriptor" and "Matrix shape" of tcgen05.
    """
    instruction = code[number]
    named = re.search(r"idesc\[(UR\d+)\]", " ".join(instruction.operands))
    if instruction.opcode != "UTCHMMA" or not named:
        raise ValueError(f"no shape known of {instruction}")
    shapes = set()
    for descriptor in _constants(code, predecessors, number, named[1]):
        m, n = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3
        # Bits that a dense product of fp16 or bf16 has not: sparse, 3, 6, other types, 23, 29.
        unknown = descriptor & sum(1 << bit for bit in (2, 3, 6, 8, 9, 11, 12, 23, 29))
        if unknown or m not in (64, 128) or not 8 <= n <= 256:
            raise ValueError(f"{named[1]} holds {descriptor:#x}, no known shape, in {instruction}")
        shapes.add((m, n, 16))
    if len(shapes) > 1:
        raise ValueError(f"{named[1]} describes one of {sorted(shapes)} in {instruction}")
    return 2 * math.prod(shapes.pop())


def _constants(
    code: list[Instruction], predecessors: list[list[int]], number: int, register: str
) -> set[int]:
    """What a uniform register may hold where instruction ``number`` reads it.

    Raises:
        ValueError: On some way there it is not set, or to something else than a constant.
    """
    found: set[int] = set()
    seen: set[int] = set()
    waiting = [number]
    while waiting:
        reader = waiting.pop()
        if reader == 0:
            raise ValueError(f"{register} may not be set in {code[number]}")
        for before in predecessors[reader]:
            if before in seen:
                continue
            seen.add(before)
            writer = code[before]
            if not _writes(writer, register):
                waiting.append(before)
                continue
            if writer.opcode != "UMOV" or not writer.operands[1].startswith("0x"):
                raise ValueError(f"{register} is no constant in {code[number]}: {writer}")
            found.add(int(writer.operands[1], 16))
            if writer.guard:  # it may hold what it held
                waiting.append(before)
    return found


def _writes(instruction: Instruction, register: str) -> bool:
    """Whether it writes a uniform register: its first operand does, after predicates."""
    if instruction.name == "CALL":
        return True
    results = (x for x in instruction.operands if not re.fullmatch(r"!?U?P(\d|T)", x))
    first = re.fullmatch(r"UR(\d+)", next(results, ""))
    if first is None:
        return False
    parts = instruction.opcode.split(".")
    pair = any(re.fullmatch(r"[USB]?64|WIDE", part) for part in parts)
    width = 8 if "256" in parts else 4 if "128" in parts else 2 if pair else 1
    return 0 <= int(register[2:]) - int(first[1]) < width
