"""Where it all came from: the command that makes it again, data, versions, machine, times, self-test."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from excise.plain import Values
from excise.report.html import table
from excise.report.material import Material
from excise.report.section import Section
from excise.report.words import short_source
from excise.surgery.proof import in_words
from excise.text import without_places


def _render(material: Material) -> Markup | None:
    facts = material.run or material.compare or _of_scores(material)
    origin = facts.get("provenance") or {}
    if not origin:
        return None
    parts = []
    commands = [run["provenance"].get("command") for run in material.runs] or [origin.get("command")]
    commands.append((material.compare.get("provenance") or {}).get("command"))
    commands.append(material.scores.provenance.get("command"))
    for command in dict.fromkeys(filter(None, commands)):
        parts.append(
            Markup(
                '<div class="command"><pre tabindex="0">{}</pre>'
                '<button type="button" class="copy" aria-label="Copy the command">Copy</button></div>'
            ).format(without_places(command))
        )
    rows = [(label, value) for label, value in _rows(facts, origin) if value not in (None, "")]
    parts.append(table(("", ""), rows, "What it was made from", fold=""))
    seconds = facts.get("seconds") or {}
    if seconds:
        total = ("all", f"{sum(seconds.values()):,.1f}")
        parts.append(
            table(
                ("stage", "seconds"),
                [*((name, f"{s:,.1f}") for name, s in seconds.items()), total],
                "Seconds",
                fold="Time by stage",
            )
        )
    for line in material.left_out:
        parts.append(Markup('<p class="note">Not shown: {}</p>').format(line))
    return Markup("").join(parts)


def _of_scores(material: Material) -> Values:
    return {"provenance": material.scores.provenance} if material.scores.provenance else {}


def _rows(facts: Values, origin: Values) -> list[tuple[str, Any]]:
    test = facts.get("self_test") or {}
    machine = origin.get("machine") or {}
    settings = facts.get("settings") or {}
    return [
        ("Model", short_source(str(facts["model"])) if facts.get("model") else None),
        ("Model's SHA-256", Markup('<span class="long">{}</span>').format(facts.get("model_hash", ""))),
        ("Calibration", _samples(facts.get("calibration"))),
        ("Held-out", _samples(facts.get("held_out"))),
        ("Energy", facts.get("energy")),
        ("Selected by", facts.get("selected_by")),
        ("Seed", settings.get("seed")),
        ("Lists proved", _phrase({k: "yes" if v else "no" for k, v in (facts.get("certified") or {}).items()})),
        ("Self-test", in_words(test) if "passed" in test else None),
        ("Time", origin.get("time")),
        ("Machine", _phrase(machine)),
        ("Versions", _phrase(origin.get("versions") or {})),
    ]


def _samples(facts: Values | None) -> str | None:
    if not facts:
        return None
    digest, source = str(facts.get("hash", ""))[:12], without_places(str(facts.get("data")))
    return f"{source}: {facts.get('samples')} samples, {facts.get('total_tokens'):,} tokens, hash {digest}…"


def _phrase(facts: Values) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


SECTION = Section(
    "provenance", "Provenance", _render, ("excise run MODEL --remove 8 --out DIR", "commands, data and versions")
)
