"""`excise report`: one self-contained page of a run, and its figures as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of `excise run` or `excise compare`, or of several.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the folder.", show_default=False)
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw each figure as PNG and SVG too.")
    ] = True,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Add spectrum and scores to the model cards.")] = True,
) -> None:
    """Write one HTML page of everything a folder holds: what was removed, what it costs, what else was possible."""
    from excise.cli.terminal import output
    from excise.report.material import gather
    from excise.report.page import write_page
    from excise.report.static_figures import write_static_figures
    from excise.report.text import human_bytes

    material = gather(folder)
    page = write_page(material, out)
    if figures:
        written = write_static_figures(material)
        output.print(f"figures: {len(written)} in {folder / 'figures'}")
    output.print(f"report: {page} ({human_bytes(page.stat().st_size)})")
