"""One self-contained page of everything a folder holds: no network, keyboard, screen reader, light, dark, print."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from excise.artefacts import atomic_path, require_free
from excise.drawing.axes import signed
from excise.drawing.style import page_style
from excise.errors import OutputError
from excise.plain import Values
from excise.report.material import Material
from excise.report.sections import SECTIONS
from excise.report.words import Z, proposed_in_words
from excise.text import ranges

PAGE = "report.html"
# By which a page is known to be one that may be replaced.
GENERATOR = b'<meta name="generator" content="excise">'
CHOSEN_BY = {
    "measured": "least measured damage",
    "refined": "place as the refinement's winner",
    "energy": "place as the energy's ground state",
    "race": "place as the winner of the race in healing",
}


def write_page(material: Material, out: str | Path | None = None) -> Path:
    """Write the page of a folder.

    Args:
        material: from `excise.report.material.gather`.
        out: the page; None takes `report.html` in the folder.

    Returns:
        Where the page is.

    Raises:
        OutputError: the page cannot be written.

    """
    path = require_page(Path(out) if out is not None else material.folder / PAGE)
    page = render(material)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def require_page(path: Path) -> Path:
    """Refuse a place where something else than a page of excise lies; touches nothing.

    Raises:
        OutputError: names it.

    """
    path = require_free(path, folder=False, adds=True)
    if path.exists() and GENERATOR not in path.read_bytes()[:1000]:
        raise OutputError(f"{path} exists and is no page of excise; choose another --out")
    return path


def render(material: Material) -> str:
    """The page as HTML. Whatever comes from files is escaped."""
    environment = Environment(
        loader=PackageLoader("excise.report", "assets"),
        autoescape=True,
        # A misspelt name in a template must fail and not leave a gap on the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [(section, section.render(material)) for section in SECTIONS]
    return environment.get_template("page.html").render(
        title=material.model,
        subtitle=_subtitle(material),
        facts=_facts(material),
        present=[(section, content) for section, content in parts if content is not None],
        absent=[section for section, content in parts if content is None],
        chart_style=Markup(page_style()),
        style=_asset(environment, "page.css"),
        script=_asset(environment, "page.js"),
        version=version("excise"),
    )


def _asset(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _subtitle(material: Material) -> str:
    run = material.run
    if not run:
        return f"{material.blocks} blocks" if material.blocks else ""
    return f"{run['budget']} of {run['blocks']} blocks removed: {ranges(run['removed']).replace(',', ', ')}"


def _facts(material: Material) -> list[tuple[str, str, str]]:
    """What one wants to know first: title, value, remark."""
    run = material.run
    if not run:
        return []
    before, after = run["parameters"], run["pruned_parameters"]
    loss = run.get("checkpoint_loss", run["pruned_loss"])
    chosen_by = str(CHOSEN_BY.get(run["selected_by"], run["selected_by"]))
    facts = [
        (
            "Chosen",
            proposed_in_words(run["proposed_by"], run.get("certified") or {}),
            f"for its {chosen_by}; by name {', '.join(run['proposed_by'])}",
        ),
        ("Damage, nats/token", *_damage(run, loss)),
        ("Parameters", _millions(after), f"of {_millions(before)} (−{1 - after / before:.0%})"),
        (
            "Perplexity",
            _perplexity(math.exp(loss) if loss < 700 else math.inf),
            f"was {_perplexity(run['base_perplexity'])}",
        ),
    ]
    if healed := run.get("healed"):
        after = healed["losses"]["healed"]
        facts.append(("Damage after healing", signed(after - run["base_loss"]), f"loss {after:.3f} nats/token"))
    test = run.get("self_test") or {}
    # Runs of 0.1.0 gave figures and no verdict.
    if "passed" in test:
        told = f"{test['level']}, transformers {test.get('transformers', '')}"
        facts.append(("Self-test", "passed" if test["passed"] else "failed", told))
    return facts


def _damage(run: Values, loss: float) -> tuple[str, str]:
    """The damage with its 95 % interval, and what it is the difference of."""
    damage, error = loss - run["base_loss"], (run.get("damage") or {}).get("error")
    within = "" if error is None else f" [{signed(damage - Z * error)}, {signed(damage + Z * error)}]"
    told = f"loss {loss:.3f}, was {run['base_loss']:.3f}, on held-out text by which nothing was chosen"
    if loss < run["pruned_loss"]:
        told += f"; {signed(run['pruned_loss'] - run['base_loss'])} before repair"
    if error is not None:
        told += "; 95 % interval"
    return f"{signed(damage)}{within}", told


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _perplexity(value: float | None) -> str:
    value = math.inf if value is None else value
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}" if math.isfinite(value) else "∞"
