"""Other launch choices of one op family: what each compiles to and, on a GPU, how fast it runs.

``python -m benchmarks.sweep rope --set pairs=32,64 --set num_splits=2,4 --arch sm_90`` takes each
combination of the values in the place of the family's own choice, at every real shape of
`benchmarks/cases`. Without ``--set`` it prints the present choices with the names of their fields.

Registers, spills (bytes of stack), shared memory (bytes) and instructions are those of the
kernels compiled ahead of time; ``a + b`` are the kernels of one call. The present choice is marked
with *. On a GPU each choice is first checked against the op's definition, then timed; the ratio is
the time of the present choice over its time, above 1 is faster. Fields that fit together (the heads
of a program and the number of programs) must be set together: only a GPU tells when they do not.
Attention that gets another block_m than its schedule's runs as without a schedule.
"""

import argparse
import importlib
import itertools
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves
from triton.runtime import driver

import keye_kernels
from benchmarks.cases import Case, all_cases
from benchmarks.compile_report.compiled import NUM_SMS, Launch, compile_all, launches_of
from benchmarks.compile_report.report import table
from benchmarks.measure import Measure
from benchmarks.providers import Provider, reason_of
from benchmarks.record import Report, Row
from benchmarks.shapes import REAL
from benchmarks.timing import DEVICE, ON_GPU, Ceilings
from keye_kernels import reference, use_backend

# The module whose launch_config the kernels of each family take.
FAMILIES = {
    "varlen_attention": "_attention",
    "paged_prefill_attention": "_attention",
    "paged_decode_attention": "paged_decode_attention",
    "norm": "norm",
    "activation": "activation",
    "rope": "rope",
    "patch_embed": "patch_embed",
    "merge_patches": "merge_patches",
    "qk_norm_mrope_store": "qk_norm_mrope_store",
    "sampling": "sampling",
}
_HEAD = ["shape", "choice", "registers", "spills", "shared", "instructions", "µs", "ratio", "note"]

Variant = dict[str, int | None]  # fields that are set; {}: the present choice


@dataclass
class Trial:
    """One variant at one shape: its label, and its launches or why there are none."""

    case: Case
    variant: Variant
    label: str
    launches: Sequence[Launch] = ()
    refused: str = ""


def module_of(family: str) -> ModuleType:
    return importlib.import_module(f"keye_kernels.{FAMILIES[family]}")


def cases_of(family: str) -> list[Case]:
    """Real shapes of the ops in the family's file."""
    home = f"keye_kernels.{family}"
    return [case for case in all_cases(REAL) if getattr(keye_kernels, case.op).__module__ == home]


@contextmanager
def chosen(family: str, variant: Variant) -> Iterator[list[tuple]]:
    """Replace fields of the family's launch choices; yields the choices as they would have been."""
    choose, present = module_of(family).launch_config, []

    def launch_config(*args: object, **kwargs: object) -> tuple:
        present.append(choose(*args, **kwargs))
        return present[-1]._replace(**variant)

    replaced = mock.patch.object(module_of(family), "launch_config", launch_config)
    with replaced, use_backend("triton"):
        yield present


def trials_of(family: str, case: Case, variants: list[Variant], arch: int) -> list[Trial]:
    """The present choice at one shape, then each variant that is another."""
    found = []
    for variant in ({}, *variants):
        launches, refused = [], ""
        with chosen(family, variant) as present:
            try:
                launches = launches_of([case], arch)
            except Exception as error:  # Triton refuses some values before it compiles
                refused = reason_of(error)
        values = present[0]._asdict() | variant
        names = variants[0] if variants else values
        label = "" if variant else "* "
        label += " ".join(f"{name}={values[name]}" for name in names).lower()
        if not variant or any(choice != choice._replace(**variant) for choice in present):
            found.append(Trial(case, variant, label, launches, refused))
    return found


def measure(family: str, trials: list[Trial], seconds: float = 0.5) -> list[Row]:
    """Check the trials of one shape against the definition, then time them in turns."""
    case = trials[0].case
    schema = getattr(torch.ops.keye, case.op).default._schema
    written = [x.name for x in schema.arguments if x.alias_info and x.alias_info.is_write]

    def run(function: object, **inputs: object) -> list[torch.Tensor]:
        outputs = [function(**inputs), *(inputs[name] for name in written if name in inputs)]
        return [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]

    ours = partial(run, getattr(keye_kernels, case.op))
    contexts = {trial.label: partial(chosen, family, trial.variant) for trial in trials}
    report = Report({}, Ceilings(float("inf"), float("inf")))
    Measure(report, seconds=seconds).compare(
        case.op,
        case.name,
        make=partial(case.arguments, DEVICE),
        providers={label: Provider(ours, context=x) for label, x in contexts.items()},
        definition=partial(run, getattr(reference, case.op)),
    )
    return report.rows


def row_of(trial: Trial, kernels: list[dict], timed: list[Row]) -> list[str]:
    """A line of the table; ``timed``: rows of all trials of the shape, the present choice first."""
    errors = [trial.refused, *(kernel.get("error", "") for kernel in kernels)]
    row = [str(trial.case), trial.label]
    for number in ("registers", "stack", "shared", "instructions"):
        row.append(" + ".join(str(kernel.get(number, "-")) for kernel in kernels))
    mine = next((x for x in timed if x.provider == trial.label), Row("", "", ""))
    row.append(f"{1e6 * mine.seconds:.1f}" if mine.seconds else "")
    ratio = mine.seconds and timed[0].seconds and timed[0].seconds / mine.seconds
    row.append(f"{ratio:.2f}" if ratio else "")
    return [*row, "; ".join(filter(None, [*errors, mine.note, mine.flag]))]


def _parse(family: str, settings: Sequence[str]) -> list[Variant]:
    """All combinations of ``field=value,value``; ValueError: field or value is none of these."""
    types, grid = typing.get_type_hints(module_of(family).LaunchConfig), {}
    for setting in settings:
        name, _, values = setting.partition("=")
        if name not in types:
            raise ValueError(f"field of {family} must be one of {', '.join(types)}, got {name!r}")
        optional = types[name] is not int
        for x in values.split(","):
            if not ((x.isdecimal() and int(x) > 0) or (optional and x == "none")):
                most = "an int above 0" + " or none" * optional
                raise ValueError(f"{name} must be {most}, got {x!r}")
        grid[name] = [None if x == "none" else int(x) for x in values.split(",")]
    return [dict(zip(grid, x, strict=True)) for x in itertools.product(*grid.values()) if grid]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE[,VALUE...]")
    parser.add_argument("--arch", choices=[f"sm_{arch}" for arch in NUM_SMS], default="sm_90")
    given = parser.parse_args(arguments)
    try:
        variants = _parse(given.family, given.set)
    except ValueError as error:
        parser.error(str(error))
    arch = int(given.arch.removeprefix("sm_"))
    shapes = [trials_of(given.family, x, variants, arch) for x in cases_of(given.family)]
    launches = {x.key: x for trials in shapes for trial in trials for x in trial.launches}
    print(f"compiling {len(launches)} kernels for {given.arch}", file=sys.stderr)
    done = compile_all([(x, arch) for x in launches.values()])
    compiled = dict(zip(launches, done, strict=True))
    if ON_GPU:
        driver.reset_active()  # launches_of has put another in its place
    rows = [_HEAD]
    for trials in shapes:
        timed = measure(given.family, trials) if ON_GPU else []
        rows += [row_of(x, [compiled[launch.key] for launch in x.launches], timed) for x in trials]
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
