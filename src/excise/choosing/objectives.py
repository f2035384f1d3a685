"""The damage to predict, which is the user's choice: loss, distance from the intact model, or questions answered.

Damage is always relative to the intact model: in nats per token (loss, kl) or question (choices), or the share of
tokens that the intact model would reject from a draft (acceptance). A mixture weighs several of them; each may be
taken by domain (`Sample.category`), as the mean or the worst domain.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from excise.context import Context
from excise.data.chats import encode
from excise.data.files import BadRowError, read_objects
from excise.data.fit import Fit
from excise.data.rows import text_of
from excise.data.samples import Sample, Samples
from excise.data.sources import Skipped
from excise.errors import InputError
from excise.ising.problem import Removal
from excise.measuring.measure import Measurements, Statistic, known_removals, measure
from excise.measuring.ratios import by_domain, ratio_error
from excise.models.loading import Loaded
from excise.plain import Facts, Values
from excise.repair.measured import known_repaired, measure_repaired
from excise.repair.several import is_repairable
from excise.settings import Objecting, weighted_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOMAINS = ("mean", "worst")
# Tokens of a question with an option; longer ones are skipped, as attention takes time by their square.
LONGEST_QUESTION = 4096
# Of five samples, those by which damage after repair is judged.
JUDGED = (1, 3)
# What is measured of the kinds that compare with the intact model.
DISTANCE_OF: dict[str, Statistic] = {"kl": "divergence", "acceptance": "rejection"}
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Damages:
    """Measured damage of removals.

    Attributes:
        removals: [candidates], distinct.
        values: [candidates], nats; of acceptance, the share rejected.
        errors: [candidates], standard errors of `values` over samples (questions).
        costs: [candidates], tokens through the whole intact stack. The intact model's is that of the removal (),
            once for these samples.
        distributions: see `excise.measuring.measure.Measurements`; of the last term that compares distributions.
        domains: [candidates], damage by category of the samples; of a sum of terms, in the categories that all have.

    """

    removals: tuple[Removal, ...]
    values: Float[np.ndarray, " candidates"]
    errors: Float[np.ndarray, " candidates"]
    costs: Float[np.ndarray, " candidates"]
    distributions: Facts
    domains: tuple[dict[str, float], ...]


@dataclass(frozen=True, eq=False)
class Term:
    """One objective on its samples.

    Attributes:
        kind: "loss" (cross-entropy), "kl" (KL(intact ‖ pruned) over the next token), "acceptance" (1 − Σ min(p, q) of
            both over the next token, the share that speculative sampling rejects) or "choices" (how surprised the model
            is by the right option among a question's options).
        samples: for "choices", one an option, those of a question side by side and the right one first
            (see `load_questions`).
        weight: in a mixture.
        domains: "mean", or "worst": the domain with the largest damage counts.
        fitting: other samples, on which each removal is repaired before its damage is measured; None for damage as it
            is without repair.

    """

    kind: str
    samples: Samples
    weight: float = 1.0
    domains: str = "mean"
    fitting: Samples | None = None

    @property
    def tokens(self) -> int:
        """Tokens that measuring one removal takes."""
        return self.samples.tokens + (self.fitting.tokens if self.fitting else 0)

    def first_tokens(self, tokens: int) -> Term:
        """The same on the first samples (whole questions) of so many tokens, of which some are fitted on as now."""
        if self.fitting is not None:
            judging = round(tokens * self.samples.tokens / self.tokens)
            alone = replace(self, fitting=None).first_tokens(max(1, judging))
            return replace(alone, fitting=self.fitting.first_tokens(max(1, tokens - judging)))
        few = self.samples.first_tokens(tokens)
        if self.kind != "choices" or len(few) == len(self.samples):
            return replace(self, samples=few)
        # Whole questions only: an option without its rivals says nothing about which is chosen.
        question = _questions(self.samples)
        return replace(self, samples=self.samples[: int(np.searchsorted(question, question[len(few) - 1] + 1))])

    def slices(self, tokens: int) -> list[Term]:
        """The same on as many parts of so many tokens as its samples make, one after another; the first in any case."""
        parts, rest = [self.first_tokens(tokens)], self
        # Whole samples are taken, so those to fit on and those to judge by need not end together.
        while (rest := rest._after(parts[-1])).tokens >= tokens and all(map(len, rest._kinds())):
            parts.append(rest.first_tokens(tokens))
        return parts

    def _after(self, part: Term) -> Term:
        """What is left behind the first samples."""
        left = [own[len(taken) :] for own, taken in zip(self._kinds(), part._kinds(), strict=True)]
        return replace(self, samples=left[0], fitting=left[1] if self.fitting is not None else None)

    def _kinds(self) -> list[Samples]:
        """Samples to judge by, and to fit on where there are such."""
        return [self.samples] if self.fitting is None else [self.samples, self.fitting]

    def values(self, sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
        """Contributions [candidates, items] and weights [items] whose ratio of sums is the objective.

        Args:
            sums: [candidates, samples], of the measured statistic over the counted tokens.
            counts: [samples], counted tokens.

        """
        if self.kind != "choices":
            return sums, counts
        question = _questions(self.samples)
        first = np.flatnonzero(np.diff(question, prepend=-1))
        # Log-likelihoods of long options are hundreds of nats below 0, where exp comes near underflow unless shifted.
        largest = np.maximum.reduceat(-sums, first, axis=1)
        total = np.add.reduceat(np.exp(-sums - largest[:, question]), first, axis=1)
        # The right option comes first in every question, which `load_questions` sees to.
        return sums[:, first] + largest + np.log(total), np.ones(len(first))

    def domain_of_items(self) -> list[str]:
        """Domain of each item (sample or question)."""
        names = list(self.samples.domains)
        if self.kind != "choices":
            return names
        return [names[i] for i in np.flatnonzero(np.diff(_questions(self.samples), prepend=-1))]


@dataclass(frozen=True, eq=False)
class Objective:
    """A weighted sum of terms."""

    terms: tuple[Term, ...]

    @property
    def tokens(self) -> int:
        """Tokens that measuring one removal takes."""
        return sum(term.tokens for term in self.terms)

    @property
    def repaired(self) -> bool:
        """Whether damage is measured after repair."""
        return any(term.fitting is not None for term in self.terms)

    @property
    def title(self) -> str:
        """What the damage is called, and whether it is of repaired removals."""
        # What is measured and kept low is the share that is not accepted.
        damage = self.name.replace("acceptance", "rejection")
        return f"{damage} after repair" if self.repaired else damage

    @property
    def identity(self) -> Facts:
        """What a search by this objective depends on."""
        terms = [[t.samples.hash, t.domains, t.fitting.hash if t.fitting else None] for t in self.terms]
        # Of the same texts under other categories another domain may be the worst.
        if categories := [t.domain_of_items() for t in self.terms if t.domains == "worst"]:
            return {"objective": self.name, "terms": terms, "categories": categories}
        return {"objective": self.name, "terms": terms}

    @property
    def name(self) -> str:
        """Such as `loss`, or `kl:0.7,choices:0.3`."""
        if len(self.terms) == 1:
            return self.terms[0].kind
        return ",".join(f"{term.kind}:{term.weight:g}" for term in self.terms)

    def first_tokens(self, tokens: int) -> Objective:
        """The same on the first samples of so many tokens, divided among the terms as they are now."""
        return Objective(tuple(t.first_tokens(share) for t, share in self._shares(tokens)))

    def slices(self, tokens: int) -> tuple[Objective, ...]:
        """The same on successive parts of so many tokens; a term with fewer of them takes its own in turn again."""
        parts = [term.slices(share) for term, share in self._shares(tokens)]
        return tuple(Objective(tuple(own[k % len(own)] for own in parts)) for k in range(max(map(len, parts))))

    def _shares(self, tokens: int) -> list[tuple[Term, int]]:
        """Each term with its share of so many tokens, as they are divided now."""
        return [(term, max(1, round(tokens * term.tokens / self.tokens))) for term in self.terms]

    def damages(self, context: Context, removals: Sequence[Sequence[int]]) -> Damages:
        """Measure the damage of removals of whole blocks.

        Args:
            context: the model and the store.
            removals: block indices of each.

        """
        wanted = [tuple(sorted(removed)) for removed in removals]
        total: Damages | None = None
        for term in self.terms:
            one = _term_damages(term, context, wanted)
            total = one if total is None else _add(total, one)
        assert total is not None
        return total

    def known(self, context: Context) -> list[Removal]:
        """Removals of blocks that the store holds already for all terms, the intact model not counted."""
        found = [_known(term, context) for term in self.terms]
        return sorted(set.intersection(*map(set, found)) - {()})


def _statistic(term: Term) -> Statistic:
    return DISTANCE_OF.get(term.kind, "loss")


def _known(term: Term, context: Context) -> tuple[Removal, ...]:
    if term.fitting is None:
        return known_removals(context, term.samples, statistic=_statistic(term))
    return known_repaired(context, term.fitting, term.samples, _statistic(term))


def _run(term: Term, context: Context, removals: Sequence[Removal]) -> Measurements:
    if term.fitting is None:
        return measure(context, term.samples, removals, statistic=_statistic(term))
    return measure_repaired(context, term.fitting, term.samples, removals, statistic=_statistic(term))


def _term_damages(term: Term, context: Context, removals: Sequence[Removal]) -> Damages:
    asked = list(dict.fromkeys(removals))
    rows = [(), *(removed for removed in asked if removed)]
    run = partial(_run, term, context)
    fitting = float(term.fitting.tokens) if term.fitting else 0.0
    # The distance of the intact model from itself is 0, and not measured.
    if term.kind in DISTANCE_OF:
        measured = run(rows[1:])
        sums = np.concatenate([np.zeros((1, len(measured.counts))), measured.sums.reshape(-1, len(measured.counts))])
        costs = np.append(term.samples.tokens + fitting, measured.costs)
    else:
        measured = run(rows)
        sums, costs = measured.sums, measured.costs
        # What repairs aim at is one pass of the intact model over the samples they are fitted on.
        costs[0] += fitting
    values, weights = term.values(sums, measured.counts.astype(np.float64))
    excess = values - values[0]
    domain = np.array(term.domain_of_items())
    groups = [domain == name for name in dict.fromkeys(domain)] if term.domains == "worst" else [domain == domain]
    means = np.array([excess[:, g].sum(axis=1) / weights[g].sum() for g in groups])  # [groups, candidates]
    # A domain in which the pruned model overflowed is the worst there is.
    worst = np.argmax(np.nan_to_num(means, nan=np.inf), axis=0)
    damage = means[worst, np.arange(len(worst))]
    errors = np.array([_standard_error(excess[k], weights, groups[w], damage[k]) for k, w in enumerate(worst)])
    keep = [rows.index(removed) for removed in asked]
    weighted = (term.weight * damage[keep], term.weight * errors[keep])
    found = [by_domain(excess[k], weights, term.domain_of_items()) for k in keep]
    domains = tuple({name: term.weight * value for name, value in each.items()} for each in found)
    return Damages(tuple(asked), *weighted, costs[keep], measured.distributions, domains)


def _standard_error(excess: Floats, weights: Floats, group: NDArray[np.bool_], mean: float) -> float:
    """Of the damage in a group of items, whose mean it is."""
    if group.sum() < 2:
        # One item tells nothing about its spread; an error as large as the value keeps anyone from leaning on it.
        return abs(float(mean))
    return ratio_error(excess[group], weights[group])


def _add(a: Damages, b: Damages) -> Damages:
    # As if errors were independent; those of two terms on the same samples are not, so a mixture's may be off.
    errors, distributions = np.hypot(a.errors, b.errors), b.distributions or a.distributions
    domains = tuple(
        {name: one[name] + other[name] for name in one if name in other}
        for one, other in zip(a.domains, b.domains, strict=True)
    )
    return Damages(a.removals, a.values + b.values, errors, a.costs + b.costs, distributions, domains)


def parse_objective(
    text: str, samples: Samples, questions: Samples | None = None, domains: str = "mean", *, repaired: bool = False
) -> Objective:
    """Read an objective such as `loss`, `kl` or `kl:0.7,choices:0.3`.

    Args:
        text: kinds, each with a weight after a colon where there are several.
        samples: for all kinds but `choices`; with `repaired`, two of five of them, and the others to fit repairs on.
        questions: for `choices`.
        domains: see `Term`.
        repaired: measure damage after repair.

    Raises:
        InputError: an unknown kind, a weight that is no number above 0, `choices` without questions, or fewer than two
            samples to repair with.

    """
    if domains not in DOMAINS:
        raise InputError(f"expected domains in {DOMAINS}, got '{domains}'")
    fitting, judging = _fitting_and_judging(samples) if repaired else (None, samples)
    terms = []
    for kind, weight in weighted_kinds(text):
        if kind == "choices" and questions is None:
            raise InputError("the objective 'choices' needs questions: pass --questions FILE (JSONL)")
        terms.append(Term(kind, questions if kind == "choices" and questions else judging, weight, domains, fitting))
    return Objective(tuple(terms))


def _fitting_and_judging(samples: Samples) -> tuple[Samples, Samples]:
    """Three of five samples to fit on, and two to judge by."""
    if len(samples) < 2:
        raise InputError(f"expected at least two samples, one to repair on and one to judge by, got {len(samples)}")
    judging, fitting = samples.dealt(5, JUDGED)
    return fitting, judging


def load_objective(asked: Objecting, samples: Samples, loaded: Loaded, seed: int = 0) -> Objective:
    """Read an objective, and its questions from a file where there is one; see `parse_objective`, `load_questions`.

    Damage is that after repair where that is asked, and where something of the model can be repaired.

    Args:
        asked: settings of a verb.
        samples: for all kinds but `choices`, and to repair on.
        loaded: the model.
        seed: of the draw of questions.

    Raises:
        InputError: as those.

    """
    fit = Fit.of(loaded.stack)
    questions = (
        None if asked.questions is None else load_questions(asked.questions, loaded.tokenizer, seed=seed, fit=fit)
    )
    repaired = asked.repair and is_repairable(loaded, samples)
    return parse_objective(asked.objective, samples, questions, asked.domains, repaired=repaired)


def load_questions(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, count: int = 64, seed: int = 0, fit: Fit | None = None
) -> Samples:
    """Multiple-choice questions, one sample an option, those of a question side by side and the right one first.

    Args:
        path: JSON lines or a list (see `excise.data.files.read_objects`), with `question` (or `ctx`), the options
            (`choices` as a list or {"text": […], "label": […]}, or `endings`) and the right one (`answer`, `answerKey`
            or `label`: an index or one of the labels).
        tokenizer: of the model.
        count: questions drawn at random.
        seed: of the draw.
        fit: what the model can take; questions with an option that does not fit are skipped and counted.

    Raises:
        InputError: no such file, or not one usable question in it; other rows are skipped and counted.

    """
    questions: list[tuple[str, str, list[str]]] = []
    skipped = Skipped()
    for name, row in read_objects(path):
        try:
            question, options, right = _question(row)
            questions.append((name, question, [options[right], *options[:right], *options[right + 1 :]]))
        except BadRowError as reason:
            skipped.add(name, reason)
    drawn: list[list[Sample]] = []
    for place in np.random.default_rng(seed).permutation(len(questions)):
        if len(drawn) == count:
            break
        name, asked, options = questions[place]
        try:
            made = _option_samples(name, asked, options, tokenizer)
        except BadRowError as reason:
            skipped.add(name, reason)
            continue
        refusals = [fit.refusal(sample.input_ids) for sample in made] if fit is not None else []
        if refusal := next(filter(None, refusals), None):
            skipped.add(name, refusal)
        else:
            drawn.append(made)
    if not drawn:
        raise InputError(f"no questions in {path}: {skipped.first[0] if skipped.rows else 'the file is empty'}")
    if skipped.rows:
        warnings.warn(f"{skipped.rows} questions of {path} were skipped, such as {skipped.first[0]}", stacklevel=2)
    facts = {"data": str(path), "questions": len(drawn), "seed": seed}
    items = tuple(sample for made in drawn for sample in made)
    return Samples(items, {**facts, "skipped": {"rows": skipped.rows, "first": skipped.first}})


def _question(row: Values | BadRowError) -> tuple[str, list[str], int]:
    """Question, options and which of them is right."""
    if isinstance(row, BadRowError):
        raise row
    try:
        choices = row["endings"] if "ctx" in row else row["choices"]
        options = list(choices["text"]) if isinstance(choices, Mapping) else list(choices)
        labels = list(choices["label"]) if isinstance(choices, Mapping) else [chr(65 + i) for i in range(len(options))]
        answer = next(row[key] for key in ("answerKey", "answer", "label") if row.get(key) is not None)
        right = labels.index(answer) if answer in labels else int(answer)
        asked = row["ctx"] if "ctx" in row else row["question"]
        if len(options) < 2 or not 0 <= right < len(options):
            raise ValueError(f"{len(options)} options, the right one {answer!r}")
    except (ValueError, LookupError, TypeError, ArithmeticError, StopIteration) as error:
        raise BadRowError(
            f"expected a question with `question` or `ctx`, `choices` or `endings`, and `answer`, `answerKey` or "
            f"`label` ({type(error).__name__}: {error})"
        ) from None
    question = text_of(asked, "the question")
    return (
        question if "ctx" in row else f"Question: {question}\nAnswer:",
        [text_of(o, "an option") for o in options],
        right,
    )


def _option_samples(
    name: str, question: str, options: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    prompt = len(encode(tokenizer, question)["input_ids"])
    samples = []
    for i, option in enumerate(options):
        # Tokenised together, since the space before an option belongs to its first token in most vocabularies.
        ids = np.array(encode(tokenizer, f"{question} {option}")["input_ids"], dtype=np.int64)
        if len(ids) > LONGEST_QUESTION:
            raise BadRowError(f"a question and an option of {len(ids):,} tokens; expected at most {LONGEST_QUESTION:,}")
        # Tokens may merge across the border; at least one must count, or the option has no likelihood.
        counted = np.arange(len(ids)) >= min(prompt, len(ids) - 1)
        samples.append(Sample(f"{name}#{i}", ids, counted))
    return samples


def _questions(samples: Samples) -> NDArray[np.int64]:
    """Number of the question of each sample, from its name."""
    names = [sample.name.rpartition("#")[0] for sample in samples]
    return np.cumsum([i > 0 and name != names[i - 1] for i, name in enumerate(names)])
