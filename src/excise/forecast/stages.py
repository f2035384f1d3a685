"""Memory, reads and time of every stage of the main job, resident and streamed.

Memory is what lies in it at the peak of a stage: weights, activations of the batch in hand, streams that wait, and
what the stage gathers. Time is operations over speed, plus bytes over the speed of the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from excise.choosing.plan import ANCHORS, SHARED, plan
from excise.forecast.shape import Shape
from excise.forecast.speed import Speed
from excise.measuring.distributions import TOP_K
from excise.measuring.divergence import ITEM
from excise.measuring.losses import CHUNK_ELEMENTS
from excise.repair.folds import WIDEST_INPUT
from excise.repair.several import REPAIRED

# Bytes and seconds of Python, PyTorch and transformers, before any weight.
PROGRAM, START = 5.3e8, 7.0
# Logits of the head in hand, their gradient and softmax, float32: three chunks of 16 MiB.
LOGITS = 3 * 4 * CHUNK_ELEMENTS
# Activations a token leaves for the backward pass: those of norms and of the stream, and a block's inner ones.
OF_THE_STREAM, OF_A_BLOCK = 7, 1
# Matrices [inner, inner] in float64 at once: two sums, their total, eigenvectors and what LAPACK works in.
GRAMS = 7
# Of a search's samples, three of five are fitted on.
FITTED = 0.6
# Beside a refinement's passes: fits of repairs, as a share of them; and seconds of the solves of its rounds.
FITS, SOLVES = 0.5, 15.0
# Streams of all samples that wait at branching points of the trie, at a time.
BRANCHES = 6
# Passes over the samples that a repair takes, its own and the original's.
REPAIR_PASSES = 2
# Proposals measured on held-out samples, each a shared pass along the trie.
MEASURED = 24


@dataclass(frozen=True)
class Work:
    """What is asked.

    Attributes:
        removed: number M of blocks.
        calibration: tokens of the calibration samples.
        held_out: tokens of the held-out samples.
        effort: passes over the calibration samples that refinement may cost; 0 leaves it out.
        repair_tokens: tokens a repair is fitted on; 0 leaves it out.
        batch_tokens: tokens that go through the model at once.
        item: bytes of a number in the computation.
        stored: bytes of a number in the files.
        room: bytes that streams may take in memory between blocks, beyond which they wait on disk, and that the
            intact model's distributions may.

    """

    removed: int
    calibration: int
    held_out: int
    effort: float
    repair_tokens: int
    batch_tokens: int
    item: int
    stored: int
    room: float


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the stage.
        memory: bytes at its peak, the program's own among them.
        read: bytes of weights read from the disk.
        seconds: None where no speed is known.

    """

    name: str
    memory: float
    read: float
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """All stages of a job in one placement.

    Attributes:
        placement: "resident" or "streamed".
        stages: in order.

    """

    placement: str
    stages: tuple[Stage, ...]

    @property
    def memory(self) -> float:
        """Bytes at the peak of the whole job."""
        return max(stage.memory for stage in self.stages)

    @property
    def read(self) -> float:
        """Bytes of weights read by all stages."""
        return sum(stage.read for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where no speed is known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None


def forecast(shape: Shape, work: Work, placement: str, speed: Speed | None = None) -> Forecast:
    """What the main job takes.

    Args:
        shape: of the model.
        work: what is asked.
        placement: "resident" or "streamed".
        speed: of this machine; None leaves times out.

    """
    return Forecast(placement, tuple(_Sizes(shape, work, placement == "streamed", speed).stages()))


@dataclass(frozen=True)
class _Sizes:
    """The terms that stages are made of."""

    shape: Shape
    work: Work
    streamed: bool
    speed: Speed | None

    def stages(self) -> Iterator[Stage]:
        """All stages, in order."""
        work = self.work
        # Three passes of a few tokens see whether the model is what its record says.
        yield self._stage("load", 0.0, reads=3 if self.streamed else 1, tokens=0)
        yield self._stage(
            "gradients", self._for_gradients(), reads=2 * self.streamed, tokens=work.calibration, backward=True
        )
        if work.effort:
            yield self._refinement()
        yield self._stage(
            "held-out losses",
            LOGITS + self._streams(work.batch_tokens, 4),
            reads=2 * self.streamed,
            tokens=SHARED * MEASURED * work.held_out,
        )
        if work.repair_tokens:
            passes = REPAIRED * REPAIR_PASSES
            yield self._stage(
                "repair",
                8.0 * GRAMS * min(self.shape.inner, WIDEST_INPUT) ** 2 + self._streams(work.batch_tokens, 4),
                reads=passes * self.streamed,
                tokens=passes * work.repair_tokens,
            )
        # The original's logits, and those of what was written.
        yield self._stage("write and test", LOGITS, reads=4 * self.streamed + 1, tokens=0)

    def _refinement(self) -> Stage:
        work, blocks = self.work, len(self.shape.blocks)
        spent = plan(blocks, work.removed, work.effort * work.calibration, streamed=self.streamed)
        fitted = FITTED * spent.race_tokens[-1]
        judged = spent.race_tokens[-1] - fitted
        kept = self._distributions(judged)
        # K of the dual form: fitted × fitted, its factor, and a row for every token.
        duals = 4.0 * (2 * fitted**2 + fitted * spent.race_tokens[-1])
        memory = LOGITS + kept + duals + self._streams(spent.race_tokens[-1], BRANCHES)
        sweeps = 1 + 1 + spent.rounds + len(spent.race_tokens)
        heads = judged * (blocks + ANCHORS + spent.rounds * spent.batch)
        return self._stage(
            "refinement",
            memory,
            reads=sweeps * self.streamed,
            tokens=(1 + FITS) * work.effort * work.calibration,
            heads=heads,
        )

    def _stage(
        self,
        name: str,
        memory: float,
        *,
        reads: float,
        tokens: float,
        backward: bool = False,
        heads: float | None = None,
    ) -> Stage:
        shape, work, speed = self.shape, self.work, self.speed
        read = float(reads) * work.stored * (sum(shape.blocks) if self.streamed else shape.parameters)
        seconds = None
        if speed is not None:
            # A backward pass runs the head twice; others as often as blocks, unless it is told.
            through_head = (tokens if heads is None else heads) * (2 if backward else 1)
            # Block by block, the way down runs every block forwards again.
            passes = speed.backward + self.streamed if backward else 1.0
            computing = 2.0 * tokens * shape.active_parameters / speed.forward * passes
            heading = 2.0 * through_head * shape.width * shape.vocabulary / speed.head
            seconds = computing + heading + read / speed.read + {"load": START, "refinement": SOLVES}.get(name, 0.0)
        return Stage(name, PROGRAM + self._weights() + memory, read, seconds)

    def _weights(self) -> float:
        shape, work = self.shape, self.work
        # Streamed, what stays is in memory twice: as it is computed with, and in the pages of the files it came from.
        held = 2 * shape.others + max(shape.blocks) if self.streamed else shape.parameters
        return float(held * work.item)

    def _for_gradients(self) -> float:
        shape, work = self.shape, self.work
        of_block = [OF_THE_STREAM * shape.width + OF_A_BLOCK * active // shape.width for active in shape.active]
        kept = max(of_block) if self.streamed else sum(of_block)
        waiting = self._streams(work.calibration, len(shape.blocks) + 1) if self.streamed else 0.0
        waiting = min(waiting, work.room)
        return LOGITS + float(work.batch_tokens * kept * work.item) + waiting

    def _distributions(self, positions: float) -> float:
        """The intact model's: whole, or the most probable tokens and their numbers."""
        whole = ITEM * positions * self.shape.vocabulary
        return whole if whole <= self.work.room else positions * TOP_K * 2 * ITEM

    def _streams(self, tokens: float, count: int) -> float:
        return float(tokens * count * self.shape.width * self.work.item)
