"""The coupling matrix of the energy: values and correlations, the exact ones under the pointer or the arrow keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from numpy.typing import NDArray

from excise.drawing.axes import NARROW, number
from excise.drawing.chart import Chart, Drawing
from excise.drawing.heat_map import LEVELS, heat_map
from excise.drawing.svg import moved, svg, text
from excise.ising.energies import Energy
from excise.plain import Facts
from excise.report.html import table
from excise.report.material import Material
from excise.report.section import Section

# Pixels of a map within the page, which scales it to the width there is; what lies around it in a file.
SIZE, BEFORE, BELOW = 480, 40, 90
STRONGEST = 12
FIGURE = "couplings"
EXPLAINED = (
    "Removing two blocks costs 2 J more than each alone: red more, blue less. A correlation is J over the geometric "
    "mean of what each costs alone."
)


def shown_energy(material: Material) -> tuple[str, Energy] | None:
    """Name and energy of the run, else any that the folder has; None where it has none."""
    wanted = str(material.run.get("energy"))
    names = (wanted, f"{wanted}-{material.run.get('budget')}", *material.energies)
    return next(((name, material.energies[name]) for name in names if name in material.energies), None)


class _View(NamedTuple):
    """A matrix as it is shown: its anchor, its scale's title, cells on the scale of colours, and its ends."""

    name: str
    label: str
    cells: NDArray[np.float64]
    most: float
    written: float


def _views(energy: Energy) -> tuple[_View, _View]:
    magnitude = np.abs(energy.J)
    # Couplings span powers of ten and both signs: linear around 0, where a logarithm has no value, logarithmic beyond.
    unit = float(np.median(magnitude[magnitude > 0])) if magnitude.any() else 1.0
    most = float(magnitude.max()) or 1.0
    return (
        _View("values", "J, arsinh scale", np.arcsinh(energy.J / unit), float(np.arcsinh(most / unit)), most),
        _View("correlations", "correlation", energy.correlation(), 1.0, 1.0),
    )


def couplings_chart(energy: Energy, name: str) -> Chart:
    """Both maps of an energy: J with its signs, and the correlations, see `Energy.correlation`.

    Args:
        energy: over blocks.
        name: of the energy.

    """

    def draw(width: int) -> Drawing:
        across = 1 if width <= NARROW else 2
        size = width / across - BEFORE - (across - 1) * 12
        maps = [
            moved(BEFORE + k % across * (width / across), 8 + k // across * (size + BELOW), _map(view, size))
            for k, view in enumerate(_views(energy))
        ]
        return Drawing(2 / across * (size + BELOW), maps)

    return Chart(f"Couplings of the energy {name} over {len(energy)} blocks", draw, caption=EXPLAINED)


def _map(view: _View, size: float) -> list[Markup]:
    """The map in the square from 0 to `size`, its ticks left of it and below, and its colour scale below those."""
    n = len(view.cells)
    step = 5 if n <= 40 else 10 if n <= 80 else 20
    parts = [heat_map(view.cells, view.most, size, size)]
    for block in range(0, n, step):
        at = size * (block + 0.5) / n
        parts += [text(-7, at + 4, block, anchor="end"), text(at, size + 17, block)]
    scale = heat_map(np.linspace(-1, 1, LEVELS)[None], 1.0, size / 4, 9)
    low, high = (number(float(f"{end:.2g}")) for end in (-view.written, view.written))
    return [
        *parts,
        text(size / 5 - 6, size + 48, low, anchor="end"),
        moved(size / 5, size + 39, [scale]),
        text(size * 0.45 + 6, size + 48, high, anchor="start"),
        text(size, size + 48, view.label, anchor="end"),
    ]


def figures(material: Material) -> dict[str, Chart]:
    """The couplings of the run's energy."""
    shown = shown_energy(material)
    return {FIGURE: couplings_chart(shown[1], shown[0])} if shown else {}


def _render(material: Material) -> Markup | None:
    shown = shown_energy(material)
    if shown is None:
        return None
    name, energy = shown
    maps = [
        Markup('<div data-view="{}"{}>{}</div>').format(
            view.name,
            Markup(" hidden") if place else "",
            svg(SIZE, SIZE, f"Heat map: {view.label}", _map(view, SIZE)),
        )
        for place, view in enumerate(_views(energy))
    ]
    return Markup(PAGE).format(
        data=htmlsafe_json_dumps(_upper_triangles(energy), separators=(",", ":")),
        maps=Markup("").join(maps),
        name=name,
        explained=EXPLAINED,
        strongest=_strongest(energy),
        n=len(energy),
    )


def _upper_triangles(energy: Energy) -> Facts:
    """Both matrices row by row from the diagonal on, four significant digits."""
    rows, columns = np.triu_indices(len(energy))
    pairs = {"values": energy.J, "correlations": energy.correlation()}
    return {"n": len(energy)} | {k: [float(f"{v:.4g}") for v in m[rows, columns]] for k, m in pairs.items()}


def _strongest(energy: Energy) -> Markup:
    correlation = energy.correlation()
    rows, columns = np.triu_indices(len(energy), 1)
    order = np.argsort(-np.abs(correlation[rows, columns]), kind="stable")[:STRONGEST]
    cells = [
        (f"{rows[k]} and {columns[k]}", number(correlation[rows[k], columns[k]]), number(energy.J[rows[k], columns[k]]))
        for k in order
    ]
    return table(("blocks", "correlation", "J"), cells, f"The {len(cells)} strongest correlations", fold="")


PAGE = """
<script type="application/json" id="matrix-data">{data}</script>
<div class="controls"><fieldset class="choice"><legend>Shown</legend>
<label><input type="radio" name="matrix" value="values" checked><span>Couplings</span></label>
<label><input type="radio" name="matrix" value="correlations"><span>Correlations</span></label></fieldset></div>
<div class="columns"><figure class="matrix"><div id="matrix" tabindex="0" role="application"
aria-label="Coupling matrix of {n} by {n} blocks; arrow keys move between its entries" aria-describedby="matrix-value">
{maps}<div id="matrix-cell" hidden></div></div>
<output id="matrix-value" aria-live="polite">Point at an entry, or move with the arrow keys.</output>
<figcaption>Energy <code>{name}</code>. {explained}</figcaption>
</figure><div>{strongest}</div></div>
"""

SECTION = Section(
    "couplings",
    "Couplings",
    _render,
    ("excise score MODEL --out DIR/gradients.safetensors", "the coupling matrix"),
    figures,
)
