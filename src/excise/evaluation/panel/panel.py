"""The panel: a model and its original, asked the same; what was asked, what was said, and how both fared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from excise.artefacts import Artefact
from excise.artefacts.provenance import provenance
from excise.context import Context
from excise.errors import InputError
from excise.evaluation.inputs import judged_identity
from excise.evaluation.panel.agreement import Agreement, Recording, agree, record
from excise.evaluation.panel.answers import Answer, Prompts, ask, prompts_of
from excise.evaluation.panel.checks import passes
from excise.evaluation.panel.figures import rows_of
from excise.evaluation.panel.questions import Question, first_questions, hash_of
from excise.evaluation.panel.rows import Row
from excise.evaluation.scores import Model, describe, name_of
from excise.plain import Facts

FILE = "panel.json"


@dataclass(frozen=True)
class Said:
    """An answer of a model.

    Attributes:
        text: what it said.
        tokens: their number, the one that ended it included.
        ended: whether it ended by itself.
        passed: all checks; None for an open question, which has none.

    """

    text: str
    tokens: int
    ended: bool
    passed: bool | None


@dataclass(frozen=True)
class Exchange:
    """A question and all answers.

    Attributes:
        name: of the question.
        capability: what it is about, or its domain.
        variant: part of the capability.
        prompt: what the user says.
        said: [models], the original's first.

    """

    name: str
    capability: str
    variant: str
    prompt: str
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Panel(Artefact):
    """What a model can still do, `panel.json`.

    Attributes:
        models: the original, then its results.
        rows: figures with intervals.
        exchanges: every question with the answers of all models.
        questions: `hash` of what was asked, `limit` of each capability, `left_out` with reasons.
        kept_mass: mean probability of the original's tokens that agreement was worked out with one by one; 0 where no
            open question was asked.
        provenance: versions, machine, command.

    """

    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    exchanges: tuple[Exchange, ...]
    questions: Facts
    kept_mass: float
    provenance: Facts

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, no panel, or figures or answers that are not one for each model.

        """
        panel = super().load(path)
        count = len(panel.models)
        whole = count and all(len(exchange.said) == count for exchange in panel.exchanges)
        if not whole or any(len(r.figures) != count or len(r.differences) not in (0, count - 1) for r in panel.rows):
            raise InputError(f"{path} has figures or answers that are not one for each of its {count} models")
        return panel


def known_panel(source: str, folders: Sequence[Path]) -> Facts | None:
    """Contents of the first panel in some folders that has answers of a checkpoint; None where none has.

    Args:
        source: the checkpoint, as it was named.
        folders: where panels are looked for.

    Raises:
        InputError: a file of that name is no panel.

    """
    name = name_of(source)
    found = (Panel.load(folder / FILE) for folder in dict.fromkeys(folders) if (folder / FILE).exists())
    return next((panel.to_json() for panel in found if name in [model.name for model in panel.models[1:]]), None)


@dataclass(frozen=True, eq=False)
class Asked:
    """A model's answers.

    Attributes:
        model: who was asked.
        answers: by question.
        agreement: with the original, on its open answers; None for the original, and where there are none.

    """

    model: Model
    answers: Mapping[Question, Answer]
    agreement: Agreement | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """The original's part of a panel; holds no model.

    Attributes:
        asked: its answers.
        prompts: the questions that it can take.
        recording: of its open answers; None where there are none.
        limit: questions of each capability; None for all.
        left_out: name of a question → why it was not asked.

    """

    asked: Asked
    prompts: Prompts
    recording: Recording | None
    limit: int | None
    left_out: Mapping[str, str]


def reference(context: Context, source: str, limit: int | None = None) -> Reference:
    """Ask an original, and record it at its own answers to the open questions.

    Args:
        context: the original and the store, in which answers are kept.
        source: what the original is called.
        limit: questions of each capability and domain; None for all.

    Raises:
        InputError: it has no tokenizer.

    """
    prompts, left_out = prompts_of(context, first_questions(limit))
    answers = ask(context, prompts)
    open_answers = {question: answer for question, answer in answers.items() if not question.checks}
    recording = record(context, open_answers) if open_answers else None
    return Reference(Asked(_model(context, source), answers), prompts, recording, limit, left_out)


def asked(context: Context, source: str, original: Reference) -> Asked:
    """Ask a model what its original was asked.

    Args:
        context: the model and the store.
        source: what the model is called, with its recipe beside its weights if it lies on this machine.
        original: its original, which need not be in memory any more.

    Raises:
        InputError: it reads the questions otherwise than the original.

    """
    prompts, _ = prompts_of(context, list(original.prompts))
    if dict(prompts) != dict(original.prompts):
        raise InputError(
            f"{source} reads the panel's questions otherwise than its original: another tokenizer, chat template or "
            f"number of positions; name the model that it was made from with --against"
        )
    agreement = agree(context, original.recording) if original.recording else None
    return Asked(_model(context, source), ask(context, prompts), agreement)


def panel_of(original: Reference, results: Sequence[Asked]) -> Panel:
    """Put the answers of an original and of its results side by side.

    Args:
        original: what `reference` gave.
        results: what `asked` gave for each.

    """
    every = [original.asked, *results]
    return Panel(
        models=tuple(each.model for each in every),
        rows=rows_of([each.answers for each in every], [each.agreement for each in results if each.agreement]),
        exchanges=tuple(_exchange(question, every) for question in original.prompts),
        questions=questions_facts(original.limit) | {"left_out": dict(original.left_out)},
        kept_mass=original.recording.kept_mass if original.recording else 0.0,
        provenance=provenance(),
    )


def questions_facts(limit: int | None) -> Facts:
    """What is asked: `hash` and `limit`."""
    return {"hash": hash_of(first_questions(limit)), "limit": limit}


def _exchange(question: Question, every: Sequence[Asked]) -> Exchange:
    said = tuple(_said(question, each.answers[question]) for each in every)
    return Exchange(question.name, question.capability, question.variant, question.prompt, said)


def _said(question: Question, answer: Answer) -> Said:
    passed = passes(question, answer.text) if question.checks else None
    return Said(answer.text, len(answer.tokens), answer.ended, passed)


def _model(context: Context, source: str) -> Model:
    return describe(source, context.stack.model, judged_identity(context.loaded))
