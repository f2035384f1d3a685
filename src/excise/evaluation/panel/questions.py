"""The panel's questions: written for this project, shipped with it, public domain (CC0)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from excise.artefacts import digest
from excise.plain import Values

FILE = Path(__file__).with_name("questions.jsonl")
# Open questions, of which answers are compared and not judged: the domains of the data.
DOMAINS = ("code", "mathematics", "science", "chat", "agentic")
CAPABILITIES = ("instructions", "JSON", "tool call", "arithmetic", "copying", "retrieval", "refusals")
# Questions of each capability and domain, whatever the effort.
LEAST = 2


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: capability and place in the file.
        capability: one of `CAPABILITIES`, or of `DOMAINS`.
        variant: part of the capability, such as a context length; empty where it has none.
        prompt: what the user says.
        room: most tokens of the answer.
        checks: all of which an answer must pass; see `excise.evaluation.panel.checks.CHECKS`. Empty for a domain.

    """

    name: str
    capability: str
    variant: str
    prompt: str
    room: int
    checks: tuple[Values, ...] = field(default=(), hash=False)


@cache
def all_questions() -> tuple[Question, ...]:
    """Every question that is shipped; variants of a capability take turns."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Question(
            f"{row['capability']} {number}",
            row["capability"],
            row["variant"],
            row["prompt"],
            row["room"],
            tuple(row.get("checks", ())),
        )
        for number, row in enumerate(rows, start=1)
    )


def first_questions(limit: int | None = None) -> tuple[Question, ...]:
    """The first `limit` questions of every capability and domain; None takes all.

    Examples:
        >>> [question.variant for question in first_questions(2) if question.capability == "refusals"]
        ['due', 'not due']

    """
    counts: dict[str, int] = {}
    chosen = []
    for question in all_questions():
        counts[question.capability] = counts.get(question.capability, 0) + 1
        if limit is None or counts[question.capability] <= limit:
            chosen.append(question)
    return tuple(chosen)


def limit_at(effort: float) -> int:
    """Questions of each capability and domain that a run asks: as many as its effort.

    Examples:
        >>> limit_at(0), limit_at(8)
        (2, 8)

    """
    return max(LEAST, round(effort))


def hash_of(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked and how it is judged."""
    return digest({q.name: [q.capability, q.variant, q.prompt, q.room, list(q.checks)] for q in questions})
