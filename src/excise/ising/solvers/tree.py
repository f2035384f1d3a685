"""The compiled tree search under branch-and-bound: nodes, their relaxation, fixing, leaves.

Units are in branching order. A node has fixed some of them; for the free ones F it keeps a point y of the relaxation
(Σy = r), its gradient G, its value q, and the true marginal energies c. Since the shifted J is convex along Σy = r,

    q + min { G·(x − y) : x ∈ {0,1}^F, Σx = r } = q + (sum of the r smallest G) − G·y

is a lower bound at any y, converged or not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from excise.ising.solvers.kernels import EMPTY_STATE, inner_kernel, is_known, kernel, place_state, threshold
from excise.ising.solvers.places import settle

MOST_DESCENTS = 400
MOVES_PER_BOUND = 6
HOPELESS = 3.0  # a relaxation ends where its bound is so many times as far from its value as that from the limit
TIES_FOLLOWED = 2000


class Instance(NamedTuple):
    """What a search reads: the problem in branching order, and the shifts, of which `which[p]` serves depth p."""

    J: NDArray[np.float64]  # [n, n]
    h: NDArray[np.float64]  # [n]
    C: NDArray[np.float64]  # [constraints, n]
    bounds: NDArray[np.float64]  # [constraints]
    by_weight: NDArray[np.int64]  # [constraints, n], units by decreasing weight
    convex: NDArray[np.float64]  # [n, n], what the bound has in place of J: J, or a node's own function
    linear: NDArray[np.float64]  # [n], what it has in place of h
    tilt: NDArray[np.float64]  # [n], −Cᵀλ: what the constraints' multipliers add to the linear part of the bound
    offset: NDArray[np.float64]  # [1], λ·bounds
    shifts: NDArray[np.float64]  # [tables, n]
    which: NDArray[np.int64]  # [n + 1]
    keys: NDArray[np.uint64]  # [n]
    places: NDArray[np.bool_]  # [2, n, n + 1], of units in their own order; [2, 0, 1] without a pattern
    order: NDArray[np.int64]  # [n], branching place of each unit in their own order


class Shared(NamedTuple):
    """What the threads of a search share, written without locks: each value only ever tightens."""

    threshold: NDArray[np.float64]  # [1]: K-th lowest energy known, no state above it is wanted
    margin: NDArray[np.float64]  # [2]: added to the threshold when pruning, and its size
    stop: NDArray[np.int64]  # [1]: set to end the search


class Work(NamedTuple):
    """One thread's stack of nodes, by depth, and its counters."""

    status: NDArray[np.int8]  # [depth, n]: −1 free, else the value fixed
    y: NDArray[np.float64]  # [depth, n]
    G: NDArray[np.float64]
    c: NDArray[np.float64]
    free: NDArray[np.int64]  # [depth, n], the first `size` entries
    numbers: NDArray[np.int64]  # [depth, 6]: r, size of F, first free unit, table, branching unit, its first value
    values: NDArray[np.float64]  # [depth, 3]: energy of the fixed units, q, lower bound
    scratch: NDArray[np.float64]  # [n]
    own: NDArray[np.float64]  # [n], the diagonal of the bound's matrix at a depth
    counters: NDArray[np.int64]  # [2]: nodes, ties with the threshold met
    open_status: NDArray[np.int8]  # [capacity, n]: nodes handed back
    open_bounds: NDArray[np.float64]  # [capacity]
    ahead: NDArray[np.int8]  # [n + 1, n + 2], see excise.ising.solvers.places.settle
    verdict: NDArray[np.int8]  # [n], likewise


R, SIZE, FIRST, TABLE, UNIT, VALUE = 0, 1, 2, 3, 4, 5
ENERGY, Q, LB = 0, 1, 2


def new_work(n: int, capacity: int) -> Work:
    """Memory for one thread; `capacity` is the number of open nodes it can hand back besides its stack."""
    depth = n + 2
    return Work(
        np.empty((depth, n), dtype=np.int8),
        np.empty((depth, n)),
        np.empty((depth, n)),
        np.empty((depth, n)),
        np.empty((depth, n), dtype=np.int64),
        np.zeros((depth, 6), dtype=np.int64),
        np.zeros((depth, 3)),
        np.empty(n),
        np.empty(n),
        np.zeros(2, dtype=np.int64),
        np.empty((capacity + depth, n), dtype=np.int8),
        np.empty(capacity + depth),
        np.empty((n + 1, n + 2), dtype=np.int8),
        np.empty(n, dtype=np.int8),
    )


@kernel
def explore(instance, shared, work, pool, status, count, bound, level, node_limit):  # type: ignore[no-untyped-def]
    """Search below one node; nodes with a bound above `level`, and those open at the node limit, are handed back.

    Returns the number of nodes handed back in work.open_status and work.open_bounds.
    """
    n = len(status)
    capacity = len(work.open_bounds) - n - 2
    _enter(instance, work, status, count)
    work.values[0, LB] = bound
    depth, handed, nodes = 0, 0, 0
    while nodes < node_limit and handed < capacity and shared.stop[0] == 0:
        nodes += 1
        value = -1
        if _must_branch(instance, shared, work, pool, depth):
            if work.values[depth, LB] > level:
                _hand_back(work, handed, depth, -1)
                handed += 1
            else:
                unit = work.numbers[depth, FIRST]
                value = 1 if work.y[depth, unit] >= 0.5 else 0
                work.numbers[depth, UNIT] = unit
                work.numbers[depth, VALUE] = value
                _copy(work, depth, depth + 1)
                depth += 1
        if value < 0:  # back to the nearest node whose second value is still to be tried
            depth -= 1
            while depth >= 0 and work.values[depth, LB] > shared.threshold[0] + shared.margin[0]:
                depth -= 1
            if depth < 0:
                break
            unit = work.numbers[depth, UNIT]
            value = 1 - work.numbers[depth, VALUE]
        _fix(instance, work, depth, unit, value)
    for d in range(depth + 1):
        _hand_back(work, handed, d, depth)
        handed += 1
    work.counters[0] += nodes
    return handed


@inner_kernel
def _hand_back(work, place, depth, current):  # type: ignore[no-untyped-def]
    """Write down an open node: the one at depth `current` itself, above it the second value of a node's branching."""
    for i in range(work.status.shape[1]):
        work.open_status[place, i] = work.status[depth, i]
    if depth < current:
        work.open_status[place, work.numbers[depth, UNIT]] = 1 - work.numbers[depth, VALUE]
    work.open_bounds[place] = work.values[depth, LB]


@inner_kernel
def _enter(instance, work, status, count):  # type: ignore[no-untyped-def]
    """Set up depth 0 from a status vector, from scratch."""
    J, h, convex, linear, tilt = instance.J, instance.h, instance.convex, instance.linear, instance.tilt
    n = len(h)
    r, size, energy, q = count, 0, 0.0, instance.offset[0]
    first = n
    c, G = work.c[0], work.G[0]
    for i in range(n):
        work.status[0, i] = status[i]
        c[i] = h[i] + J[i, i]
        G[i] = linear[i] + tilt[i] + convex[i, i]
        if status[i] < 0:
            first = min(first, i)
            work.free[0, size] = i
            size += 1
        elif status[i] == 1:
            r -= 1
    for j in range(n):
        if status[j] == 1:
            energy += c[j]
            q += G[j]
            for k in range(n):
                if k != j:
                    c[k] += 2 * J[j, k]
                    G[k] += 2 * convex[j, k]
    table = instance.which[first]
    u = instance.shifts[table]
    share = r / size if size > 0 else 0.0
    for i in range(n):
        work.y[0, i] = share if status[i] < 0 else float(status[i])
        if status[i] >= 0:
            G[i] = 0.0
    for a in range(size):
        i = work.free[0, a]
        alone = G[i] - convex[i, i] + u[i]
        gradient = alone - 2 * u[i] * share
        for b in range(size):
            gradient += 2 * convex[i, work.free[0, b]] * share
        G[i] = gradient
        q += 0.5 * share * (gradient + alone)
    work.numbers[0, R], work.numbers[0, SIZE], work.numbers[0, FIRST], work.numbers[0, TABLE] = r, size, first, table
    work.values[0, ENERGY], work.values[0, Q] = energy, q


@inner_kernel
def _copy(work, source, target):  # type: ignore[no-untyped-def]
    n = work.y.shape[1]
    for i in range(n):
        work.status[target, i] = work.status[source, i]
        work.y[target, i] = work.y[source, i]
        work.G[target, i] = work.G[source, i]
        work.c[target, i] = work.c[source, i]
    for a in range(work.numbers[source, SIZE]):
        work.free[target, a] = work.free[source, a]
    for k in range(6):
        work.numbers[target, k] = work.numbers[source, k]
    for k in range(3):
        work.values[target, k] = work.values[source, k]


@inner_kernel
def _must_branch(instance, shared, work, pool, depth):  # type: ignore[no-untyped-def]
    """Bound, fix and, near the bottom, enumerate a node; True when it must be split."""
    n = len(instance.h)
    while True:
        r, size = work.numbers[depth, R], work.numbers[depth, SIZE]
        if r < 0 or r > size:
            return False
        for k in range(len(instance.bounds)):
            if _most_weight(instance, work, depth, k, r) < instance.bounds[k]:
                return False
        if instance.places.shape[1] > 0:
            settled = _fix_by_places(instance, work, depth)
            if settled < 0:
                return False
            if settled > 0:
                continue
        if r <= 1 or size - r <= 1:
            _leaves(instance, shared, work, pool, depth)
            return False
        first = work.numbers[depth, FIRST]
        while first < n and work.status[depth, first] >= 0:
            first += 1
        work.numbers[depth, FIRST] = first
        if instance.which[first] != work.numbers[depth, TABLE]:
            _change_table(instance, work, depth, instance.which[first])
        bound = max(work.values[depth, LB], _descend(instance, shared, work, depth))
        work.values[depth, LB] = bound
        if bound > shared.threshold[0] + shared.margin[0]:
            return False
        if _fix_by_reduced_cost(instance, shared, work, depth) == 0:
            return True


@inner_kernel
def _change_table(instance, work, depth, table):  # type: ignore[no-untyped-def]
    old, new = instance.shifts[work.numbers[depth, TABLE]], instance.shifts[table]
    y, G = work.y[depth], work.G[depth]
    q = work.values[depth, Q]
    for a in range(work.numbers[depth, SIZE]):
        i = work.free[depth, a]
        change = new[i] - old[i]
        q += change * (y[i] - y[i] * y[i])
        G[i] += change * (1 - 2 * y[i])
    work.values[depth, Q] = q
    work.numbers[depth, TABLE] = table


@inner_kernel
def _move(instance, work, depth, i, j, amount):  # type: ignore[no-untyped-def]
    """Move `amount` of y from j to i."""
    convex, y, G = instance.convex, work.y[depth], work.G[depth]
    u = instance.shifts[work.numbers[depth, TABLE]]
    curvature = convex[i, i] + convex[j, j] - u[i] - u[j] - 2 * convex[i, j]
    work.values[depth, Q] += amount * (G[i] - G[j]) + amount * amount * curvature
    up, down = convex[i], convex[j]
    twice = 2 * amount
    for k in range(work.numbers[depth, FIRST], len(y)):
        G[k] += twice * (up[k] - down[k])
    G[i] -= twice * u[i]
    G[j] += twice * u[j]
    y[i] += amount
    y[j] -= amount


@inner_kernel
def _descend(instance, shared, work, depth):  # type: ignore[no-untyped-def]
    """Lower the relaxation by moves along pairs until the bound decides; returns the bound at the last point."""
    convex, y, G, free = instance.convex, work.y[depth], work.G[depth], work.free[depth]
    size, own = work.numbers[depth, SIZE], work.own
    u = instance.shifts[work.numbers[depth, TABLE]]
    # Side by side, where the loops below read it; a diagonal is spread over as many cache lines as it is long.
    for k in range(len(y)):
        own[k] = convex[k, k] - u[k]
    limit = shared.threshold[0] + shared.margin[0]
    best = -np.inf
    for step in range(MOST_DESCENTS):
        if step % MOVES_PER_BOUND == 0:
            bound = _bound(work, depth)
            q = work.values[depth, Q]
            best = max(best, bound)
            if best > limit or q - bound < HOPELESS * (limit - q) or q - bound < 1e-4 * (limit - bound):
                break
        i, lowest = -1, np.inf
        for a in range(size):
            k = free[a]
            if G[k] < lowest and y[k] < 1 - 1e-12:
                i, lowest = k, G[k]
        if i < 0:
            break
        j, gain, row = -1, 0.0, convex[i]
        for a in range(size):
            k = free[a]
            # Without branches that the processor cannot foresee.
            fall = max(G[k] - lowest, 0.0) if y[k] > 1e-12 else 0.0
            worth = fall * fall / max(own[i] + own[k] - 2 * row[k], 1e-30)
            if worth > gain:
                j, gain = k, worth
        if j < 0:
            best = max(best, _bound(work, depth))
            break
        curvature = own[i] + own[j] - 2 * row[j]
        amount = min(1 - y[i], y[j])
        if 2 * curvature * amount > G[j] - lowest:
            amount = (G[j] - lowest) / (2 * curvature)
        _move(instance, work, depth, i, j, amount)
    return best


@inner_kernel
def _bound(work, depth):  # type: ignore[no-untyped-def]
    """Lower bound at the present point: q + (sum of the r smallest G) − G·y."""
    G, y, free, scratch = work.G[depth], work.y[depth], work.free[depth], work.scratch
    size = work.numbers[depth, SIZE]
    value = work.values[depth, Q]
    for a in range(size):
        k = free[a]
        scratch[a] = G[k]
        value -= G[k] * y[k]
    r = work.numbers[depth, R]
    _partition(scratch, size, r)
    for a in range(r):
        value += scratch[a]
    return value


@inner_kernel
def _partition(values, size, r):  # type: ignore[no-untyped-def]
    """Reorder so that the r smallest of the first `size` values come first (quickselect), 0 < r < size."""
    low, high = 0, size - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while i < high and values[i] < pivot:
                i += 1
            while j > low and values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if r - 1 <= j:
            high = j
        elif r - 1 >= i:
            low = i
        else:
            return


@inner_kernel
def _fix_by_places(instance, work, depth):  # type: ignore[no-untyped-def]
    """Fix every unit whose other value would break the pattern; returns how many, −1 where both values would."""
    n, verdict = len(instance.h), work.verdict
    removed = work.numbers[depth, R]
    for i in range(n):
        removed += work.status[depth, i] == 1
    if not settle(instance.places, instance.order, work.status[depth], n - removed, work.ahead, verdict):
        return -1
    fixed = 0
    for i in range(n):
        if verdict[i] >= 0:
            _fix(instance, work, depth, i, verdict[i])
            fixed += 1
    return fixed


@inner_kernel
def _fix_by_reduced_cost(instance, shared, work, depth):  # type: ignore[no-untyped-def]
    """Fix every unit whose other value would lift the bound above the threshold; returns how many."""
    G, free, scratch = work.G[depth], work.free[depth], work.scratch
    size, r = work.numbers[depth, SIZE], work.numbers[depth, R]
    bound = _bound(work, depth)
    inner, outer = -np.inf, np.inf  # the r-th and (r + 1)-th smallest gradient
    for a in range(r):
        inner = max(inner, scratch[a])
    for a in range(r, size):
        outer = min(outer, scratch[a])
    limit = shared.threshold[0] + shared.margin[0]
    fixed = 0
    for a in range(size):
        k = free[a]
        if G[k] <= inner and bound + outer - G[k] > limit:
            scratch[fixed] = k + 0.25  # stored before G changes: unit, with a flag for the value
            fixed += 1
        elif G[k] >= outer and bound + G[k] - inner > limit:
            scratch[fixed] = -k - 0.25
            fixed += 1
    for a in range(fixed):
        _fix(instance, work, depth, int(abs(scratch[a])), 1 if scratch[a] > 0 else 0)
    return fixed


@inner_kernel
def _fix(instance, work, depth, unit, value):  # type: ignore[no-untyped-def]
    """Fix a free unit, moving the difference of its y onto the others along the steepest pairs."""
    J, y, G, free = instance.J, work.y[depth], work.G[depth], work.free[depth]
    size = work.numbers[depth, SIZE]
    for _ in range(size):
        missing = value - y[unit]
        if abs(missing) < 1e-13:
            break
        other, extreme = -1, 0.0
        for a in range(size):
            k = free[a]
            if k == unit:
                continue
            if value == 1:
                if y[k] > 0 and (other < 0 or G[k] > extreme):
                    other, extreme = k, G[k]
            elif y[k] < 1 and (other < 0 or G[k] < extreme):
                other, extreme = k, G[k]
        if other < 0:
            break
        amount = min(missing, y[other]) if value == 1 else -min(-missing, 1 - y[other])
        _move(instance, work, depth, unit, other, amount)
    y[unit] = value
    work.status[depth, unit] = value
    place = 0
    while free[place] != unit:
        place += 1
    free[place] = free[size - 1]
    work.numbers[depth, SIZE] = size - 1
    if value == 1:
        work.numbers[depth, R] -= 1
        c, row = work.c[depth], J[unit]
        work.values[depth, ENERGY] += c[unit]
        own = c[unit]
        for k in range(len(y)):
            c[k] += 2 * row[k]
        c[unit] = own


@inner_kernel
def _most_weight(instance, work, depth, constraint, r):  # type: ignore[no-untyped-def]
    """Largest weight a constraint can still reach: the fixed units and the r heaviest free ones."""
    total = 0.0
    left = r
    for a in range(len(instance.h)):
        k = instance.by_weight[constraint, a]
        if work.status[depth, k] == 1:
            total += instance.C[constraint, k]
        elif work.status[depth, k] < 0 and left > 0:
            total += instance.C[constraint, k]
            left -= 1
    return total


@inner_kernel
def _leaves(instance, shared, work, pool, depth):  # type: ignore[no-untyped-def]
    """Enumerate the states of a node that may remove none, one, all or all but one of its free units."""
    J, free, c = instance.J, work.free[depth], work.c[depth]
    r, size = work.numbers[depth, R], work.numbers[depth, SIZE]
    energy = work.values[depth, ENERGY]
    others = 1 if r > 1 or r == size else 0
    if others == 1:
        for a in range(size):
            energy += c[free[a]]
            for b in range(a):
                energy += 2 * J[free[a], free[b]]
    if r == 0 or r == size:
        _offer(instance, shared, work, pool, depth, energy, -1, others)
        return
    for a in range(size):
        k = free[a]
        change = c[k]
        if others == 1:
            for b in range(size):
                if b != a:
                    change += 2 * J[k, free[b]]
            change = -change
        _offer(instance, shared, work, pool, depth, energy + change, k, others)


@inner_kernel
def _offer(instance, shared, work, pool, depth, energy, odd, others):  # type: ignore[no-untyped-def]
    """Add the state with every free unit at `others`, except `odd`, if it is wanted and allowed."""
    n = len(instance.h)
    status = work.status[depth]
    full = pool.sizes[0] == len(pool.energies)
    if full and energy >= threshold(pool):
        if energy <= threshold(pool) + shared.margin[1] and not is_known(pool, _key(instance, status, odd, others)):
            work.counters[1] += 1
            if work.counters[1] > TIES_FOLLOWED:  # no further states that only tie are looked for
                shared.margin[0] = -shared.margin[1]
        return
    if energy > shared.threshold[0] + shared.margin[1]:
        return
    for k in range(len(instance.bounds)):
        total = 0.0
        for i in range(n):
            value = status[i] if status[i] >= 0 else (1 - others if i == odd else others)
            total += value * instance.C[k, i]
        if total < instance.bounds[k]:
            return
    kept = 0
    for k in range(instance.places.shape[1]):
        i = instance.order[k]
        value = status[i] if status[i] >= 0 else (1 - others if i == odd else others)
        if not instance.places[value, k, kept]:
            return
        kept += 1 - value
    key = _key(instance, status, odd, others)
    if is_known(pool, key):  # a subtree may be searched again with a better shift
        return
    row = place_state(pool, energy, key)
    for i in range(n):
        pool.masks[row, i] = status[i] if status[i] >= 0 else (1 - others if i == odd else others)
    if pool.sizes[0] == len(pool.energies):
        shared.threshold[0] = min(shared.threshold[0], threshold(pool))


@inner_kernel
def _key(instance, status, odd, others):  # type: ignore[no-untyped-def]
    """Hash of the state with every free unit at `others`, except `odd`."""
    key = EMPTY_STATE
    for i in range(len(status)):
        value = status[i] if status[i] >= 0 else (1 - others if i == odd else others)
        if value == 1:
            key ^= instance.keys[i]
    return key
