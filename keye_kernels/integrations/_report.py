"""The result of `report` for a model or a family."""

from dataclasses import dataclass

import transformers


@dataclass(frozen=True)
class Row:
    """One class of a family in a report.

    Attributes:
        part: Name of the class.
        ops: Our ops that its forward calls, or would call if it were replaced.
        replaced: Number of modules that call them; for a family 0 or 1.
        modules: Number of modules of that class; for a family 1.
        note: Why some are not replaced, or what a user should know.
    """

    part: str
    ops: tuple[str, ...]
    replaced: int
    modules: int
    note: str


@dataclass(frozen=True)
class Report:
    """The rows of a report; ``str()`` of it is a table."""

    target: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("part", "ops", "replaced", "note")]
        for row in self.rows:
            ops = ", ".join(row.ops) or "-"
            cells.append((row.part, ops, f"{row.replaced} of {row.modules}", row.note))
        widths = [max(len(line[i]) for line in cells) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in cells
        ]
        return "\n".join([f"{self.target} (transformers {transformers.__version__})", *lines])
