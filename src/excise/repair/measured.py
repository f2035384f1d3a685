"""Damage after repair, measured along the trie of what removals keep.

A repair at a cut depends only on what lies below it, so candidates that agree on the lowest blocks share it as they
share the computation of these blocks. Every node holds the streams of all samples. Where a run of removed blocks ends,
the matrix below it is refitted on the fitting samples, towards the original's stream there, and all samples go on with
the stream as that matrix makes it; the same with the block above it, unless the next cut begins after it. The damage is
measured on the judging samples alone. No weight is changed: the effect of a refitted matrix on the stream is added to
the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from excise.context import Context
from excise.data.samples import Samples
from excise.errors import ArchitectureError
from excise.ising.problem import Removal
from excise.measuring.divergence import told_apart
from excise.measuring.measure import DISTRIBUTIONS, Measurements, Statistic, measure
from excise.measuring.passes import pass_key
from excise.measuring.sweep import sweeps
from excise.measuring.trie import Trie
from excise.models.loading import Loaded
from excise.models.stack import Stack, removable_indices
from excise.models.stored import Stored
from excise.plain import Facts
from excise.repair.cuts import folds_of
from excise.repair.folds import Fold
from excise.repair.openings import RIDGE_TOKENS
from excise.repair.swept_walk import SweptWalk
from excise.repair.walk import Walk, trie_of

# How a checkpoint stores its parameters takes reading all its headers, and each round of a search asks.
_FOLDS: WeakKeyDictionary[Stack, dict[int, Fold]] = WeakKeyDictionary()
MEASUREMENTS, STAGE = "repaired", "measuring, repaired"


def repairable_folds(loaded: Loaded) -> dict[int, Fold]:
    """What of a block next to a cut a repair folds into, and its checkpoint can store, for every block with such.

    Asked of a stack for the first time, it costs a pass of a few tokens.
    """
    stack = loaded.stack
    if stack not in _FOLDS:
        stored, found = Stored.of(loaded), folds_of(stack, range(len(stack.blocks)), None)
        exact = {b: folds[0] for b, folds in found.items() if not isinstance(folds, ArchitectureError)}
        _FOLDS[stack] = {b: fold for b, fold in exact.items() if stored.refusal(fold.names) is None}
    return _FOLDS[stack]


def known_repaired(context: Context, fitting: Samples, judging: Samples, statistic: Statistic) -> tuple[Removal, ...]:
    """Removals that the store holds already; arguments as for `measure_repaired`."""
    return tuple(context.store.ledger(MEASUREMENTS, _key(context, fitting, judging, statistic)))


def measure_repaired(
    context: Context,
    fitting: Samples,
    judging: Samples,
    removals: Sequence[Sequence[int]],
    *,
    statistic: Statistic = "loss",
) -> Measurements:
    """Measure removals of whole blocks on samples, each repaired on others.

    Cuts next to which nothing can be refitted exactly stay as they are; where that is so of all, this is `measure`.
    What the store holds is not measured again, and every candidate is kept as soon as it is measured.

    Args:
        context: the model and the store.
        fitting: samples on which repairs are fitted.
        judging: samples on which damage is measured.
        removals: block indices of each candidate; duplicates are measured once.
        statistic: see `excise.measuring.measure.measure`.

    Returns:
        Of `judging`, in the order of the distinct removals. Costs are those of both kinds of samples.

    Raises:
        InputError: a block index does not fit the stack.
        ArchitectureError: a block that others depend on is to be removed.

    """
    stack = context.stack
    distinct = tuple(dict.fromkeys(removable_indices(stack, removed) for removed in removals))
    key = _key(context, fitting, judging, statistic)
    known = context.store.ledger(MEASUREMENTS, key)
    new = context.team.once(lambda: [removed for removed in distinct if removed not in known])
    # Asked only where something is to be measured: searches ask again and again for what is known.
    folds = repairable_folds(context.loaded) if new else {}
    if new and not folds:
        return measure(context, judging, removals, statistic=statistic)
    with context.progress.stage(STAGE, judging.tokens * len(distinct) if new else 0) as advance:
        if len(new) < len(distinct):
            advance(judging.tokens * (len(distinct) - len(new)))
        if new:
            mine = _mine(context, new)
            walk = (SweptWalk if sweeps(stack) else Walk)(context, fitting, judging, statistic, folds)
            for removed, sums in walk.measured(mine) if mine else ():
                known.add([removed], sums[None])
                advance(judging.tokens)
            # A process without candidates of its own took no divergence.
            if told := next(filter(None, context.team.gather(walk.distributions)), None):
                context.team.once(lambda: context.store.keep(DISTRIBUTIONS, key, told))
            for theirs in context.team.gather([(removed, known[removed]) for removed in mine]):
                for removed, sums in theirs:
                    if removed not in known:
                        known.add([removed], sums[None])
    trie = trie_of(stack, distinct)
    return Measurements(
        distinct,
        context.team.once(lambda: np.array([known[removed] for removed in distinct])),
        np.array([sample.targets for sample in judging]),
        _costs(trie, fitting.tokens, judging.tokens) / len(stack.blocks),
        context.team.once(lambda: context.store.found(DISTRIBUTIONS, key) or {}),
    )


def _mine(context: Context, removals: Sequence[Removal]) -> list[Removal]:
    """The candidates of this process: neighbours in the trie, which share most."""
    trie, team = trie_of(context.stack, removals), context.team
    bounds = [len(removals) * rank // team.size for rank in (team.rank, team.rank + 1)]
    return [removals[candidate] for candidate in trie.order[slice(*bounds)]]


def _key(context: Context, fitting: Samples, judging: Samples, statistic: Statistic) -> Facts:
    """What measurements depend on beside the removals."""
    key = {**pass_key(context, judging, {}), "fitting": fitting.hash, "statistic": statistic, "ridge": RIDGE_TOKENS}
    key["above"] = True  # of the cut, too: a store of version 0.1.0 has what was measured without
    # A candidate is judged on all batches before the next is, so that the distributions of all are held.
    return key if statistic == "loss" else {**key, "top_k": told_apart(context, context.batches(judging))}


def _costs(trie: Trie, fitting: int, judging: int) -> np.ndarray:
    """Tokens × blocks [candidates]: the fitting samples need no more than the block above the highest cut."""
    costs = np.zeros(len(trie.order))
    for candidate, start in zip(trie.order, trie.starts, strict=True):
        kept = ~trie.removed[candidate]
        top = np.flatnonzero(trie.removed[candidate])[-1] if trie.removed[candidate].any() else 0
        costs[candidate] = judging * kept[start:].sum() + fitting * kept[start : top + 2].sum()
    return costs
