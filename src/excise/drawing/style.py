"""Colours and line styles of charts: custom properties for a page, light and dark, and plain values for a file."""

from __future__ import annotations

import re

SERIES = 8
SHAPES = 5

# Light and dark value of each; the first four are background, text, lesser text and thin lines.
COLOURS = {
    "bg": ("#fbfbfa", "#14171a"),
    "ink": ("#1d2125", "#e7eaec"),
    "muted": ("#5a636b", "#a2acb5"),
    "line": ("#dde1e4", "#333a40"),
    "ours": ("#1f5fa8", "#6aa9e9"),
    "lighter": ("#6f9fd3", "#4774a3"),
    # What goes is blacked out: green would say that it is good, and stays.
    "chosen": ("#1d2125", "#e7eaec"),
    "rival": ("#c4572b", "#ee8a5f"),
    "random": ("#848484", "#9c9c9c"),
    "s0": ("#1f5fa8", "#6aa9e9"),
    "s1": ("#c4572b", "#ee8a5f"),
    "s2": ("#1d8348", "#4cc27f"),
    "s3": ("#7d4a9e", "#bd93d8"),
    "s4": ("#a37c00", "#d8b23c"),
    "s5": ("#12808f", "#4fc0cf"),
    "s6": ("#b5256b", "#ea76a9"),
    "s7": ("#75513f", "#c39b86"),
}

# One class a selector, no inheritance: vector editors read no more of CSS than that.
RULES = """
.heading { fill: var(--ink); font-size: 15px; font-weight: 600; }
.name { fill: var(--ink); font-size: 13px; }
.title { fill: var(--muted); font-size: 13px; }
.tick { fill: var(--muted); font-size: 12px; }
.value { fill: var(--muted); font-size: 12px; }
.grid { stroke: var(--line); }
.axis { stroke: var(--muted); }
.reference { fill: none; stroke: var(--muted); stroke-dasharray: 5 4; }
.mark { fill-opacity: 0.9; stroke: var(--bg); stroke-width: 1; }
.ring { fill: none; stroke: var(--chosen); stroke-width: 2.5; pointer-events: none; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.faint { fill: none; stroke-width: 1; stroke-opacity: 0.35; }
.error { stroke-width: 1.5; }
.whisker { stroke: var(--ink); stroke-width: 1.5; stroke-opacity: 0.75; }
""".strip()


def series(place: int) -> tuple[str, int]:
    """Colour and shape of a series by its place; no two of the first 40 are alike."""
    return f"s{place % SERIES}", (place + place // SERIES) % SHAPES


def page_style() -> str:
    """Style sheet for charts within a page that follows the reader's colour scheme."""
    light, dark = ("".join(f" --{name}: {pair[scheme]};" for name, pair in COLOURS.items()) for scheme in range(2))
    return f":root {{{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n{_rules()}"


def file_style() -> str:
    """The same in light colours on white, without custom properties."""
    plain = {name: light for name, (light, _) in COLOURS.items()} | {"bg": "#ffffff"}
    return re.sub(r"var\(--([a-z0-9]+)\)", lambda found: plain[found[1]], _rules())


def _rules() -> str:
    colours = (
        f".fill-{name} {{ fill: var(--{name}); }}\n.stroke-{name} {{ stroke: var(--{name}); }}" for name in COLOURS
    )
    return "\n".join([RULES, *colours])
