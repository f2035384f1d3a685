"""Measuring candidates on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import spearmanr

from excise.choosing.candidate import Candidate, Verified
from excise.choosing.pipeline import measure_proposals
from excise.choosing.proposal import Proposal
from excise.context import Context
from excise.data.samples import Samples
from excise.errors import InputError
from excise.ising.energies import Energy
from excise.measuring.ratios import by_domain


def verify(context: Context, samples: Samples, proposals: Sequence[Proposal], energy: Energy) -> Verified:
    """Measure every proposal on held-out samples.

    Args:
        context: the model and the store, in which measurements are kept and found again.
        samples: held-out samples, not those of the calibration.
        proposals: of whole blocks; removals proposed twice are measured once.
        energy: the energy shown beside the loss, over blocks.

    Raises:
        InputError: no proposal, or none with a finite loss.

    """
    if not proposals:
        raise InputError("nothing to verify: expected at least one proposed removal")
    stack = context.stack
    held_out = measure_proposals(context, samples, proposals)
    base = held_out.base_loss
    if not math.isfinite(base):
        raise InputError("the intact model's loss on the held-out samples is not finite; try --dtype float32")
    candidates = []
    for proposal, sums in zip(proposals, held_out.sums, strict=True):
        loss = float(sums.sum() / held_out.counts.sum())
        candidates.append(
            Candidate(
                proposal.method,
                proposal.removed,
                energy.energy(proposal.removed),
                loss,
                loss - base,
                _perplexity(loss),
                proposal.parameters_left(stack),
                domains=by_domain(sums - held_out.base, held_out.counts, samples.domains),
            )
        )
    # NaN sorts nowhere in particular, so finiteness is asked first.
    candidates.sort(key=lambda c: (not math.isfinite(c.loss), c.loss, c.removed))
    if not math.isfinite(candidates[0].loss):
        raise InputError("no candidate has a finite loss; try --dtype float32")
    return Verified(base, tuple(candidates), _spearman(candidates), held_out.forward_tokens)


def _perplexity(loss: float) -> float:
    # exp overflows a float at 709.8.
    return math.exp(loss) if loss < 700 else math.inf


def _spearman(candidates: Sequence[Candidate]) -> float | None:
    # Each removal once: a removal proposed three times would weigh three times in the correlation.
    pairs = {c.removed: (c.energy, c.loss) for c in candidates if math.isfinite(c.loss)}
    if len(pairs) < 3:
        return None
    energies, losses = zip(*pairs.values(), strict=True)
    rho = float(spearmanr(energies, losses).statistic)
    return rho if math.isfinite(rho) else None
