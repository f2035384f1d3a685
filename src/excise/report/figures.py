"""The page's charts as files, and page and files of a run that ends."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from excise.artefacts import json_text
from excise.drawing.chart import write_charts
from excise.errors import InputError
from excise.plain import Values
from excise.report.material import Material, gather_run
from excise.report.page import write_page
from excise.report.sections import SECTIONS

FOLDER = "figures"


def write_report_figures(material: Material) -> dict[str, str]:
    """Draw every chart of the page into the folder's `figures`.

    Args:
        material: from `excise.report.material.gather`.

    Returns:
        SVG file of each chart, relative to the folder.

    """
    charts = {name: chart for section in SECTIONS for name, chart in section.figures(material).items()}
    return write_charts(charts, material.folder / FOLDER)


def write_run_report(folder: Path, facts: Values) -> dict[str, str]:
    """Write page and figures of a run whose run.json, the mark of a finished run, is not there yet.

    What others put into the folder and the page cannot show is no reason to lose the run: it is said in a warning.

    Args:
        folder: of the run.
        facts: what its run.json will hold.

    Returns:
        As `write_report_figures`; empty where the page was not written.

    """
    try:
        material = gather_run(folder, json.loads(json_text(facts)))
        write_page(material)
        return write_report_figures(material)
    except InputError as error:
        warnings.warn(f"the report was not written: {error}; `excise report {folder}` tries again", stacklevel=3)
        return {}
