"""The coupling matrix of the energy: magnitudes and correlations, with values under the pointer or the arrow keys."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.image import imsave
from numpy.typing import NDArray

from excise.ising.energies import Energy
from excise.report.material import Material
from excise.report.section import Section
from excise.report.svg import number, table

STRONGEST = 12


def shown_energy(material: Material) -> tuple[str, Energy] | None:
    """Name and energy of the run, else any that the folder has; None where it has none."""
    wanted = str(material.run.get("energy"))
    names = (wanted, f"{wanted}-{material.run.get('budget')}", *material.energies)
    return next(((name, material.energies[name]) for name in names if name in material.energies), None)


def _render(material: Material) -> Markup | None:
    shown = shown_energy(material)
    if shown is None:
        return None
    name, energy = shown
    magnitude = np.abs(energy.J)
    floor = magnitude[magnitude > 0].min(initial=1.0) if magnitude.any() else 1.0
    logarithm = np.log10(np.maximum(magnitude, floor))
    low, high = float(logarithm.min()), float(logarithm.max())
    views = [
        _view("values", logarithm, "viridis", low, high if high > low else low + 1, "log₁₀ |J|", hidden=False),
        _view("correlations", energy.correlation(), "RdBu_r", -1.0, 1.0, "correlation", hidden=True),
    ]
    return Markup(PAGE).format(
        data=htmlsafe_json_dumps(_upper_triangles(energy), separators=(",", ":")),
        images=Markup("").join(image for image, _ in views),
        scales=Markup("").join(scale for _, scale in views),
        name=name,
        ticks=Markup("").join(_ticks(len(energy))),
        strongest=_strongest(energy),
        n=len(energy),
    )


def _upper_triangles(energy: Energy) -> dict[str, Any]:
    """Both matrices row by row from the diagonal on, four significant digits."""
    rows, columns = np.triu_indices(len(energy))
    pairs = {"values": energy.J, "correlations": energy.correlation()}
    return {"n": len(energy)} | {k: [float(f"{v:.4g}") for v in m[rows, columns]] for k, m in pairs.items()}


def _view(
    name: str, matrix: NDArray[np.float64], colours: str, low: float, high: float, label: str, *, hidden: bool
) -> tuple[Markup, Markup]:
    """A heat map and its colour scale."""
    png = io.BytesIO()
    imsave(png, matrix, cmap=colours, vmin=low, vmax=high, format="png")
    stops = ",".join("#" + "".join(f"{round(255 * c):02x}" for c in colormaps[colours](k / 8)[:3]) for k in range(9))
    scale = Markup(
        '<p class="scale" data-view="{name}"{hidden}><span>{low}</span>'
        '<span class="ramp" style="background:linear-gradient(90deg,{stops})"></span><span>{high}</span>'
        "<span>{label}</span></p>"
    )
    image = Markup('<img data-view="{name}"{hidden} alt="Heat map: {label}" src="data:image/png;base64,{png}">')
    facts = {
        "name": name,
        "label": label,
        "hidden": Markup(" hidden") if hidden else "",
        "low": number(round(low, 2)),
        "high": number(round(high, 2)),
        "stops": stops,
        "png": base64.b64encode(png.getvalue()).decode(),
    }
    return image.format(**facts), scale.format(**facts)


def _ticks(n: int) -> list[Markup]:
    step = 5 if n <= 40 else 10 if n <= 80 else 20
    mark = '<span style="--at:{:.3f}%">{}</span>'
    return [Markup(mark).format(100 * (block + 0.5) / n, block) for block in range(0, n, step)]


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
{images}<div id="matrix-cell" hidden></div><div class="ticks left" aria-hidden="true">{ticks}</div>
<div class="ticks below" aria-hidden="true">{ticks}</div></div>
{scales}
<output id="matrix-value" aria-live="polite">Point at an entry, or move with the arrow keys.</output>
<figcaption>J of the energy <code>{name}</code>: what removing two blocks together costs beyond each alone.</figcaption>
</figure><div>{strongest}</div></div>
"""

SECTION = Section(
    "couplings", "Couplings", _render, ("excise score MODEL --out DIR/gradients.safetensors", "the coupling matrix")
)
