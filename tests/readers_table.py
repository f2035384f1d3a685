"""Write the tables of readers in docs/checkpoints.md from the data beside the architectures.

Run as `python -m tests.readers_table`.
"""

from __future__ import annotations

from pathlib import Path

from excise.models.architectures import ARCHITECTURES
from excise.models.architectures.readers import READERS

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- readers -->\n", "<!-- /readers -->"


def readers_tables() -> str:
    """Who reads what, and what who takes from the index of a block, as two Markdown tables."""
    rows = ["| `--portable` | is | does not know |", "|---|---|---|"]
    for name, reader in READERS.items():
        rows.append(f"| `{name}` | {reader.title} | {', '.join(f'`{t}`' for t in sorted(reader.without))} |")
    rows += ["", "| model type | reader | one block in | is | the others | where the reader does so |"]
    rows.append("|---|---|---|---|---|---|")
    for model_type, record in sorted(ARCHITECTURES.items()):
        for placement in record.placements:
            period = f"{placement.period}" + (f", or `{placement.period_key}`" if placement.period_key else "")
            last, usual = (f"`{placement.key}` {value}" for value in (placement.last, placement.usual))
            rows.append(f"| `{model_type}` | {placement.reader} | {period} | {last} | {usual} | {placement.source} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{readers_tables()}{END}{after}", encoding="utf-8")
