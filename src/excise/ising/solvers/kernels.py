"""What the compiled kernels share: compilation, random numbers, and the pool of the K lowest states seen so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from excise.plain import Facts

OPTIONS: Facts = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz", "contract", "reassoc"},
}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile for NumPy arrays, without the interpreter lock, cached on disk where some cache folder can be written."""
    return _compile(function, OPTIONS)


def inner_kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that only other kernels call; leaving out its Python wrapper halves the time to compile."""
    return _compile(function, {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True})


def _compile(function: Callable[..., Any], options: Facts) -> Any:
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no writable place: compile in every process instead
        return numba.njit(**options)(function)


EMPTY_STATE = np.uint64(1 << 63)  # hash of the state that removes nothing; never 0, which marks an empty place


class Pool(NamedTuple):
    """The K lowest distinct states seen, a max-heap on energy with a hash table against duplicates.

    Energies here are a solver's running values without the constant; reported ones are recomputed from the state.
    """

    energies: NDArray[np.float64]  # [K], heap order
    slots: NDArray[np.int64]  # [K], heap position → row of masks
    masks: NDArray[np.uint8]  # [K, n]
    keys: NDArray[np.uint64]  # [K], hash of each row of masks
    table: NDArray[np.uint64]  # open addressing, 0 = empty
    sizes: NDArray[np.int64]  # [2]: states held, keys in the table


def new_pool(states: int, n: int) -> Pool:
    """An empty pool for `states` states of n units."""
    size = 1 << (4 * states + 64).bit_length()
    return Pool(
        np.full(states, np.inf),
        np.arange(states),
        np.zeros((states, n), dtype=np.uint8),
        np.zeros(states, dtype=np.uint64),
        np.zeros(size, dtype=np.uint64),
        np.zeros(2, dtype=np.int64),
    )


def zobrist(n: int) -> NDArray[np.uint64]:
    """One fixed random key per unit; a state's hash is EMPTY_STATE exclusive-or its units' keys."""
    return np.random.default_rng(20240229).integers(1, 2**63, size=n, dtype=np.uint64)


def contents(pool: Pool) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Energies and masks held, unsorted."""
    held = int(pool.sizes[0])
    return pool.energies[:held].copy(), pool.masks[pool.slots[:held]]


@inner_kernel
def threshold(pool):  # type: ignore[no-untyped-def]
    """Energy that a new state must be below: the K-th lowest seen, infinite until there are K."""
    return pool.energies[0] if pool.sizes[0] == len(pool.energies) else np.inf


@inner_kernel
def is_known(pool, key):  # type: ignore[no-untyped-def]
    """Whether the table holds this key."""
    last = np.uint64(len(pool.table) - 1)
    place = key & last
    while pool.table[place] != 0:
        if pool.table[place] == key:
            return True
        place = (place + np.uint64(1)) & last
    return False


@inner_kernel
def _remember(pool, key):  # type: ignore[no-untyped-def]
    last = np.uint64(len(pool.table) - 1)
    if 2 * pool.sizes[1] > len(pool.table):  # forget the keys of states that have left the pool
        pool.table[:] = 0
        pool.sizes[1] = pool.sizes[0]
        for k in range(pool.sizes[0]):
            place = pool.keys[pool.slots[k]] & last
            while pool.table[place] != 0:
                place = (place + np.uint64(1)) & last
            pool.table[place] = pool.keys[pool.slots[k]]
    place = key & last
    while pool.table[place] != 0:
        place = (place + np.uint64(1)) & last
    pool.table[place] = key
    pool.sizes[1] += 1


@inner_kernel
def place_state(pool, energy, key):  # type: ignore[no-untyped-def]
    """Make room for a new state below the threshold and return the row of `masks` that the caller fills in."""
    held = pool.sizes[0]
    capacity = len(pool.energies)
    if held < capacity:
        row = held
        place = held
        pool.sizes[0] += 1
        while place > 0 and pool.energies[(place - 1) // 2] < energy:
            parent = (place - 1) // 2
            pool.energies[place] = pool.energies[parent]
            pool.slots[place] = pool.slots[parent]
            place = parent
    else:
        row = pool.slots[0]
        place = 0
        while True:
            child = 2 * place + 1
            if child >= capacity:
                break
            if child + 1 < capacity and pool.energies[child + 1] > pool.energies[child]:
                child += 1
            if pool.energies[child] <= energy:
                break
            pool.energies[place] = pool.energies[child]
            pool.slots[place] = pool.slots[child]
            place = child
    pool.energies[place] = energy
    pool.slots[place] = row
    pool.keys[row] = key
    _remember(pool, key)
    return row


@inner_kernel
def next_random(state):  # type: ignore[no-untyped-def]
    """Next 63-bit number of a splitmix64 generator; `state` is a uint64 array of length 1."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(1))


def random_state(seed: int) -> NDArray[np.uint64]:
    """Generator state for `next_random`."""
    return np.array([np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]], dtype=np.uint64)
