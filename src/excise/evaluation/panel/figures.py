"""From answers to the panel's rows: capabilities, health of what is generated, agreement with the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from excise.evaluation.panel.agreement import Agreement
from excise.evaluation.panel.answers import Answer
from excise.evaluation.panel.checks import passes
from excise.evaluation.panel.health import common_start, distinct, longest_loop
from excise.evaluation.panel.questions import CAPABILITIES, DOMAINS, Question
from excise.evaluation.panel.rows import Floats, Row, compared, habits, rates, ratios

Answers = Mapping[Question, Answer]
# Questions of a domain, below which an interval over questions says nothing.
ENOUGH = 5


def rows_of(answers: Sequence[Answers], agreements: Sequence[Agreement]) -> tuple[Row, ...]:
    """All rows.

    Args:
        answers: of each model to the same questions, the original's first.
        agreements: of each result; empty where no open question was asked, or there are no results.

    """
    judged = [question for question in answers[0] if question.checks]
    opened = [question for question in answers[0] if not question.checks]
    rows = [*_capabilities(answers, judged)]
    if opened:
        rows += _health(answers, opened)
    if agreements:
        rows += _agreement(answers, opened, agreements)
    return tuple(rows)


def _capabilities(answers: Sequence[Answers], judged: Sequence[Question]) -> Iterator[Row]:
    passed = {q: [passes(q, each[q].text) for each in answers] for q in judged}

    def row(name: str, variant: str, some: Sequence[Question], chance: float | None = None) -> Row:
        outcomes = np.array([passed[question] for question in some], dtype=bool)
        return rates(name, variant, list(outcomes.T), chance)

    for capability in CAPABILITIES:
        own = [question for question in judged if question.capability == capability]
        variants = [name for name in dict.fromkeys(question.variant for question in own) if name]
        if own:
            yield row(capability, "", own, _chance(own, answers[0]))
        for variant in variants:
            yield row(capability, variant, [question for question in own if question.variant == variant])
    if judged:
        yield row("all of these", "", judged)


def _chance(questions: Sequence[Question], answers: Answers) -> float | None:
    """Share of the original's answers to other capabilities' questions that pass these ones' checks."""
    others = [answer.text for question, answer in answers.items() if question.capability != questions[0].capability]
    if not others:
        return None
    return float(np.mean([passes(question, text) for question in questions for text in others]))


def _health(answers: Sequence[Answers], opened: Sequence[Question]) -> Iterator[Row]:
    def each(of: Callable[[Answer], float]) -> list[Floats]:
        return [np.array([float(of(model[question])) for question in opened]) for model in answers]

    ones = [np.ones(len(opened))] * len(answers)
    pieces = each(lambda answer: distinct(answer.tokens)[1])
    # Without a single piece, nothing is repeated, and nothing can be told.
    if all(count.sum() for count in pieces):
        fresh = each(lambda answer: distinct(answer.tokens)[0])
        yield ratios("distinct runs of three tokens", "share", fresh, pieces, higher_is_better=True)
    loops = each(lambda answer: longest_loop(answer.tokens))
    yield ratios("longest loop of an answer", "tokens", loops, ones, higher_is_better=False)
    ended = np.array([[model[question].ended for question in opened] for model in answers], dtype=bool)
    yield habits("ends by itself", list(ended))
    lengths = each(lambda answer: len(answer.tokens))
    yield ratios("length of an answer", "tokens", lengths, ones, higher_is_better=None)
    yield ratios("length against the original's", "ratio", lengths, [lengths[0]] * len(answers), higher_is_better=None)


def _agreement(answers: Sequence[Answers], opened: Sequence[Question], found: Sequence[Agreement]) -> Iterator[Row]:
    domains = np.array([question.capability for question in opened])
    own = answers[0]
    parted = [np.array([float(common_start(model[q].tokens, own[q].tokens)) for q in opened]) for model in answers[1:]]
    ones = [np.ones(len(opened))] * len(parted)
    measures = {
        "most probable token is the same": ("share", True, [a.top1 for a in found]),
        "acceptance as a draft, 1 − TV": ("share", True, [a.acceptance for a in found]),
        "KL from the original": ("nats", False, [a.kl for a in found]),
    }
    for name, (unit, higher, values) in measures.items():
        for domain in ("", *DOMAINS):
            picked = domains == domain if domain else np.ones(len(opened), dtype=bool)
            if not domain or picked.sum() >= ENOUGH:
                some, weights = [v[picked] for v in values], [a.tokens[picked] for a in found]
                yield compared(name, domain, unit, some, weights, higher_is_better=higher)
    yield compared("tokens until the answers part", "", "tokens", parted, ones, higher_is_better=True)
