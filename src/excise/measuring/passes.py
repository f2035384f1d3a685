"""The passes over samples: the only loops over batches. Rows per sample, or sums over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from torch import Tensor

from excise import __version__
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import ExciseError
from excise.interrupts import stop_if_told
from excise.plain import Facts, Values
from excise.store import Journal

Rows = dict[str, np.ndarray]
SECONDS = "seconds"


class UnfinishedError(ExciseError):
    """Other processes have not done their part of a pass, and this one has."""


def over_batches(context: Context, samples: Samples, name: str, *, weight: int = 1) -> Iterator[tuple[int, Batch]]:
    """Each batch with its number, on the model's device; nothing is kept.

    Args:
        context: the model and how progress is shown.
        samples: what to pass over.
        name: of the stage, shown with its progress.
        weight: how many times a token counts in the progress shown.

    """
    with context.progress.stage(name, samples.tokens * weight) as advance:
        for number, batch in enumerate(context.batches(samples)):
            stop_if_told()
            yield number, batch.to(context.stack.device)
            advance(batch.tokens * weight)


def each_batch(
    context: Context,
    samples: Samples,
    kind: str,
    key: Values,
    rows_of: Callable[[int, Batch], Rows],
    *,
    weight: int = 1,
) -> Rows:
    """Rows of every sample, kept batch by batch: an interrupted pass goes on, and a finished one is not made again.

    Args:
        context: the model, the store, and which part of the batches this process does.
        samples: what to pass over.
        kind: name of the stage, in the store and in the progress shown.
        key: what the rows depend on beside the model, the samples and the size of a batch.
        rows_of: (number, batch on the model's device) → arrays [batch, …].
        weight: how many times a token counts in the progress shown.

    Returns:
        The arrays, [samples, …] in the samples' order.

    Raises:
        UnfinishedError: other processes have not done their part.

    """
    journal = context.store.journal(kind, pass_key(context, samples, key))
    rank, parts = context.part
    batches = context.batches(samples)
    pieces: dict[int, Rows] = {}
    # Batches are sorted by length, so dealing them out in turn gives every process long and short ones alike.
    with context.progress.stage(kind, sum(b.tokens for b in batches[rank::parts]) * weight) as advance:
        for number in range(rank, len(batches), parts):
            stop_if_told()
            batch = batches[number]
            pieces[number] = _kept(context, journal, number) or _made(journal, number, batch, context, rows_of)
            advance(batch.tokens * weight)
    for number in set(range(len(batches))) - set(pieces):
        rows = _kept(context, journal, number)
        if rows is None:
            # Processes meet only in the store: whoever ends last finds all parts there, the others have nothing to wait
            # for.
            raise UnfinishedError(f"part {rank}/{parts} of {kind} is done; the last part to finish goes on")
        pieces[number] = rows
    # Batches group samples by length; rows go back into the samples' own order.
    order = np.argsort([i for batch in batches for i in batch.indices])
    names = set(pieces[0]) - {SECONDS}
    return {name: np.concatenate([pieces[n][name] for n in range(len(batches))])[order] for name in names}


def pass_key(context: Context, samples: Samples, key: Values) -> Facts:
    """Everything that the rows of a pass depend on."""
    return {
        "excise": __version__,
        "model_hash": context.identity,
        "samples": samples.hash,
        # Batches are kept by number, and with another size the same number means other samples.
        "batch_tokens": context.tokens_per_batch,
        **key,
    }


def _kept(context: Context, journal: Journal, number: int) -> Rows | None:
    rows = journal.get(number)
    if rows is not None:
        # A criterion that finds a pass done is charged the time it took, or the second in a comparison would look free.
        context.store.reused_seconds += float(rows[SECONDS])
    return rows


def _made(journal: Journal, number: int, batch: Batch, context: Context, rows_of: Callable[[int, Batch], Rows]) -> Rows:
    started = time.perf_counter()
    rows = rows_of(number, batch.to(context.stack.device))
    rows[SECONDS] = np.array(time.perf_counter() - started)
    journal.write(number, **rows)
    return rows


def total(
    context: Context, samples: Samples, name: str, terms_of: Callable[[int, Batch], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Sums over all batches of what each gives; kept in memory only, since such sums may be as large as the weights.

    Args:
        context: the model and how progress is shown.
        samples: what to pass over.
        name: of the stage, shown with its progress.
        terms_of: (number, batch on the model's device) → tensors, of the same names and shapes for every batch.

    """
    sums: dict[str, Tensor] = {}
    for number, batch in over_batches(context, samples, name):
        for term, tensor in terms_of(number, batch).items():
            # Cloned, since adding in place would write into a tensor that belongs to the caller.
            sums[term] = sums[term].add_(tensor) if term in sums else tensor.clone()
    return sums
