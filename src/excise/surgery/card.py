"""The model card: how a pruned checkpoint came to be, as README.md with the metadata that model hubs read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, RepoCard

from excise.artefacts import json_text, stays_inside
from excise.models.architectures.readers import READERS
from excise.models.gguf_header import require_sound_gguf
from excise.plain import Facts, Plain, Values
from excise.text import markdown_text, one_line, without_places

TAGS = ("excise", "depth-pruning", "pruned")
# What an original's card says of that very model: its scores, and by which model its authors replaced it. The last two
# are huggingface_hub's own words for scores.
NOT_INHERITED = ("model-index", "new_version", "eval_results", "model_name")

REPOSITORY = re.compile(r"https?://[^/]+/(?:datasets/)?([^/]+/[^/]+)/?")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

USAGE = """\
## Use

An ordinary transformers checkpoint; no other code is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name})
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```
"""


def model_card(facts: Values, *, name: str, original: Values | None = None) -> str:
    """Render the model card of a pruned checkpoint; what is not known is left out.

    Licence, languages, base models, tags and whatever else the original's metadata say stays, save for its scores.

    Args:
        facts: any of `original` (hub id or path), `base_model` (hub id, if `original` is not one), `license`,
            `language`, `removed` and `original_blocks` (original indices), `zeroed_sublayers` (names),
            `merge` ({"rule", "runs"}, where runs of removed blocks were merged into a kept one), `healing` (where it
            was healed), `proposed_by` (method), `energy` (predicted),
            `energy_model` (its name), `base_loss`, `pruned_loss` and `repaired_loss` (nats/token on held-out samples),
            `repair` ({"steps": [{"block", "kind", …}], "samples"}, where matrices were refitted in closed form),
            `readers` ({"right": [reader], "wrong": {reader: why}}), `parameters` ({"before", "after"}), `dtype`,
            `left_out` ({file or tensors: why}), `data`, `seed`, `history` (the facts of earlier steps), `versions`
            ({package: version}) and `command`. Others are not shown; they stay in excise.json.
        name: how the usage example calls the checkpoint.
        original: metadata of the original's card, see `original_metadata`.

    Examples:
        >>> card = model_card({"original": "org/model", "removed": [4], "original_blocks": [0, 1, 2, 3]}, name="small")
        >>> [line for line in card.splitlines() if line.startswith(("base_model:", "# "))]
        ['base_model: org/model', '# model, 4 of 5 blocks']

    """
    title = f"# {markdown_text(_title(facts) or name)}\n"
    parts = [_metadata(facts, original or {}), title, _summary(facts), _recipe_table(facts)]
    if facts.get("command"):
        command = without_places(one_line(facts["command"]))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
        parts.append(f"The command:\n\n{fence}sh\n{command}\n{fence}\n")
    # A text of JSON is one of Python, on one line.
    parts.append(USAGE.format(name=json_text(name)))
    return "\n".join(part for part in parts if part)


def original_metadata(original: str | Path) -> Facts:
    """What an original says of itself, as metadata of a model card.

    Args:
        original: a checkpoint folder, whose README.md is read, or a GGUF file, which says it in its header.

    Returns:
        The metadata; empty where it says nothing, or nothing that is valid.

    """
    path = Path(original).expanduser()
    metadata = _of_gguf(path) if path.suffix == ".gguf" else _of_readme(path / "README.md")
    # YAML reads the code of Norwegian as a refusal.
    languages = ["no" if code is False else code for code in _as_list(metadata.get("language"))]
    return {**metadata, "language": languages[0] if len(languages) == 1 else languages}


def _of_readme(path: Path) -> Facts:
    if not stays_inside(path, path.parent):
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig").lstrip()
        return dict(RepoCard(text).data.to_dict()) if text.startswith("---") else {}
    except MemoryError:
        raise
    # Anybody's YAML: what cannot be read says nothing.
    except Exception:
        return {}


def _of_gguf(path: Path) -> Facts:
    import gguf

    if not path.is_file():
        return {}
    require_sound_gguf(path)
    fields = {name: field for name, field in gguf.GGUFReader(path).fields.items() if name.startswith("general.")}

    def repositories(kind: str) -> list[str]:
        names = [name for name in fields if re.fullmatch(rf"general\.{kind}\.\d+\.repo_url", name)]
        urls = [str(fields[name].contents()) for name in names]
        return [match[1] for url in urls if (match := REPOSITORY.fullmatch(url))]

    plain = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    listed = {"language": "languages", "tags": "tags"}
    found = {
        key: fields[f"general.{name}"].contents()
        for key, name in {**plain, **listed}.items()
        if f"general.{name}" in fields
    }
    return {**found, "base_model": repositories("base_model"), "datasets": repositories("dataset")}


def _metadata(facts: Values, original: Values) -> str:
    named = [base for base in _as_list(original.get("base_model")) if isinstance(base, str)]
    bases = list(dict.fromkeys(filter(None, (_base_model(facts), *named))))
    fields = {
        "library_name": "transformers",
        "base_model": bases[0] if len(bases) == 1 else bases,
        "pipeline_tag": "text-generation",
        **{key: value for key, value in original.items() if key not in (*NOT_INHERITED, "base_model", "tags")},
        **{key: facts[key] for key in ("license", "language") if facts.get(key)},
        "tags": list(dict.fromkeys((*map(str, _as_list(original.get("tags"))), *TAGS))),
    }
    data = ModelCardData()
    # One by one: keys of anybody's YAML need not be names of arguments.
    for key, value in fields.items():
        data[key] = None if value == [] else value
    return f"---\n{data.to_yaml(original_order=list(fields))}\n---\n"


def _as_list(value: Plain) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _base_model(facts: Values) -> str | None:
    for key in ("base_model", "original"):
        candidate = str(facts.get(key) or "")
        if HUB_ID.fullmatch(candidate) and not Path(candidate).exists():
            return candidate
    return None


def _original_name(facts: Values) -> str | None:
    """Hub id, or the last part of a path: the folders of whoever pruned it are nobody's business."""
    original = facts.get("original")
    return _base_model(facts) or (Path(str(original)).name if original else None)


def _title(facts: Values) -> str | None:
    removed, kept, original = facts.get("removed"), facts.get("original_blocks"), _original_name(facts)
    if removed is None or kept is None or original is None:
        return None
    return f"{original.rpartition('/')[2]}, {len(kept)} of {len(removed) + len(kept)} blocks"


def _summary(facts: Values) -> str:
    removed, kept = facts.get("removed"), facts.get("original_blocks")
    original = markdown_text(_original_name(facts) or "The original model")
    if removed is None:
        return f"{original} with whole blocks removed by excise.\n"
    of_how_many = f" of {len(removed) + len(kept)}" if kept is not None else ""
    blocks = "block" if len(removed) == 1 and kept is None else "blocks"
    summary = f"{original} with {len(removed)}{of_how_many} {blocks} removed by excise"
    if zeroed := facts.get("zeroed_sublayers"):
        return (
            f"{summary}, and {len(zeroed)} sublayers of the others silenced: the weights by which these add to the "
            f"residual stream are 0. That removes what they did exactly; it makes the model no smaller and no faster.\n"
        )
    steps = _steps(facts)
    healed, mended, merged = (any(step.get(key) for step in steps) for key in ("healing", "repair", "merge"))
    if len(steps) > 1:
        done = [text for text, is_so in (("merged", merged), ("repaired", mended), ("healed", healed)) if is_so]
        others = f"were {', '.join(done)} on the way" if done else "are unchanged"
        return f"{summary} in {len(steps)} steps; the others {others}.\n"
    if healed:
        others = "were repaired in closed form and then healed" if mended else "were then healed"
    elif merged:
        others = "are unchanged, but for those into which others were merged"
    else:
        others = (
            "are unchanged, but for a matrix below and one above each cut, refitted without training"
            if mended
            else "are unchanged"
        )
    return f"{summary}; the others {others}.\n"


def _steps(facts: Values) -> list[Values]:
    """The recipes of all steps, the first at first."""
    return [*facts.get("history", ()), facts]


def _history(facts: Values) -> str | None:
    """What each step removed, and what else it did, where there were several."""
    steps = _steps(facts)
    if len(steps) == 1:
        return None
    texts: list[str] = []
    gone: set[int] = set()
    for step in steps:
        new = sorted({*step.get("removed", ())} - gone)
        gone |= {*new}
        done = [f"removed {_listed(new)}"] if new else []
        done += [
            text for key, text in (("merge", "merged"), ("repair", "repaired"), ("healing", "healed")) if step.get(key)
        ]
        texts.append(", ".join(done) or "written anew")
    return "; then ".join(texts)


def _recipe_table(facts: Values) -> str:
    rows = [
        ("Original", _original_name(facts)),
        ("Blocks removed (original indices, from 0)", _listed(facts.get("removed"))),
        ("Sublayers set to 0 (no smaller and no faster for it)", _listed(facts.get("zeroed_sublayers"))),
        ("Merged", _merged(facts)),
        ("Repaired in closed form", _repaired(facts)),
        ("Steps", _history(facts)),
        ("Proposed by", facts.get("proposed_by")),
        ("Predicted energy", _energy(facts)),
        ("Loss before the last step" if facts.get("history") else "Loss before", _loss(facts.get("base_loss"))),
        ("Loss after", _loss(facts.get("pruned_loss"))),
        ("Loss after repair", _loss(facts.get("repaired_loss"))),
        ("Kinds of blocks read rightly by", _right_readers(facts.get("readers"))),
        ("Kinds of blocks read WRONGLY by", _wrong_readers(facts.get("readers"))),
        ("Parameters", _parameters(facts.get("parameters"))),
        ("Stored as", facts.get("dtype")),
        ("Left out", _left_out(facts.get("left_out"))),
        ("Data", _phrase(facts.get("data"))),
        ("Seed", facts.get("seed")),
        ("Versions", _phrase(facts.get("versions"))),
    ]
    known = [f"| {label} | {_cell(value)} |" for label, value in rows if value is not None]
    return "\n".join(["## Recipe\n", "| | |", "|---|---|", *known, ""]) if known else ""


def _right_readers(readers: Values | None) -> str | None:
    return ", ".join(READERS[name].title for name in readers.get("right", ()) if name in READERS) if readers else None


def _wrong_readers(readers: Values | None) -> str | None:
    if not readers or not readers.get("wrong"):
        return None
    known = {name: reason for name, reason in readers["wrong"].items() if name in READERS}
    return "; ".join(f"{READERS[name].title}, which {reason}" for name, reason in known.items())


def _merged(facts: Values) -> str | None:
    if not facts.get("merge"):
        return None
    runs = ", ".join(f"{_listed(run['removed'])} into {run['kept']}" for run in facts["merge"]["runs"])
    return f"{runs} (rule '{facts['merge']['rule']}' of sliding window merging)"


def _repaired(facts: Values) -> str | None:
    if not facts.get("repair"):
        return None
    samples, steps = facts["repair"].get("samples"), facts["repair"]["steps"]
    data = f", fitted on {samples['samples']} samples of {_data_name(samples['data'])}" if samples else ""
    return "; ".join(f"{step['kind']} of block {step['block']}" for step in steps) + data


def _data_name(data: Plain) -> str:
    """A hub id, or the last part of a path."""
    return str(data) if HUB_ID.fullmatch(str(data)) and not Path(str(data)).exists() else Path(str(data)).name


def _listed(indices: Any) -> str | None:
    return None if indices is None else ", ".join(map(str, indices)) or "none"


def _energy(facts: Values) -> str | None:
    if facts.get("energy") is None:
        return None
    model = f" ({facts['energy_model']})" if facts.get("energy_model") else ""
    return f"{facts['energy']:.4g}{model}"


def _loss(nats: float | None) -> str | None:
    return None if nats is None else f"{nats:.4f} nats/token (perplexity {math.exp(nats):.4g})"


def _parameters(counts: Mapping[str, int] | None) -> str | None:
    if not counts:
        return None
    before, after = counts["before"], counts["after"]
    if before is None:
        return f"{after:,}"
    return f"{after:,} of {before:,} ({after / before:.1%})"


def _left_out(reasons: Mapping[str, str] | None) -> str | None:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) if reasons else None


def _phrase(value: Plain) -> str | None:
    if isinstance(value, Mapping):
        return without_places(", ".join(f"{key} {part}" for key, part in value.items() if part is not None))
    return None if value is None else without_places(str(value))


def _cell(value: Plain) -> str:
    return markdown_text(str(value))
