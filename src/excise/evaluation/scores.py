"""Scores of models as an artefact: what was measured of which model under which settings, never measured twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from excise.artefacts import RECIPE, as_number, check_types, read_json, write_artefact
from excise.errors import InputError, reading
from excise.plain import Facts, Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "excise scores 1"
MANIFEST = "scores.json"
# Where a task reports several, the first of these that it has stands for it.
HEADLINES = ("acc_norm", "acc", "exact_match", "perplexity", "word_perplexity", "decode_tokens_per_second")
STRICT = ("strict-match", "none")


@dataclass(frozen=True)
class Metric:
    """A number and its error.

    Attributes:
        value: accuracies as a share of 1.
        stderr: standard error of the mean over the samples; None where there is none.
        higher_is_better: direction.

    """

    value: float
    stderr: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Model:
    """A model that was judged.

    Attributes:
        hash: its fingerprint, see `excise.evaluation.inputs.judged_identity`.
        name: hub id, or the last part of its path.
        removed: original indices of the removed blocks; empty for an original.
        blocks: number of blocks of the original.
        method: who proposed the removal; None for an original.
        original: name of the model it was made from; None for an original.
        healed: whether it was trained after the removal.
        parameters: their number.
        bytes: of the weights in memory.

    """

    hash: str
    name: str
    removed: tuple[int, ...]
    blocks: int
    method: str | None
    original: str | None
    healed: bool
    parameters: int
    bytes: int

    @property
    def label(self) -> str:
        """A short name for rows and legends."""
        if not self.removed:
            return self.name
        return f"{self.method or self.name}{' + healing' if self.healed else ''}"


@dataclass(frozen=True)
class Result:
    """One measurement of one model.

    Attributes:
        model: the model's fingerprint.
        kind: benchmark, perplexity or speed.
        name: of the task; of the text.
        settings: everything else that the numbers depend on, plain JSON values.
        metrics: by name; lm-eval's are called `metric,filter`.
        details: sample counts, subtasks, versions, seconds.

    """

    model: str
    kind: str
    name: str
    settings: Values
    metrics: Mapping[str, Metric]
    details: Values = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What determines the result."""
        return json.dumps([self.model, self.kind, self.name, self.settings], sort_keys=True)

    @property
    def headline(self) -> str:
        """Name of the metric that stands for the result."""
        bare = [(name.partition(",")[0], name.partition(",")[2], name) for name in self.metrics]
        for wanted in HEADLINES:
            matching = sorted((f not in STRICT, f, name) for metric, f, name in bare if metric == wanted)
            if matching:
                return matching[0][2]
        return next(iter(self.metrics))

    @property
    def score(self) -> Metric:
        """The metric that stands for the result."""
        return self.metrics[self.headline]


@dataclass(frozen=True)
class Scores:
    """All results, in the order in which they were measured.

    Attributes:
        models: by fingerprint.
        results: no two of them have the same key.
        provenance: of the last process that added to them.

    """

    models: Mapping[str, Model] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    provenance: Values = field(default_factory=dict)

    def find(self, model: str, kind: str, name: str, settings: Values) -> Result | None:
        """The result measured under exactly these settings."""
        # Metrics are no part of a key, so any stand-in will do.
        key = Result(model, kind, name, settings, {}).key
        return next((result for result in self.results if result.key == key), None)

    def adding(self, model: Model, *results: Result) -> Scores:
        """These scores and more; a result of the same key is replaced."""
        keys = {result.key for result in results}
        kept = tuple(result for result in self.results if result.key not in keys)
        return replace(self, models={**self.models, model.hash: model}, results=(*kept, *results))

    def latest(self, model: str, kind: str) -> dict[str, Result]:
        """The last result of every name, of one model and kind."""
        return {result.name: result for result in self.results if result.model == model and result.kind == kind}

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        models = {key: asdict(model) for key, model in self.models.items()}
        results = [asdict(result) | {"headline": result.headline} for result in self.results]
        write_artefact(path, {"format": FORMAT, "models": models, "results": results, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or no scores.

        """
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"{path} holds no scores; expected the file that `excise evaluate` writes")
        from pydantic import TypeAdapter

        with reading(path, "scores, which `excise evaluate` writes"):
            models = {key: TypeAdapter(Model).validate_python(model) for key, model in value["models"].items()}
            results = [TypeAdapter(Result).validate_python(_finite(result)) for result in value["results"]]
            for result in results:
                if result.kind not in _PARTS:
                    raise InputError(f"{path} has a result of kind '{result.kind}'; expected {', '.join(_PARTS)}")
                check_types(_PARTS[result.kind], {"details": result.details, "settings": result.settings}, path)
            if unknown := {result.model for result in results} - models.keys():
                raise InputError(f"{path} has results of models that it does not list: {', '.join(sorted(unknown))}")
            return cls(models, tuple(results), value["provenance"])


class _OnQuestions(TypedDict):
    samples: int
    of_samples: int
    shots: Any


class _OnText(TypedDict):
    tokens: int
    window: int


class _Timed(TypedDict):
    dtype: str
    prompt_tokens: int


class _Machine(TypedDict):
    device: str
    batch: int


class _Benchmark(TypedDict):
    details: _OnQuestions


class _Perplexity(TypedDict):
    details: _OnText


class _Speed(TypedDict):
    details: _Timed
    settings: _Machine


# What whoever shows a result of a kind relies on; there may be more.
_PARTS: dict[str, type] = {"benchmark": _Benchmark, "perplexity": _Perplexity, "speed": _Speed}


def _finite(result: Values) -> Facts:
    """A result with NaN where null stands for what was not finite."""
    metrics = {name: {**metric, "value": as_number(metric["value"])} for name, metric in result["metrics"].items()}
    return {name: entry for name, entry in result.items() if name != "headline"} | {"metrics": metrics}


def describe(source: str, model: PreTrainedModel, fingerprint: str) -> Model:
    """What is known of a loaded model, from itself and from the recipe (excise.json) beside its weights.

    Args:
        source: what the user named: folder, file or hub id.
        model: the transformers model.
        fingerprint: its hash.

    """
    folder = Path(source).expanduser()
    recipe = read_json(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    removed = tuple(recipe.get("removed", ()))
    original = recipe.get("original")
    tensors = [*model.parameters(), *model.buffers()]
    return Model(
        hash=fingerprint,
        name=name_of(source),
        removed=removed,
        blocks=model.config.get_text_config().num_hidden_layers + len(removed),
        method=recipe.get("proposed_by"),
        original=name_of(original) if original else None,
        healed=bool(recipe.get("healing")),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def name_of(source: str) -> str:
    """A hub id in full; of a path its last part, or the last two where that is a run's `model`."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name
