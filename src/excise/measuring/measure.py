"""Measured losses of many removals at once, evaluated along the trie of what they keep (see `excise.measuring.trie`).

A candidate removes whole blocks, or single sublayers. What was measured is kept in the store's ledger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.problem import Removal
from excise.measuring.divergence import (
    DISTANCES,
    Divergence,
    Evaluation,
    Losses,
    counted_positions,
    distribution_facts,
    told_apart,
)
from excise.measuring.passes import Rows, each_batch, pass_key
from excise.measuring.sweep import Streams
from excise.measuring.trie import Trie
from excise.models.stack import Stack, removable_indices
from excise.plain import Facts
from excise.store import Ledger

Statistic = Literal["loss", "divergence", "rejection"]
MEASUREMENTS, UNFINISHED, DISTRIBUTIONS = "measurements", "measuring", "distributions"


@dataclass(frozen=True, eq=False)
class Measurements:
    """Negative log-likelihoods (or distances from the intact model) of removals on the same samples.

    Attributes:
        removals: [candidates], sorted original indices each, of blocks or of sublayers; () is the intact model.
        sums: [candidates, samples], nats (of rejections, tokens) summed over the counted tokens; NaN or infinite where
            the model overflowed.
        counts: [samples], counted tokens.
        costs: [candidates], tokens through the whole intact stack (blocks computed × tokens ÷ blocks), as if all of
            them were measured now; what candidates share is the cost of the first of them. The one pass of the intact
            model that distances on some samples take is not among them.
        distributions: of the intact model, as distances were taken from them: `top_k` tokens told apart, None for
            all, and `kept_mass`, their mean probability; empty for losses.

    """

    removals: tuple[Removal, ...]
    sums: Float[np.ndarray, "candidates samples"]
    counts: Num[np.ndarray, " samples"]
    costs: Float[np.ndarray, " candidates"]
    distributions: Facts = field(default_factory=dict)

    @property
    def forward_tokens(self) -> float:
        """Cost of all, in tokens through the whole intact stack."""
        return float(self.costs.sum())

    @property
    def losses(self) -> Float[np.ndarray, " candidates"]:
        """Mean loss of each candidate [candidates], nats per token."""
        return self.sums.sum(axis=1) / self.counts.sum()

    def of(self, removed: Sequence[int] = ()) -> Float[np.ndarray, " samples"]:
        """Sums [samples] of one candidate."""
        return self.sums[self.removals.index(tuple(sorted(removed)))]

    def loss(self, removed: Sequence[int] = ()) -> float:
        """Mean loss of one candidate, nats per token."""
        return float(self.losses[self.removals.index(tuple(sorted(removed)))])


def measure(
    context: Context,
    samples: Samples,
    removals: Sequence[Sequence[int]],
    *,
    sublayers: bool = False,
    statistic: Statistic = "loss",
) -> Measurements:
    """Measure the loss of every removal on every sample.

    What the store holds already is not measured again, and an interrupted pass goes on where it stopped.

    Args:
        context: the model and the store.
        samples: held-out samples.
        removals: block indices of each candidate; duplicates are measured once.
        sublayers: `removals` are gate indices instead: those sublayers add nothing to the residual stream.
        statistic: "loss", the cross-entropy of the next token; or of the distributions over the next token
            "divergence", KL(intact ‖ pruned), or "rejection", their total variation distance. These two cost one pass
            more for the intact model, once for the samples.

    Returns:
        Losses in the order of the distinct removals.

    Raises:
        InputError: a block or gate index does not fit the stack.
        ArchitectureError: a block that others depend on is to be removed.

    """
    stack = context.stack
    indices = _gate_indices if sublayers else removable_indices
    distinct = tuple(dict.fromkeys(indices(stack, removed) for removed in removals))
    kind = _kind(context, samples, sublayers, statistic)
    known = _ledger(context, samples, kind)
    new = context.team.once(lambda: tuple(removed for removed in distinct if removed not in known))
    # What is known fills a part of the bar of a stage around this one; by itself it shows none.
    with context.progress.stage(UNFINISHED, samples.tokens * len(distinct) if new else 0) as advance:
        if len(new) < len(distinct):
            advance(samples.tokens * (len(distinct) - len(new)))
        if new:
            known.add(new, _measure_all(context, samples, new, kind))
    # Cost is that of measuring everything now, so that a method's price does not depend on what others had measured.
    computed = Trie.of(stack, _gates_off(stack, distinct, sublayers)).computed
    return Measurements(
        distinct,
        # Told by the first: what processes find in a store differs while others write in it.
        context.team.once(lambda: np.array([known[removed] for removed in distinct])),
        np.array([sample.targets for sample in samples]),
        computed * samples.tokens / len(stack.blocks),
        context.team.once(lambda: context.store.found(DISTRIBUTIONS, pass_key(context, samples, kind)) or {}),
    )


def known_removals(
    context: Context, samples: Samples, *, sublayers: bool = False, statistic: Statistic = "loss"
) -> tuple[Removal, ...]:
    """Removals that the store holds for these samples; arguments as for `measure`."""
    return tuple(_ledger(context, samples, _kind(context, samples, sublayers, statistic)))


def _kind(context: Context, samples: Samples, sublayers: bool, statistic: Statistic) -> Facts:
    """What measurements depend on beside the model, the samples and the removals."""
    kind = {"sublayers": sublayers, "statistic": statistic}
    if statistic == "loss":
        return kind
    # Batch after batch, so that of one at a time all distributions are held.
    largest = max(context.batches(samples), key=counted_positions)
    return {**kind, "top_k": told_apart(context, [largest])}


def _ledger(context: Context, samples: Samples, kind: Facts) -> Ledger:
    return context.store.ledger(MEASUREMENTS, pass_key(context, samples, kind))


@torch.no_grad()
def _measure_all(context: Context, samples: Samples, removals: Sequence[Removal], kind: Facts) -> np.ndarray:
    """Sums [candidates, samples] of removals not yet known."""
    stack, statistic = context.stack, kind["statistic"]
    trie = Trie.of(stack, _gates_off(stack, removals, kind["sublayers"]))
    # Without the candidates, so that a later call on the same samples finds the intact model's states again.
    intact = pass_key(context, samples, {})

    def sums_of(number: int, batch: Batch) -> Rows:
        sums = np.zeros((len(batch.indices), len(removals)))
        evaluate = _evaluation(context, batch, kind, (*intact.values(), number))
        for candidate, hidden in trie.hidden(batch.input_ids):
            sums[:, candidate] = evaluate(hidden).double().cpu().numpy()
        return {"sums": sums, "rest": evaluate.rest.cpu().numpy()}

    def swept(batches: Mapping[int, Batch], after: Callable[[int], None]) -> Iterator[tuple[int, Rows]]:
        # Distances are from the intact model, which then leads.
        lead = [()] if statistic in DISTANCES else []
        all_of_them = Trie.of(stack, _gates_off(stack, [*lead, *removals], kind["sublayers"]))
        with Streams() as streams:
            leaves = all_of_them.swept(batches, streams, after)
            for number, of_batch in itertools.groupby(leaves, key=itemgetter(0)):
                batch, place = batches[number], (*intact.values(), number)
                sums = np.zeros((len(lead) + len(removals), len(batch.indices)))
                evaluate = None
                for _, candidate, hidden in of_batch:
                    evaluate = evaluate or _evaluation(context, batch, kind, place, hidden)
                    sums[candidate] = evaluate(hidden).double().cpu().numpy()
                assert evaluate is not None
                yield number, {"sums": sums[len(lead) :].T, "rest": evaluate.rest.cpu().numpy()}

    # A column of the rows is a candidate: batches of an interrupted pass fit only the same candidates in the same
    # order.
    key = {**kind, "removals": [list(removed) for removed in removals]}
    rows = each_batch(context, samples, UNFINISHED, key, sums_of, weight=len(removals), swept=swept)
    # The sums go on to the ledger, by removal; the pass as such is of no further use.
    context.team.wait()
    context.store.journal(UNFINISHED, pass_key(context, samples, key)).delete()
    if statistic in DISTANCES:
        facts = distribution_facts(kind["top_k"], float(rows["rest"].sum()), sum(sample.targets for sample in samples))
        context.team.once(lambda: context.store.keep(DISTRIBUTIONS, pass_key(context, samples, kind), facts))
    return rows["sums"].T


def _evaluation(
    context: Context, batch: Batch, kind: Facts, place: tuple[Any, ...], hidden: Tensor | None = None
) -> Evaluation:
    """How candidates are judged on a batch.

    Args:
        context: the model, and the memory of the intact one's states.
        batch: on its device.
        kind: see `_kind`.
        place: in that memory.
        hidden: final hidden states of the intact model, where they are known.

    """
    stack, memory = context.stack, context.store.memory
    if kind["statistic"] == "loss":
        return Losses(stack, batch.labels)
    known, distance, top_k = memory.get(place), kind["statistic"], kind["top_k"]
    ids, labels = batch.input_ids, batch.labels
    found = Divergence(stack, ids, labels, known, hidden=hidden, distance=distance, top_k=top_k)
    memory.keep(place, found.intact)
    return found


def _gate_indices(stack: Stack, removed: Sequence[int]) -> Removal:
    gates = len(stack.sublayers)
    if len(set(removed)) != len(removed) or not set(removed) <= set(range(gates)):
        raise InputError(f"gate indices must be distinct and between 0 and {gates - 1}, got {list(removed)}")
    return tuple(sorted(removed))


def _gates_off(stack: Stack, removals: Sequence[Removal], sublayers: bool) -> np.ndarray:
    """Mask [candidates, gates] of the sublayers that are off."""
    owners = [sublayer.gate if sublayers else sublayer.block for sublayer in stack.sublayers]
    return np.array([np.isin(owners, removed) for removed in removals]).reshape(len(removals), len(owners))
