"""Branch-and-bound: the exact K lowest states of any symmetric J, with a proof, a bound and a gap.

Tabu search gives the threshold T (the K-th lowest energy it saw); the tree search then starts with an empty list and
must find every state at or below T by itself. It never meets a state twice, so its finished list is the proof.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count as counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from excise.ising.problem import Problem, Reduced
from excise.ising.solvers.base import Deadline, make_spectrum, removed_sets
from excise.ising.solvers.bound import Shift, best_shift
from excise.ising.solvers.frontier import Frontier, OpenNodes, identity_of
from excise.ising.solvers.kernels import Pool, contents, new_pool, random_state, zobrist
from excise.ising.solvers.nodes import Node
from excise.ising.solvers.tabu import search as tabu_search
from excise.ising.solvers.tree import TIES_FOLLOWED, Instance, Shared, Work, explore, new_work
from excise.ising.solvers.triangles import Triangles, no_triangles
from excise.ising.spectrum import Spectrum

FIRST_NODES = 6000  # with one shift for all depths, before the table of shifts is computed
NODES_PER_CALL = 1000
TABLE_NODES = 60_000  # with the table of shifts, before nodes are bounded one by one where that is far from the end:
FAR = 1.45  # where the gap still open is so many times the one that the root's own shift leaves
STAGE = 0.2  # of the way from the bound to the threshold; see TreeSearch._level
CAPACITY = 4000
SMALLEST_TAIL = 8
LEAST_RESTARTS = 20


Removed = tuple[int, ...]


@dataclass(frozen=True)
class BranchAndBound:
    """Depth-first search in best-first order of open subtrees, on all cores.

    Args:
        restarts: Tabu starts for each number of removed units; more only help where the threshold is not yet right.
        threads: Search threads; 0 for one per core.

    """

    restarts: int = 100
    threads: int = 0
    name: str = "branch-and-bound"

    def solve(self, problem: Problem, states: int = 20, *, seed: int = 0, time_limit: float | None = None) -> Spectrum:
        """Return the `states` lowest states, certified.

        Out of time, or interrupted, it returns the lowest states known with the bound proved so far, and says so.
        """
        return self.proceed(problem, states, None, seed=seed, time_limit=time_limit)[0]

    def proceed(
        self,
        problem: Problem,
        states: int,
        frontier: Frontier | None,
        *,
        seed: int = 0,
        time_limit: float | None = None,
    ) -> tuple[Spectrum, Frontier | None]:
        """Solve as `solve` does, from where a search stood; also where it stands now, None where nothing is open.

        Raises:
            InputError: the search was of another problem.

        """
        run = Run(problem, states, Deadline.after(time_limit), self.threads or os.cpu_count() or 1, seed)
        if frontier is not None:
            run.resume(frontier)
        try:
            run.find_threshold(self.restarts)
            run.prove()
        except KeyboardInterrupt:
            run.interrupted = True
        return run.spectrum(self.name), run.frontier()


class Run:
    """One call of solve: the problem's numbers of removed units one after another, with one threshold."""

    def __init__(self, problem: Problem, states: int, deadline: Deadline, threads: int, seed: int) -> None:
        self.started = time.perf_counter()
        self.problem, self.states, self.deadline, self.threads, self.seed = problem, states, deadline, threads, seed
        self.wanted = min(states, problem.number_of_states())
        self.met: set[Removed] = set()  # states met by the tree searches, which start from nothing
        self.energies: dict[Removed, float] = {}  # of every state known, by tabu search too
        self.threshold = math.inf
        self.open_bounds = dict.fromkeys(problem.counts(), -math.inf)  # number removed → bound of what is unexplored
        self.nodes = self.ties = 0
        self.interrupted = False
        self.left: dict[int, OpenNodes] = {}  # number removed → what is still to be searched
        self.shift: Shift | None = None  # the last one computed; valid for every number removed

    def resume(self, frontier: Frontier) -> None:
        """Go on from where a search of the same problem stood."""
        frontier.check(self.problem, self.states)
        self.nodes, self.left = frontier.visited, dict(frontier.nodes)
        self.open_bounds = {
            count: float(nodes.bounds.min()) + self.problem.reduced(count).constant
            for count, nodes in self.left.items()
        }
        self.met = set(frontier.met)
        self._lower_threshold(set(frontier.known))

    def frontier(self) -> Frontier | None:
        """Where the search stands; None where nothing is open."""
        if not self.open_bounds:
            return None
        unsearched = OpenNodes(np.array([-np.inf]), np.full((1, len(self.problem.free)), -1, dtype=np.int8))
        known = sorted(self.energies, key=lambda removed: (removed not in self.met, self.energies[removed], removed))
        return Frontier(
            identity_of(self.problem, self.states),
            {count: self.left.get(count, unsearched) for count in self.open_bounds},
            tuple(known),
            frozenset(self.met),
            self.nodes,
        )

    def find_threshold(self, restarts: int, starts: Iterable[Sequence[int]] = ()) -> None:
        """Tabu search; `starts` are states over the free units to start from, for a problem with a budget."""
        pool = new_pool(self.wanted, len(self.problem.free))
        random = random_state(self.seed)
        counts = self.problem.counts()
        restarts = min(restarts, max(LEAST_RESTARTS, restarts // len(counts)))
        for count in counts:
            tabu_search(self.problem.reduced(count), pool, random, restarts, 2, self.deadline, starts)
        self.low_masks = contents(pool)[1]
        self._lower_threshold(set(removed_sets(self.problem, self.low_masks)))

    def prove(self) -> None:
        """Search the tree of every number of removed units; what stays unexplored is left in `open_bounds`."""
        for count in list(self.open_bounds):
            search = TreeSearch(self.problem.reduced(count), self.wanted, self.threshold, self.threads)
            try:
                if self.shift is None or not search.ends_at_root(self.shift):
                    self.shift = search.prepare(self._typical(count), self.shift)
                    if count in self.left:
                        search.reopen(self.left[count])
                    search.run(self.deadline)
            finally:
                self.left[count] = search.open_nodes()
                self.open_bounds[count] = search.open_bound() + search.reduced.constant
                if self.open_bounds[count] == math.inf:
                    self.open_bounds.pop(count)
                found = set(removed_sets(self.problem, search.masks()))
                self.met |= found
                self._lower_threshold(found)
                self.nodes += search.nodes
                self.ties += search.ties

    def _lower_threshold(self, states: set[Removed]) -> None:
        new = [state for state in states if state not in self.energies]
        self.energies.update(zip(new, self.problem.energy.energies(new), strict=True))
        if len(self.energies) >= self.wanted:
            self.threshold = sorted(self.energies.values())[self.wanted - 1]

    def _typical(self, count: int) -> NDArray[np.float64]:
        """How often the known low states of this size remove each free unit, [n]."""
        r, n = count - len(self.problem.forced), self.low_masks.shape[1]
        same_size = self.low_masks[self.low_masks.sum(axis=1) == r]
        return same_size.mean(axis=0) if len(same_size) else np.full(n, r / n)

    def spectrum(self, name: str) -> Spectrum:
        """What is known now, with the proof or the bound reached."""
        notes = []
        finished = not self.open_bounds and not self.interrupted
        certified = finished and (len(self.met) >= self.wanted or self.threshold == math.inf)
        if finished and not certified:
            notes.append("the search ended with fewer states than it must have met: rounding is too coarse here")
        if self.ties:
            notes.append("other states tie with the last one within rounding; which of them are listed is arbitrary")
        result = make_spectrum(
            self.problem,
            sorted(self.energies, key=lambda removed: (self.energies[removed], removed))[: self.states],
            self.states,
            solver=name,
            seconds=time.perf_counter() - self.started,
            evaluated=self.nodes,
            seed=self.seed,
            notes=tuple(notes),
        )
        if certified:
            return replace(result.with_proof(), complete=len(result) < self.states)
        if not len(result):
            return result
        why = "interrupted" if self.interrupted else "time limit reached"
        ground = result[0].energy
        bound = min([ground, *self.open_bounds.values()])
        gap = (ground - bound) / abs(ground) if math.isfinite(bound) and ground != 0 else None
        proved = sum(1 for state in result if state.energy <= bound)
        return replace(
            result,
            lower_bound=bound if math.isfinite(bound) else None,
            gap=gap,
            proved=proved,
            notes=(*result.notes, f"{why}: the list is the best known, {proved} of its states proved"),
        )


class Open(NamedTuple):
    """A node that is still to be searched; the lowest bound is taken first."""

    bound: float
    number: int
    status: NDArray[np.int8]
    instance: Instance  # with the bound to search it with
    own: bool = False  # whether that was made for this very node
    cuts: Triangles = no_triangles()  # to begin with where it is bounded by itself


class TreeSearch:
    """The proof for one reduced problem: every state at or below a threshold, found from an empty list.

    Attributes:
        tried_nodes: searched below a node with a shift from above, before the node is bounded by itself.
        own_nodes: searched below a node under its own function.
        own_gap: share of the root's gap from which on a node's own function suffices to search it.
        fewest_units: free units for which a node is bounded by itself.

    """

    tried_nodes = 150
    own_nodes = 3000
    own_gap = 0.2
    fewest_units = 20

    def __init__(self, reduced: Reduced, wanted: int, threshold: float, threads: int) -> None:
        n = len(reduced.h)
        self.reduced, self.threads = reduced, threads
        self.order = np.argsort(-np.diag(reduced.J), kind="stable")
        order = self.order
        tables = 1 + len(_table_depths(n))
        C = np.ascontiguousarray(reduced.C[:, order])
        J = np.ascontiguousarray(reduced.J[np.ix_(order, order)])
        h = np.ascontiguousarray(reduced.h[order])
        self.instance = Instance(
            J=J,
            h=h,
            C=C,
            bounds=reduced.bounds,
            by_weight=np.argsort(-C, axis=1, kind="stable"),
            convex=J,
            linear=h,
            tilt=np.zeros(n),
            offset=np.zeros(1),
            shifts=np.zeros((tables, n)),
            which=np.zeros(n + 1, dtype=np.int64),
            keys=zobrist(n),
            places=reduced.places,
            order=np.argsort(order),
        )
        limit = threshold - reduced.constant
        scale = float(np.abs(reduced.J).sum() + np.abs(reduced.h).sum())
        eps = max(1e-13 * scale, 1e-9 * abs(limit) if math.isfinite(limit) else 0.0) or 1.0  # or: all energies are 0
        self.shared = Shared(np.array([limit]), np.array([eps, eps]), np.zeros(1, dtype=np.int64))
        self.pools: list[Pool] = [new_pool(wanted, n) for _ in range(threads)]
        self.works: list[Work] = [new_work(n, CAPACITY) for _ in range(threads)]
        self.tie_break = counter()
        self.queue: list[Open] = []
        self._put(-np.inf, np.full(n, -1, np.int8), self.instance)
        self.in_flight: dict[int, Open] = {}
        self.changed = threading.Condition()
        self.staged = self.one_by_one = self.reopened = False

    @property
    def nodes(self) -> int:
        """Nodes visited so far."""
        return sum(int(work.counters[0]) for work in self.works)

    @property
    def ties(self) -> int:
        """States met that tie with the last one listed."""
        return sum(int(work.counters[1]) for work in self.works)

    def masks(self) -> NDArray[np.uint8]:
        """States found, over the free units in their own order, [states, n]."""
        ordered = np.concatenate([contents(pool)[1] for pool in self.pools])
        masks = np.empty_like(ordered)
        masks[:, self.order] = ordered
        return masks

    def open_bound(self) -> float:
        """Lower bound of everything not yet explored, without the constant; infinite when nothing is left."""
        return min((node.bound for node in self._open()), default=math.inf) - self.shared.margin[1]

    def open_nodes(self) -> OpenNodes:
        """Everything not yet explored, over the free units in their own order."""
        nodes = self._open()
        statuses = np.empty((len(nodes), len(self.order)), dtype=np.int8)
        for status, node in zip(statuses, nodes, strict=True):
            status[self.order] = node.status
        # The margin is this search's own, as its scale is.
        bounds = np.array([node.bound for node in nodes], dtype=np.float64) - self.shared.margin[1]
        return OpenNodes(bounds, statuses)

    def reopen(self, nodes: OpenNodes) -> None:
        """Search below these nodes, and nothing else."""
        self.queue, self.reopened = [], True
        for bound, status in zip(nodes.bounds.tolist(), nodes.statuses, strict=True):
            self._put(bound, status[self.order], self.instance)

    def _open(self) -> list[Open]:
        return [*self.queue, *self.in_flight.values()]

    def ends_at_root(self, shift: Shift) -> bool:
        """Whether the bound with a shift from another number of removed units already rules out every state."""
        if self._is_trivial():
            return False
        self._install_root(shift)
        self._expand(0, 1)
        return not self.queue

    def prepare(self, typical: NDArray[np.float64], start: Shift | None = None) -> Shift | None:
        """Compute the shift of the whole problem.

        Args:
            typical: How often low states remove each unit, [n].
            start: A shift of the same J to start from, as another number of removed units has.

        """
        self.typical = typical[self.order]
        self._restart(-np.inf)
        if self._is_trivial():
            return start
        reduced, limit = self.reduced, float(self.shared.threshold[0])
        coarse = 1e-4 * float(np.abs(reduced.h).sum() + np.abs(reduced.J).sum())
        tolerance = max(1e-2 * abs(limit), 1e-12 * coarse) if math.isfinite(limit) else coarse
        self.tolerance = tolerance
        self._compute_root(tolerance, None if start is None else (start.u, start.y))
        return self.root

    def _compute_root(
        self, tolerance: float, start: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    ) -> None:
        instance = self.instance
        count = self.reduced.count
        self.root = best_shift(instance.J, instance.h, count, tolerance, instance.C, instance.bounds, start)
        self._install_root(self.root)

    def run(self, deadline: Deadline) -> None:
        """Search until nothing is open or the deadline has come.

        The first nodes use one shift for all depths; only if that does not end it, shifts for the depths are computed.
        """
        self._in_parallel(self._search, deadline, budget=FIRST_NODES)
        if (
            self.queue and self.ties > TIES_FOLLOWED
        ):  # states that only tie are now pruned, where the bound is this close
            self._compute_root(tolerance=float(self.shared.margin[1]) / 4)
        elif self.queue:
            self._in_parallel(self._fill_tables, deadline)
        if self.queue:
            self._in_parallel(self._search, deadline, budget=TABLE_NODES)
        if self.queue and not deadline.passed():
            gap = float(self.shared.threshold[0]) - self.open_bound()
            if FAR * self.root_gap < gap < math.inf:
                # From the root, where a node by itself is worth more; what another search left is deep already.
                if not self.reopened:
                    self._restart(min(node.bound for node in self.queue))
                # Stages cost up to twice the time, which pays where time is likely to run out.
                self.one_by_one, self.staged = True, deadline.limited
            # The threads are the search's own: with BLAS's besides, relaxations take turns and half of them get done.
            with threadpool_limits(1, user_api="blas") if self.one_by_one else nullcontext():
                self._in_parallel(self._search, deadline)

    def _in_parallel(self, job: Callable[[int], None], deadline: Deadline, budget: int | None = None) -> None:
        """Run `job` in every thread until done, the deadline, the node budget or an interrupt."""
        if deadline.passed():
            return
        self.shared.stop[0] = 0
        self.budget = math.inf if budget is None else self.nodes + budget
        failures: list[BaseException] = []

        def attempt(thread: int) -> None:
            try:
                job(thread)
            except BaseException as failure:  # raised below, in the thread that waits
                # What it held stays open, and the other threads must not wait for it.
                self.shared.stop[0] = 1
                failures.append(failure)

        helpers = [threading.Thread(target=attempt, args=(k,), daemon=True) for k in range(self.threads)]
        for helper in helpers:
            helper.start()
        try:
            for helper in helpers:
                while helper.is_alive():
                    if deadline.passed():
                        self.shared.stop[0] = 1
                    helper.join(0.02)
        finally:
            self.shared.stop[0] = 1
            for helper in helpers:
                helper.join()
        if failures:
            raise failures[0]

    @property
    def root_gap(self) -> float:
        """How far the threshold lies above the root's bound."""
        return float(self.shared.threshold[0]) - self.root.value

    def _is_trivial(self) -> bool:
        n, r = len(self.order), self.reduced.count
        return n < 4 or r <= 1 or n - r <= 1

    def _install_root(self, shift: Shift) -> None:
        self.instance.shifts[0] = shift.u
        self.instance.tilt[:] = -self.instance.C.T @ shift.multipliers
        self.instance.offset[0] = shift.multipliers @ self.instance.bounds

    def _search(self, thread: int) -> None:
        while self.shared.stop[0] == 0 and self.nodes < self.budget:
            with self.changed:
                if not self.queue:
                    if not self.in_flight:
                        return
                    self.changed.wait(0.02)
                    continue
            self._expand(thread, NODES_PER_CALL)

    def _expand(self, thread: int, nodes: int) -> None:
        """Take the open node with the lowest bound and search below it."""
        with self.changed:
            if not self.queue:
                return
            node = heapq.heappop(self.queue)
            self.in_flight[thread] = node
        open_nodes = self._bounded(thread, node) if self.one_by_one else self._explored(thread, node, nodes)
        with self.changed:
            for below in open_nodes:
                heapq.heappush(self.queue, below)
            del self.in_flight[thread]
            self.changed.notify_all()

    def _put(self, bound: float, status: NDArray[np.int8], instance: Instance) -> None:
        heapq.heappush(self.queue, Open(bound, next(self.tie_break), status, instance))

    def _restart(self, bound: float) -> None:
        """Leave the whole problem open and nothing else; states that were met stay met."""
        self.queue = []
        self._put(bound, np.full(len(self.order), -1, np.int8), self.instance)

    def _explored(self, thread: int, node: Open, nodes: int, level: float | None = None) -> list[Open]:
        """Search below a node; what is left open."""
        work = self.works[thread]
        level = self._level(node.bound) if level is None else level
        handed = explore(
            node.instance,
            self.shared,
            work,
            self.pools[thread],
            node.status,
            self.reduced.count,
            node.bound,
            level,
            nodes,
        )
        return [
            node._replace(
                bound=float(work.open_bounds[k]),
                number=next(self.tie_break),
                status=work.open_status[k].copy(),
                own=False,
            )
            for k in range(handed)
        ]

    def _bounded(self, thread: int, node: Open) -> list[Open]:
        """Search below a node where a short search ends it, else give it a function of its own, or split it."""
        left = self._explored(thread, node, self.own_nodes if node.own else self.tried_nodes, math.inf)
        problem = Node.of(self.instance, node.status, self.reduced.count)
        n, count = len(problem.free), problem.count
        stopped = self.shared.stop[0] != 0
        if stopped or node.own or not left or n < self.fewest_units or not 2 <= count <= n - 2:
            return left
        limit = float(self.shared.threshold[0] + self.shared.margin[0])
        enough = self.own_gap * self.root_gap
        tight = problem.tighten(node.cuts.among(problem.free, len(node.status)), limit, enough, self.tolerance)
        if tight.bound > limit:
            return []
        below = node._replace(
            bound=max(node.bound, tight.bound),
            instance=problem.under(tight.minorant, self.instance),
            cuts=tight.cuts if len(tight.cuts) else node.cuts,
        )
        if limit - tight.bound < enough:
            return [below._replace(own=True)]
        status = node.status.copy()
        decided = tight.verdict >= 0
        status[problem.free[decided]] = tight.verdict[decided]
        if decided.all():
            return [below._replace(status=status)]
        halves = []
        for value_of_first in (0, 1):
            half = status.copy()
            half[np.flatnonzero(status < 0)[0]] = value_of_first
            halves.append(below._replace(status=half, number=next(self.tie_break)))
        return halves

    def _level(self, bound: float) -> float:
        """Bound up to which a subtree is searched now: all of it, or in stages the lowest part first."""
        threshold = float(self.shared.threshold[0])
        if not self.staged or not math.isfinite(bound) or threshold - bound < 0.03 * abs(threshold):
            return math.inf
        return bound + STAGE * (threshold - bound)

    def _fill_tables(self, thread: int) -> None:
        """Compute shifts for the units left at greater depths, every `threads`-th of them, each from the one before."""
        instance = self.instance
        u, y, start = self.root.u, self.root.y, 0
        linear = instance.h + instance.tilt
        tolerance = 0.02 * abs(float(self.shared.threshold[0]) - self.root.value)
        depths = _table_depths(len(self.order))
        for table in range(thread, len(depths), self.threads):
            if self.shared.stop[0] != 0:
                return
            p = depths[table]
            tail = linear[p:] + 2 * instance.J[p:, :p] @ self.typical[:p]
            count = float(np.clip(self.typical[p:].sum(), 1, len(tail) - 1))
            u, y = u[p - start :], y[p - start :]
            shift = best_shift(instance.J[p:, p:], tail, count, tolerance, start=(u, y))
            u, y, start = shift.u, shift.y, p
            instance.shifts[table + 1, p:] = shift.u
            until = depths[table + 1] if table + 1 < len(depths) else len(self.order) + 1
            instance.which[p:until] = table + 1


def _table_depths(n: int) -> range:
    step = max(2, n // 12)
    return range(step, max(step, n - SMALLEST_TAIL), step)
