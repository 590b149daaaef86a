"""Writes the table of docs/integrate.md that says what is replaced where in transformers.

Its families are those the tests run, its rows those `apply` works from, its releases those
`make test-transformers` names.

    python -m tests.integrations.page
"""

import re
from pathlib import Path

from keye_kernels.integrations._families import families
from tests.integrations.tiny import CASES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrate.md"
_BEGIN, _END = "<!-- written by python -m tests.integrations.page -->\n", "<!-- end -->"


def table() -> str:
    """One row per family and op."""
    lines = ["| family | op | in the place of |", "|---|---|---|"]
    for name in CASES:
        family = families(5)[name]
        places: dict[str, list[str]] = {op: [] for op in CASES[name].calls}
        for row in family.replacements:
            for op in row.ops:
                places[op].append(f"`{row.classes[0]}`")
        if family.decoder:
            places["varlen_attention"].append(f"`{family.decoder[0]}` (prompts)")
        for op, classes in sorted(places.items()):
            lines.append(f"| `{name}` | `{op}` | {', '.join(classes)} |")
        for part, why in family.left.items():
            lines.append(f"| `{name}` | left as it is | `{part}`: {why} |")
    return "\n".join([*lines, "", f"Tested with transformers {', '.join(releases())}.", ""])


def releases() -> list[str]:
    others = re.search(r"^TRANSFORMERS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    installed = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    return [*others.split(), installed]


def written() -> str:
    """What the page says now."""
    return PAGE.read_text(encoding="utf-8").split(_BEGIN)[1].split(_END)[0]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(_BEGIN + written(), _BEGIN + table()), encoding="utf-8")


if __name__ == "__main__":
    main()
