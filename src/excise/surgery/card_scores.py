"""Scores and spectrum added to a model card: `model-index` metadata for the hub, and a section for readers."""

from __future__ import annotations

import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from excise.artefacts import atomic_path
from excise.errors import InputError
from excise.evaluation.scores import Result, Scores, name_of
from excise.ising.spectrum import Spectrum
from excise.plain import Plain, Values
from excise.surgery.card_panel import panel_entries, panel_lines, place_in
from excise.text import human_bytes, markdown_text, ranges

BEGIN, END = "<!-- excise: scores and spectrum -->", "<!-- excise: end -->"
SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
USE = "\n## Use"
FIRST_STATES = 8
FILE_FORMATS = ("json", "csv", "parquet", "text")  # data set "paths" that name a loader of local files


def update_card(
    folder: str | Path,
    scores: Scores,
    fingerprint: str,
    spectrum: Spectrum | None = None,
    energy: str = "fisher",
    panel: Values | None = None,
) -> bool:
    """Bring a checkpoint's scores and panel, and the first rows of the spectrum it was chosen from, into its README.md.

    The metadata gain `model-index` as the hub reads it; the text gains one section, which a later call replaces.
    Everything else in the card stays.

    Args:
        folder: of the checkpoint.
        scores: results of this model and, for comparison, of the original and others.
        fingerprint: the checkpoint's hash in `scores`.
        spectrum: over blocks.
        energy: its name.
        panel: contents of panel.json; what it says of other checkpoints is left out.

    Returns:
        Whether there was a card to update and something to say in it.

    Raises:
        InputError: the card's metadata are not valid YAML.

    """
    path = Path(folder) / "README.md"
    results = [result for kind in ("benchmark", "perplexity") for result in scores.latest(fingerprint, kind).values()]
    place = place_in(panel or {}, name_of(str(folder)))
    asked = [] if panel is None or place is None else panel_lines(panel, place)
    section = _section(asked, scores, fingerprint, spectrum, energy)
    if not path.is_file() or not section:
        return False
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except ValueError as error:
        raise InputError(f"the metadata of {path} cannot be read ({error}); mend them, or pass --no-card") from None
    entries = [_entry(result) for result in results if math.isfinite(result.score.value)]
    entries += [] if panel is None or place is None else panel_entries(panel, place)
    if entries:
        data: Plain = card.data  # ModelCardData, which its base's annotation hides
        data.model_name = Path(folder).resolve().name
        data.eval_results = entries
    text = SECTION.sub("\n\n", card.text).rstrip("\n") + "\n"
    before, use, after = text.partition(USE)
    card.text = f"{before.rstrip()}\n\n{section}\n{use}{after}"
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return True


def _entry(result: Result) -> EvalResult:
    """One entry of the model-index; a benchmark without a data set on the hub is named after its task."""
    metric = result.headline.partition(",")[0]
    error = "" if result.score.stderr is None else f" (standard error {result.score.stderr:.4f})"
    dataset = result.details.get("dataset") or {}
    path = dataset.get("path")
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=result.name if path in (None, *FILE_FORMATS) else path,
        dataset_name=result.name,
        dataset_config=dataset.get("name"),
        dataset_split=dataset.get("split"),
        dataset_args={k: v for k, v in result.settings.items() if v is not None},
        metric_type=metric,
        metric_value=result.score.value,
        metric_name=f"{metric}{error}",
    )


def _section(asked: list[str], scores: Scores, fingerprint: str, spectrum: Spectrum | None, energy: str) -> str:
    parts = [*asked, *_score_lines(scores, fingerprint), *(_spectrum_lines(spectrum, energy) if spectrum else [])]
    return "\n".join([BEGIN, *parts, END]) if parts else ""


def _score_lines(scores: Scores, fingerprint: str) -> list[str]:
    """A table of this model's results, with the original's beside where it was judged under the same settings."""
    rows = []
    originals = [model.hash for model in scores.models.values() if not model.removed and model.hash != fingerprint]
    for result in scores.results:
        if result.model != fingerprint:
            continue
        twins = (scores.find(other, result.kind, result.name, result.settings) for other in originals)
        original = next((twin for twin in twins if twin), None)
        for name, label in _shown(result):
            before = _number(original, name) if original else ""
            rows.append(f"| {label} | {before} | {_number(result, name)} | {_conditions(result)} |")
    if not rows:
        return []
    return ["## Scores\n", "| | original | this model | |", "|---|---|---|---|", *rows, ""]


def _shown(result: Result) -> list[tuple[str, str]]:
    if result.kind == "speed":
        names = {
            "prefill_tokens_per_second": "reading, tokens/s",
            "decode_tokens_per_second": "writing, tokens/s",
            "weight_bytes": "weights",
        }
        return list(names.items())
    name = markdown_text(result.name)
    label = f"perplexity of {name}" if result.kind == "perplexity" else name
    metric = result.headline
    return [(metric, label if result.kind == "perplexity" else f"{label} ({markdown_text(metric.partition(',')[0])})")]


def _number(result: Result, name: str) -> str:
    metric = result.metrics[name]
    if name.endswith("bytes"):
        return human_bytes(int(metric.value))
    digits = 4 if result.kind == "benchmark" else 2 if metric.value < 100 else 0
    error = "" if metric.stderr is None else f" ± {metric.stderr:,.{digits}f}"
    return f"{metric.value:,.{digits}f}{error}"


def _conditions(result: Result) -> str:
    if result.kind == "speed":
        device, dtype = (markdown_text(str(text)) for text in (result.settings["device"], result.details["dtype"]))
        return f"{device}, {dtype}, prompt of {result.details['prompt_tokens']}"
    if result.kind == "perplexity":
        return f"{result.details['tokens']:,} tokens, windows of {result.details['window']:,}"
    details, shots = result.details, result.details.get("shots")
    of = "" if details["samples"] == details["of_samples"] else f" of {details['of_samples']:,}"
    return f"{'' if shots is None else f'{shots}-shot, '}{details['samples']:,}{of} samples"


def _spectrum_lines(spectrum: Spectrum, energy: str) -> list[str]:
    proved = "proved" if spectrum.certified else "not proved"
    rows = [
        f"| {k} | {state.energy:.6g} | {ranges(state.removed)} |"
        for k, state in enumerate(spectrum.states[:FIRST_STATES])
    ]
    energy, solver = markdown_text(energy), markdown_text(spectrum.solver)
    title = f"## Spectrum\n\nThe lowest states of the energy {energy}, {proved} ({solver}).\n"
    return [title, "| state | energy | blocks removed |", "|---|---|---|", *rows, ""]
