"""The passes over samples: the only loops over batches. Rows per sample, or sums over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise import __version__
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.interrupts import stop_if_told
from excise.measuring.sweep import Streams, sweeps
from excise.measuring.trie import Trie
from excise.plain import Facts, Values
from excise.store import Journal

Rows = dict[str, np.ndarray]
SECONDS = "seconds"
# (batches by number, what to call after each block with its index) → each number with its rows.
Swept = Callable[[Mapping[int, Batch], Callable[[int], None]], Iterator[tuple[int, Rows]]]


def over_batches(
    context: Context, samples: Samples, name: str, *, weight: int = 1, shared: bool = False
) -> Iterator[tuple[int, Batch]]:
    """Each batch with its number, on the model's device; nothing is kept.

    Args:
        context: the model and how progress is shown.
        samples: what to pass over.
        name: of the stage, shown with its progress.
        weight: how many times a token counts in the progress shown.
        shared: only this process's part of the batches.

    """
    batches = list(enumerate(context.batches(samples)))
    mine = context.team.share(batches) if shared else batches
    with context.progress.stage(name, sum(batch.tokens for _, batch in mine) * weight) as advance:
        for number, batch in mine:
            stop_if_told()
            yield number, batch.to(context.stack.device)
            advance(batch.tokens * weight)


def final_states(
    context: Context, samples: Samples, name: str, numbers: Container[int]
) -> Iterator[tuple[int, Batch, Tensor]]:
    """Some batches with the model's final hidden states [batch, tokens, width], one after the other; nothing is kept.

    Args:
        context: the model and how progress is shown.
        samples: what to pass over.
        name: of the stage, shown with its progress.
        numbers: of the batches wanted.

    """
    stack = context.stack
    if not sweeps(stack):
        for number, batch in over_batches(context, samples, name):
            if number in numbers:
                yield number, batch, stack.hidden(batch.input_ids)
        return
    batches = {n: b.to(stack.device) for n, b in enumerate(context.batches(samples)) if n in numbers}
    intact = Trie.of(stack, np.zeros((1, len(stack.sublayers)), dtype=bool))
    with context.progress.stage(name, sum(batch.tokens for batch in batches.values())) as advance, Streams() as streams:
        after = _after_blocks(context, batches, advance, 1)
        yield from ((n, batches[n], hidden) for n, _, hidden in intact.swept(batches, streams, after))


def each_batch(
    context: Context,
    samples: Samples,
    kind: str,
    key: Values,
    rows_of: Callable[[int, Batch], Rows],
    *,
    weight: int = 1,
    swept: Swept | None = None,
) -> Rows:
    """Rows of every sample, kept batch by batch: an interrupted pass goes on, and a finished one is not made again.

    Several processes divide the batches, and all of them get all rows.

    Args:
        context: the model, the store, and the processes that share the work.
        samples: what to pass over.
        kind: name of the stage, in the store and in the progress shown.
        key: what the rows depend on beside the model, the samples and the size of a batch.
        rows_of: (number, batch on the model's device) → arrays [batch, …].
        weight: how many times a token counts in the progress shown.
        swept: the same for many batches, block by block, where the model does not stay in memory: (batches by number,
            what to call after each block) → each number with its rows.

    Returns:
        The arrays, [samples, …] in the samples' order.

    """
    journal = context.store.journal(kind, pass_key(context, samples, key))
    batches, team = context.batches(samples), context.team
    # Batches are sorted by length, so dealing them out in turn gives every process long and short ones alike.
    mine = team.share(range(len(batches)))
    with context.progress.stage(kind, sum(batches[n].tokens for n in mine) * weight) as advance:
        pieces = {number: rows for number in mine if (rows := _kept(context, journal, number)) is not None}
        if pieces:
            advance(sum(batches[n].tokens for n in pieces) * weight)
        missing = {n: batches[n].to(context.stack.device) for n in mine if n not in pieces}
        if swept is not None and sweeps(context.stack):
            pieces |= _swept(journal, missing, swept, context, advance, weight)
        else:
            for number, batch in missing.items():
                stop_if_told()
                pieces[number] = _made(journal, number, lambda n=number, b=batch: rows_of(n, b))  # type: ignore[misc]
                advance(batch.tokens * weight)
    for theirs in team.gather(pieces):
        pieces |= theirs
    # Batches group samples by length; rows go back into the samples' own order.
    order = np.argsort([i for batch in batches for i in batch.indices])
    names = set(pieces[0]) - {SECONDS}
    return {name: np.concatenate([pieces[n][name] for n in range(len(batches))])[order] for name in names}


def _swept(
    journal: Journal,
    batches: Mapping[int, Batch],
    swept: Swept,
    context: Context,
    advance: Callable[[int], None],
    weight: int,
) -> dict[int, Rows]:
    """Rows of batches that go through the blocks together; all are kept at the end, when the first of them is made."""
    if not batches:
        return {}
    after = _after_blocks(context, batches, advance, weight)
    started, pieces = time.perf_counter(), {}
    for number, rows in swept(batches, after):
        seconds = (time.perf_counter() - started) / len(batches)
        pieces[number] = _written(journal, number, rows, seconds)
    return pieces


def _after_blocks(
    context: Context, batches: Mapping[int, Batch], advance: Callable[[int], None], weight: int
) -> Callable[[int], None]:
    """What to call after each block that all batches went through."""
    # Bars count tokens: a block's share of those of all batches.
    total, blocks = sum(batch.tokens for batch in batches.values()) * weight, len(context.stack.blocks)

    def after(block: int) -> None:
        stop_if_told()
        advance(total * (block + 1) // blocks - total * block // blocks)

    return after


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


def _made(journal: Journal, number: int, make: Callable[[], Rows]) -> Rows:
    started = time.perf_counter()
    rows = make()
    return _written(journal, number, rows, time.perf_counter() - started)


def _written(journal: Journal, number: int, rows: Rows, seconds: float) -> Rows:
    rows = {**rows, SECONDS: np.array(seconds)}
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
    for number, batch in over_batches(context, samples, name, shared=True):
        for term, tensor in terms_of(number, batch).items():
            # Cloned, since adding in place would write into a tensor that belongs to the caller.
            sums[term] = sums[term].add_(tensor) if term in sums else tensor.clone()
    return summed(context, sums)


def summed(context: Context, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes; one that had no batch to pass over has none, and adds nothing."""
    team = context.team
    forms: dict[str, Any] = {}
    for theirs in team.gather({name: (t.shape, t.dtype, t.device.type) for name, t in sums.items()}):
        forms |= theirs
    found = {}
    for name, (shape, dtype, device) in sorted(forms.items()):
        mine = sums[name] if name in sums else torch.zeros(shape, dtype=dtype, device=device)
        found[name] = team.total(mine)
    return found
