"""A spectrum: the lowest states a solver found, and what it proved about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import NDArray

from excise.artefacts import read_json, write_artefact
from excise.errors import InputError, reading
from excise.plain import Facts, Values


@dataclass(frozen=True)
class State:
    """A configuration and its energy: `removed` holds sorted original indices."""

    removed: tuple[int, ...]
    energy: float


@dataclass(frozen=True)
class Spectrum:
    """The lowest states by energy, ties in lexicographic order of `removed`; `spectrum[k]` is the paper's CBO:k.

    Args:
        states: The states found, sorted.
        units: Number N of units of the energy.
        budget: Number of removed units, None where constraints set it.
        solver: Name of the solver.
        seconds: Wall time it took.
        certified: Whether the list is proved to be the lowest states. Where other states tie with the last one within
            rounding, which of them are listed is arbitrary.
        lower_bound: No state has a lower energy than this; None when nothing was proved.
        gap: (E₀ − lower_bound) / |E₀|, 0 when certified; None when nothing was proved.
        evaluated: Number of configurations or search nodes examined.
        seed: Seed of the random part.
        complete: Whether the list holds every state the problem has.
        proved: How many of the first states are proved to be the lowest; all of them when certified.
        notes: Remarks for the user (time limit, ties, …).
        labels: Names of the units, where they are not the blocks: "3.attention", …

    """

    states: tuple[State, ...]
    units: int
    budget: int | None
    solver: str
    seconds: float
    certified: bool = False
    lower_bound: float | None = None
    gap: float | None = None
    evaluated: int = 0
    seed: int | None = None
    complete: bool = False
    proved: int = 0
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, k: int) -> State:
        return self.states[k]

    def __iter__(self) -> Iterator[State]:
        return iter(self.states)

    def masks(self) -> Bool[np.ndarray, "states N"]:
        """Which units each state removes, [states, N]."""
        return masks_of([state.removed for state in self.states], self.units)

    def removal_frequency(self, lowest: int | None = None) -> Float64[np.ndarray, " N"]:
        """Share of the `lowest` states (all by default) that remove each unit, [N] (paper, Fig. 3)."""
        return self.masks()[:lowest].mean(axis=0) if self.states else np.zeros(self.units)

    def first_touching(self, unit: int) -> State | None:
        """The lowest state that removes `unit`; None where no listed state does."""
        return next((state for state in self.states if unit in state.removed), None)

    def select(self, count: int, by: str = "hamming", min_distance: float | None = None) -> tuple[State, ...]:
        """Choose `count` states that differ, starting from the ground state.

        With `min_distance`, states are taken in order of energy when they are at least that far from all taken before
        (greedy). Without it, each next state is the one farthest from those taken (lower energy on ties).

        Args:
            count: How many; fewer are returned when the spectrum runs out.
            by: "hamming", the number of units on which two masks differ, or "pearson", 1 − their correlation (0 to 2).
            min_distance: In the unit of `by`.

        Raises:
            InputError: an unknown measure or a count below 1.

        """
        if count < 1:
            raise InputError(f"count must be 1 or more, got {count}")
        if by not in ("hamming", "pearson"):
            raise InputError(f'by must be "hamming" or "pearson", got {by!r}')
        if not self.states:
            return ()
        masks = self.masks()
        measure = _hamming if by == "hamming" else _one_minus_pearson
        nearest = measure(masks, masks[0])
        taken = [0]
        while len(taken) < min(count, len(self.states)):
            if min_distance is None:
                # Below every distance: where all others lie at 0, argmax would return to one that is taken.
                nearest[taken] = -1.0
                candidate = int(nearest.argmax())
            else:
                # Correlations are rounded; states exactly at the distance wanted count.
                far = np.flatnonzero(nearest[taken[-1] + 1 :] >= min_distance - 1e-12)
                if len(far) == 0:
                    break
                candidate = taken[-1] + 1 + int(far[0])
            taken.append(candidate)
            nearest = np.minimum(nearest, measure(masks, masks[candidate]))
        return tuple(self.states[k] for k in taken)

    def lowest(self, count: int) -> Spectrum:
        """The first `count` states, with the same proof."""
        if count >= len(self.states):
            return self
        return replace(self, states=self.states[:count], complete=False, proved=min(self.proved, count))

    def by_budget(self) -> dict[int, Spectrum]:
        """The states by how many units they remove: where constraints leave that open, the lowest of each number."""
        found: dict[int, Spectrum] = {}
        for count in sorted({len(state.removed) for state in self.states}):
            states = tuple(state for state in self.states if len(state.removed) == count)
            proved = sum(len(state.removed) == count for state in self.states[: self.proved])
            alone = replace(self, states=states, budget=count, proved=proved)
            found[count] = alone.with_proof() if self.certified else alone
        return found

    def with_proof(self) -> Spectrum:
        """The same spectrum as a proved list: bound at the ground state, no gap."""
        bound = self.states[0].energy if self.states else None
        gap = 0.0 if self.states else None
        return replace(self, certified=True, lower_bound=bound, gap=gap, proved=len(self.states))

    def to_json(self) -> Facts:
        """Plain values: `states` as [{"removed": […], "energy": …}, …] and the other fields by name."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("states", "notes", "labels")}
        states = [{"removed": list(state.removed), "energy": state.energy} for state in self.states]
        labels = {"labels": list(self.labels)} if self.labels else {}
        return {"states": states, **fields, "notes": list(self.notes), **labels}

    @classmethod
    def from_json(cls, value: Values) -> Spectrum:
        """Read what `to_json` wrote.

        Raises:
            InputError: fields are missing or of another kind.

        """
        try:
            fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
            fields["states"] = _states((state["removed"], state["energy"]) for state in value["states"])
            fields |= {name: tuple(value.get(name, ())) for name in ("notes", "labels")}
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise InputError(f"not a spectrum ({error!r}); expected what `excise solve` writes") from None

    def save(self, path: str | Path, *, key: str | None = None) -> None:
        """Write as JSON, atomically; `key` is that of what made it."""
        write_artefact(path, self.to_json(), key=key)

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Read a spectrum written by `save`.

        Raises:
            InputError: no such file, or not a spectrum.

        """
        with reading(path, "a spectrum, which `excise solve` writes"):
            return cls.from_json(read_json(path))


def masks_of(removals: Sequence[Sequence[int]], units: int) -> Bool[np.ndarray, "removals N"]:
    """Which of `units` units each removal removes, [removals, N]."""
    masks = np.zeros((len(removals), units), dtype=bool)
    for mask, removed in zip(masks, removals, strict=True):
        mask[list(removed)] = True
    return masks


def _states(pairs: Iterable[tuple[Iterable[int], float]]) -> tuple[State, ...]:
    return tuple(State(tuple(int(i) for i in removed), float(energy)) for removed, energy in pairs)


def _hamming(masks: NDArray[np.bool_], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    return (masks ^ mask).sum(axis=1).astype(np.float64)


def _one_minus_pearson(masks: NDArray[np.bool_], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    centred = masks - masks.mean(axis=1, keepdims=True)
    other = mask - mask.mean()
    norms = np.sqrt((centred**2).sum(axis=1) * (other**2).sum())
    products = centred @ other
    # A mask of all or nothing has no correlation; it counts as equal to any other.
    return 1.0 - np.divide(products, norms, out=np.ones_like(products), where=norms > 0)
