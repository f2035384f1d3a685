"""Ours: states of an Ising energy of gate gradients, as criteria to be compared with the others.

`fisher` and `fisher+linear` remove the ground state of those energies (see `excise.ising.energies.fisher`), the first
as the paper does (Jansen et al., 2026). The `-verified` ones measure the lowest states on a few of the calibration
samples and remove the one that costs least. `path` takes its gradients between intact and removed (see
`excise.ising.energies.path`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from excise.choosing.criteria.selection import Selection, removable_blocks
from excise.data.samples import Samples
from excise.ising.energies import ENERGIES
from excise.ising.energies.path import path, path_positions
from excise.ising.gradients import Gradients
from excise.ising.solvers import solve
from excise.ising.spectrum import Spectrum
from excise.measuring.measure import measure
from excise.measuring.score import score
from excise.models.identity import model_identity
from excise.models.removable import block_problem
from excise.models.stack import Stack

STATES = 20
VERIFY_TOKENS = 1024
TIME_LIMIT = 60.0


def ground_state(energy: str, *, verified: bool = False) -> Callable[..., Selection]:
    """Criterion that removes the lowest state of an energy, or the one measured lowest among the `STATES` lowest.

    Args:
        energy: a name in `excise.ising.energies.ENERGIES`.
        verified: measure the states on the first `VERIFY_TOKENS` tokens of the samples.

    """
    method = f"{energy}-verified" if verified else energy

    def choose(
        stack: Stack,
        samples: Samples,
        budget: int,
        *,
        protected: Sequence[int] = (),
        seed: int = 0,
        work: Path | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Selection:
        removable_blocks(stack, budget, protected)
        gradients, reused = shared_gradients(stack, samples, work, advance)
        problem = block_problem(stack, ENERGIES[energy](gradients.blocks()), budget, protected)
        spectrum = solve(problem, states=STATES if verified else 1, seed=seed, time_limit=TIME_LIMIT)
        note = "" if spectrum.certified else "the spectrum was not proved within its time limit"
        removed, tokens = spectrum[0].removed, 0.0
        if verified:
            few = samples.first_tokens(VERIFY_TOKENS)
            removed, tokens = _lowest_measured(stack, few, spectrum, work, advance)
        return Selection(
            method,
            removed,
            forward_tokens=samples.tokens + tokens,
            backward_tokens=samples.tokens,
            note=note,
            reused_seconds=reused,
        )

    return choose


def path_ground_state(
    stack: Stack,
    samples: Samples,
    budget: int,
    *,
    protected: Sequence[int] = (),
    seed: int = 0,
    work: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Selection:
    """Remove the ground state of the energy fitted to gradients at random points, one a sample, near the budget.

    Args:
        stack: the model.
        samples: calibration samples.
        budget: number of blocks to remove.
        protected: blocks that stay.
        seed: of the points and the solver.
        work: folder in which the gradients of finished batches are kept, so that an interrupted pass goes on.
        advance: called with tokens done.

    """
    removable_blocks(stack, budget, protected)
    positions = path_positions(len(stack.blocks), len(samples), [budget], seed)
    journal = work / f"gradients-{budget}-{seed}" if work else None
    gradients = score(stack, samples, positions=positions, journal=journal, advance=advance)
    assert gradients is not None  # one part: never incomplete
    assert gradients.positions is not None
    problem = block_problem(stack, path(gradients.blocks(), gradients.positions), budget, protected)
    spectrum = solve(problem, states=1, seed=seed, time_limit=TIME_LIMIT)
    return Selection(
        "path",
        spectrum[0].removed,
        forward_tokens=samples.tokens,
        backward_tokens=samples.tokens,
        note="" if spectrum.certified else "the spectrum was not proved within its time limit",
    )


def shared_gradients(
    stack: Stack, samples: Samples, work: Path | None, advance: Callable[[int], None] | None
) -> tuple[Gradients, float]:
    """Gradients of `samples`, and the seconds of an earlier pass they were taken from.

    Several criteria look at the same gradients; the first keeps them beside its own folder, for all that share the
    folder above it.
    """
    if work is None:
        gradients = score(stack, samples, advance=advance)
        assert gradients is not None  # one part: never incomplete
        return gradients, 0.0
    name = f"gradients-{samples.hash[:8]}-{model_identity(stack.model)[:8]}"
    path = work.parent / f"{name}.safetensors"
    if path.exists():
        gradients = Gradients.load(path)
        if advance:
            advance(samples.tokens)
        return gradients, float((gradients.provenance or {}).get("seconds", 0.0))
    started = time.perf_counter()
    gradients = score(stack, samples, journal=work.parent / name, advance=advance)
    assert gradients is not None
    gradients = gradients.with_provenance(seconds=time.perf_counter() - started)
    gradients.save(path)
    return gradients, 0.0


def _lowest_measured(
    stack: Stack,
    samples: Samples,
    spectrum: Spectrum,
    work: Path | None,
    advance: Callable[[int], None] | None,
) -> tuple[tuple[int, ...], float]:
    measured = measure(stack, samples, [state.removed for state in spectrum], ledger=work, advance=advance)
    losses = np.where(np.isnan(measured.losses), np.inf, measured.losses)
    return measured.removals[int(np.argmin(losses))], measured.forward_tokens
