"""The explorer: the stack of blocks, a slider over the budget, the spectrum, what was measured, removal frequency."""

from __future__ import annotations

import math
from collections.abc import Collection

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from excise.drawing.axes import NARROW, Axis, number
from excise.drawing.chart import Chart, Drawing
from excise.drawing.svg import line, text
from excise.ising.spectrum import Spectrum
from excise.plain import Facts
from excise.report.html import code, responsive
from excise.report.material import Material
from excise.report.section import Section
from excise.report.spectra import certificate
from excise.report.words import proposed_in_words

LOWEST = 20
FIGURE = "removal_frequency"
BAR = '<rect x="{:.2f}" y="0" width="{:.2f}" height="{:.4g}" class="bar fill-ours" data-block="{}" data-tip="{}"/>'
MARK = '<path d="M{:.1f} {:.1f}l{:.1f} {:.1f}h{:.1f}z" class="removed-mark fill-chosen" data-block="{}"{}/>'


def explorer_data(material: Material) -> Facts:
    """What the page's script shows: plain JSON values.

    Every view is one energy at one budget; `measured` lists damage by budget; `runs` says what was removed.
    """
    views = [
        {
            "energy": name,
            "budget": budget,
            "certificate": certificate(spectrum),
            "certified": spectrum.certified,
            "states": [{"removed": state.removed, "energy": state.energy} for state in spectrum],
        }
        for name, by_budget in material.spectra.items()
        for budget, spectrum in by_budget.items()
    ]
    measured = {
        str(budget): [
            {
                "removed": m.removed,
                "methods": m.methods,
                "energy": m.energy,
                "delta": m.delta if math.isfinite(m.delta) else None,
                "repaired": m.repaired,
                "perplexity": m.perplexity if math.isfinite(m.perplexity) else None,
            }
            for m in found
        ]
        for budget, found in material.measured.items()
    }
    runs = [
        {
            "budget": run["budget"],
            "removed": run["removed"],
            "said": proposed_in_words(run["proposed_by"], run.get("certified") or {}),
        }
        for run in material.runs
    ]
    return {
        "blocks": material.blocks,
        "kinds": material.kinds,
        "sizes": material.sizes,
        "parameters": material.run.get("parameters"),
        "budgets": material.budgets,
        "energy": material.run.get("energy"),
        "budget": material.run.get("budget"),
        "lowest": LOWEST,
        "views": views,
        "measured": measured,
        "runs": runs,
    }


def frequency_chart(spectrum: Spectrum | None, blocks: int, removed: Collection[int], energy: str) -> Chart:
    """Share of the lowest states that remove each block (paper, Fig. 3); marks below say what was removed.

    Every block has its bar and its mark, hidden where it was not removed: the page's script moves them to another
    spectrum by setting the height of the one and showing the other.

    Args:
        spectrum: over blocks; None leaves all bars at 0.
        blocks: of the model.
        removed: what was removed.
        energy: name of the spectrum's energy.

    """
    lowest = min(LOWEST, len(spectrum)) if spectrum else 0
    shares = spectrum.removal_frequency(lowest) if spectrum else [0.0] * blocks

    def draw(width: int) -> Drawing:
        height = 180 if width <= NARROW else 210
        foot, left = height - 40, 40
        y, step = Axis(0, 100, foot, 12), (width - left - 4) / blocks
        parts = []
        for tick in y.ticks(4):
            parts += [line(left, y(tick), width - 4, y(tick), "grid")]
            parts += [text(left - 6, y(tick) + 4, f"{number(tick)} %", anchor="end")]
        bars, marks = [], []
        # Labels need some 26 pixels each.
        every = next((n for n in (1, 2, 5, 10, 20) if n * step >= 26), 50)
        r = min(4.5, 0.45 * step)
        for block, share in enumerate(shares):
            x = left + block * step
            tip = f"block {block}: in {round(share * lowest)} of {lowest} states"
            bars.append(Markup(BAR).format(x + 0.1 * step, 0.8 * step, share, block, tip))
            shown = Markup("" if block in removed else ' display="none"')
            marks.append(Markup(MARK).format(x + step / 2, foot + 4, r, 2 * r, -2 * r, block, shown))
            if block % every == 0:
                parts.append(text(x + step / 2, foot + 30, block))
        # Heights of bars are shares, from the foot upwards.
        scaled = Markup('<g transform="translate(0 {:g}) scale(1 {:g})">{}</g>').format(
            foot, y.end - y.start, Markup("").join(bars)
        )
        return Drawing(height, [*parts, scaled, *marks])

    proof = "" if spectrum is None else f"{spectrum.solver}, {'proved' if spectrum.certified else 'not proved'}"
    budget = "" if spectrum is None or spectrum.budget is None else f" at M = {spectrum.budget}"
    return Chart(
        "Share of the lowest states that remove each block",
        draw,
        caption=f"Among the {lowest} lowest states of {energy}{budget} ({proof}); ▲ marks what was removed.",
    )


def figures(material: Material) -> dict[str, Chart]:
    """Removal frequency in the spectrum that the page opens with."""
    energy, spectrum = _opening(material)
    if spectrum is None:
        return {}
    removed = material.run.get("removed", ()) if spectrum.budget == material.run.get("budget") else ()
    return {f"{FIGURE}-{spectrum.budget}": frequency_chart(spectrum, material.blocks, removed, energy)}


def _opening(material: Material) -> tuple[str, Spectrum | None]:
    """Energy and spectrum that the page opens with: the run's own where there is one."""
    own = str(material.run.get("energy"))
    energy = own if own in material.spectra else next(iter(material.spectra), "")
    budget = material.run.get("budget")
    shown = budget if budget in material.budgets else next(iter(material.budgets), None)
    return energy, material.spectra.get(energy, {}).get(shown) if shown else None


def _render(material: Material) -> Markup | None:
    if not material.budgets or not material.blocks:
        return None
    data = explorer_data(material)
    energy, spectrum = _opening(material)
    removed = material.run.get("removed", ())
    return Markup(PAGE).format(
        data=htmlsafe_json_dumps(data, separators=(",", ":")),
        frequency=responsive(frequency_chart(spectrum, material.blocks, removed, energy)),
        energies=_energy_choice(list(material.spectra), energy),
        slider=_slider(material),
        strip=Markup("").join(
            Markup('<li data-block="{}"><span>{}</span><span class="sr"></span></li>').format(block, block)
            for block in range(material.blocks)
        ),
        wide=_columns(material.blocks, 36),
        narrow=_columns(material.blocks, 12),
        blocks=material.blocks,
    )


def _columns(blocks: int, most: int) -> int:
    """Columns of rows about equally long, none longer than `most`."""
    return math.ceil(blocks / math.ceil(blocks / most))


def _energy_choice(names: list[str], first: str) -> Markup:
    if not names:
        return Markup("")
    options = [
        Markup('<label><input type="radio" name="energy" value="{}"{}><span>{}</span></label>').format(
            name, Markup(" checked") if name == first else "", name
        )
        for name in names
    ]
    return Markup('<fieldset class="choice"><legend>Energy</legend>{}</fieldset>').format(Markup("").join(options))


def _slider(material: Material) -> Markup:
    budgets = list(material.budgets)
    own = material.run.get("budget")
    place = budgets.index(own) if own in budgets else 0
    value = Markup('<output id="budget-value" for="budget">{} of {}</output>').format(budgets[place], material.blocks)
    if len(budgets) == 1:
        hint = code(f"excise solve gradients.safetensors --remove 1..{material.blocks - 1} --out spectra-fisher.json")
        return Markup(
            '<div class="slider"><span class="label">Blocks removed, M</span>{}'
            '<p class="hint">{} in this folder adds a slider over M.</p></div>'
        ).format(value, hint)
    return Markup(
        '<div class="slider"><label class="label" for="budget">Blocks removed, M</label>{}'
        '<input type="range" id="budget" min="0" max="{}" step="1" value="{}" aria-valuetext="{} of {} blocks"></div>'
    ).format(value, len(budgets) - 1, place, budgets[place], material.blocks)


PAGE = """
<script type="application/json" id="explorer-data">{data}</script>
<div id="explorer">
<div class="controls">{slider}{energies}</div>
<ol id="strip" class="strip" style="--wide:{wide};--narrow:{narrow}"
aria-label="The {blocks} blocks of the model, from input to output">{strip}</ol>
<div class="selection">
<p id="selection-name" aria-live="polite"></p>
<dl>
<div><dt>Removes</dt><dd id="selection-removed"></dd></div>
<div><dt>Energy</dt><dd id="selection-energy"></dd></div>
<div><dt>Measured damage</dt><dd id="selection-damage"></dd></div>
<div><dt>Parameters left</dt><dd id="selection-parameters"></dd></div>
</dl>
<button type="button" id="back-to-run">Show what was removed</button>
</div>
<div class="columns">
<div><h3 id="spectrum-title">Spectrum</h3><p class="note" id="certificate"></p>
<div class="scroll tall" tabindex="0" role="region" aria-labelledby="spectrum-title">
<table id="spectrum"><thead><tr><th scope="col">State</th><th scope="col" class="n">Energy</th>
<th scope="col" class="n">Δ loss</th><th scope="col" class="wide-cell">Blocks removed</th></tr></thead>
<tbody></tbody></table>
</div></div>
<div><h3 id="measured-title">Measured proposals</h3><p class="note" id="measured-note"></p>
<div class="scroll tall" tabindex="0" role="region" aria-labelledby="measured-title">
<table id="measured"><thead><tr><th scope="col">Proposed by</th><th scope="col" class="n">Δ loss</th>
<th scope="col" class="n after-repair">repaired</th><th scope="col" class="wide-cell">Blocks</th>
<th scope="col" class="n">Perplexity</th></tr></thead><tbody></tbody></table>
</div></div>
</div>
<h3 id="frequency-title">How often each block is removed</h3>
<p class="note" id="frequency-note"></p>
<div id="frequency">{frequency}</div>
<details><summary>Numbers</summary><div class="scroll" tabindex="0" role="region" aria-labelledby="frequency-title">
<table id="frequency-table"><thead><tr><th scope="col">Block</th>
<th scope="col" class="n">States that remove it</th></tr></thead><tbody></tbody></table></div></details>
</div>
"""

SECTION = Section(
    "removal",
    "What is removed",
    _render,
    ("excise run MODEL --remove 8 --out DIR", "blocks, spectrum and damage"),
    figures,
)
