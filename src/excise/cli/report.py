"""`excise report`: one self-contained page of a run, and its figures as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from excise.artefacts import inside, json_text
from excise.errors import reading
from excise.settings import Printing, option

if TYPE_CHECKING:
    from excise.report.material import Material


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Printing):
    """Settings of `excise report`."""

    folder: Path = option(..., "Folder of `excise run` or `excise compare`, or of several.", argument=True)
    out: Path | None = option(None, "The page; by default report.html in the folder.", group="Output", writes="update")
    figures: bool = option(True, "Write each figure as an SVG file too.", group="Output")
    card: bool = option(True, "Add spectrum and scores to the model cards.", group="Output")


def report(settings: ReportSettings) -> None:
    """Write one HTML page of everything a folder holds: what was removed, what it costs, what else was possible."""
    from excise.cli.terminal import output
    from excise.report.figures import FOLDER, write_report_figures
    from excise.report.material import gather
    from excise.report.page import write_page
    from excise.text import human_bytes

    with reading(settings.folder, "a folder of excise's results"):
        material = gather(settings.folder)
        page = write_page(material, settings.out)
        figures = write_report_figures(material) if settings.figures else {}
    cards = [checkpoint / "README.md" for checkpoint in (_updated_cards(material) if settings.card else ())]
    if settings.as_json:
        typer.echo(json_text({"report": page, "figures": figures, "cards": cards}))
        return
    if figures:
        output.print(f"figures: {len(figures)} in {settings.folder / FOLDER}")
    for card in cards:
        output.print(f"model card: {card}")
    output.print(f"report: {page} ({human_bytes(page.stat().st_size)})")


def _updated_cards(material: Material) -> list[Path]:
    """Bring spectrum and scores into the cards of the runs' checkpoints; returns those that have one."""
    from excise.evaluation.scores import name_of
    from excise.surgery.card_scores import update_card

    changed = []
    for run, place in zip(material.runs, material.places, strict=True):
        checkpoint = inside(place, run.get("checkpoint", "model"), place / "run.json")
        spectrum = material.spectra.get(str(run.get("energy")), {}).get(run["budget"])
        judged = (m.hash for m in material.scores.models.values() if m.name == name_of(str(checkpoint)))
        shown = (spectrum, str(run.get("energy")), material.panel)
        if update_card(checkpoint, material.scores, next(judged, ""), *shown):
            changed.append(checkpoint)
    return changed
