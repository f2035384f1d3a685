"""Write docs/architectures.md, and the table of the README, from one walk of every architecture.

python -m tests.architectures_table
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

from excise.models.architectures import ARCHITECTURES
from tests.architecture_walk import Walk, kinds_in_words, walk
from tests.models.test_architectures import FLOAT32_INSIDE, PAGE
from tests.tiny import MODEL_TYPES

HEAD = """\
# Which architectures work

Written by `python -m tests.architectures_table` from what it found, with transformers {transformers} and torch {torch};
the same walks are asserted by `tests/test_architectures.py`. Each is a random model of six blocks (width 32, float64)
that goes through inspect, score, solve, prune in memory, stock load and generation; the two blocks of the lowest state
that a config can describe are removed.

- **score**: largest deviation of A from autograd through explicit gates, relative to the largest gradient. About 1e-7
  is transformers' own float32 inside norms, routers and scans.
- **prune**: largest deviation of any logit, pruned in memory, from the original with its gates at 0.
- **stock load**: the checkpoint loads with `AutoModelForCausalLM`, no key missing, unexpected or mismatched; largest
  deviation of any logit.
- **cache**: greedy generation with and without KV cache agrees.
- **on disk**: pruning from folder to folder gives the same tensors, byte for byte.

| model type | blocks | score | solve | prune | stock load | cache | on disk | notes |
|---|---|---|---|---|---|---|---|---|
"""


README = PAGE.parents[1] / "README.md"
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
COMPACT_HEAD = """\
| model types | sublayers of a block | removable without it | blocks tied to others |
|---|---|---|---|
"""


def main() -> None:
    """Walk every architecture; write the page and the README's table."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    walks = []
    for model_type in MODEL_TYPES:
        with tempfile.TemporaryDirectory() as place:
            walks.append(walk(model_type, Path(place)))
        print(row(walks[-1]), file=sys.stderr)
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__)
    PAGE.write_text(head + "\n".join(map(row, walks)) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), compact_table(walks)), encoding="utf-8")


def row(found: Walk) -> str:
    """One line of the table."""
    cells = (
        f"`{found.model_type}`",
        kinds_in_words(found.kinds),
        _figure(found.gradient_error, found.gradient_error < FLOAT32_INSIDE),
        "proved" if found.certified else "**not proved**",
        _figure(found.memory_error, found.memory_error < 1e-9),
        _figure(found.disk_error, found.disk_error < 1e-9) if not found.loading else f"**{found.loading}**",
        _yes(found.cache_agrees),
        _yes(found.same_bytes),
        "; ".join(_notes(found)),
    )
    return f"| {' | '.join(cells)} |"


def compact_table(walks: Iterable[Walk]) -> str:
    """The README's table: model types that agree in everything share a line; one that failed a check says so."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for found in walks:
        name = f"`{found.model_type}`" if passed(found) else f"**`{found.model_type}` failed**"
        lines.setdefault(_properties(found), []).append(name)
    return COMPACT_HEAD + "".join(f"| {' | '.join((', '.join(names), *cells))} |\n" for cells, names in lines.items())


def with_table(text: str, table: str) -> str:
    """`text` with the lines between its two markers replaced.

    Raises:
        ValueError: the markers are not there once each.

    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected {BEGIN} and {END} once each in README.md")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}{END}", text)


def passed(found: Walk) -> bool:
    """Whether a walk found all that tests/test_architectures.py asks for."""
    errors = found.memory_error < 1e-9 and found.disk_error < 1e-9 and found.gradient_error < FLOAT32_INSIDE
    return errors and found.certified and not found.loading and found.cache_agrees and found.same_bytes


def _properties(found: Walk) -> tuple[str, ...]:
    """Sublayers, what can go without its block, and which blocks depend on each other."""
    record = ARCHITECTURES[found.model_type]
    there = {kind for block in found.kinds for kind in block.split("+")}
    writes = {sublayer.kind: bool(sublayer.writes) for sublayer in record.sublayers if sublayer.kind in there}
    alone = [kind for kind, apart in writes.items() if apart]
    ties = [
        (bool(record.kv_sharing), "shared keys and values"),
        (bool(record.needed_type), f"one {record.needed_type} block stays"),
        (bool(record.periods), "evenly spaced"),
    ]
    return (
        ", ".join(writes),
        "every sublayer" if len(alone) == len(writes) else ", ".join(alone) or "no: a block has one",
        "; ".join(words for applies, words in ties if applies),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _figure(value: float, good: bool) -> str:
    text = "0" if value == 0 else f"{value:.0e}"
    return text if good else f"**{text}**"


def _notes(found: Walk) -> Sequence[str]:
    record = ARCHITECTURES[found.model_type]
    notes = []
    if "language_model" in record.stack and found.model_class.endswith("ForConditionalGeneration"):
        notes.append("the language tower; the vision tower is kept")
    elif "language_model" in record.stack:
        notes.append("transformers loads the language tower alone; the pruned checkpoint is text only")
    if record.kv_sharing:
        notes.append("blocks whose keys and values others use stay, and so does the last")
    if record.scale:
        notes.append("a trained block scales the residual stream: a gate of its own")
    if record.periods:
        notes.append("blocks are placed by period: those left must be evenly spaced")
        notes += [f"{found.skipped} lower states passed over here"] if found.skipped else []
    if record.needed_type:
        notes.append(f"one {record.needed_type} block must stay")
    if not any(sublayer.writes for sublayer in record.sublayers):
        notes.append("one sublayer a block: removing it removes the block")
    if record.extra_blocks:
        notes.append("multi-token prediction is dropped")
    notes += [f"only {key}={value}" for key, value in record.required.items()]
    return notes


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny models only lose by sharing their few operations out
    main()
