"""LLM-Drop (He et al., What Matters in Transformers?, 2024, arXiv 2406.15786): drop sublayers that turn x least.

Score of a sublayer: mean over tokens of cos(x, x + f(norm x)), where f is the attention or the feed-forward and x the
residual stream it is added to. The highest are dropped in one shot: attention only, feed-forward only, or both ranked
together.

A sublayer method, see `block_pruner`: at a budget of M blocks it removes as many sublayers as M blocks have, whatever
their kind, and is measured with those gates off. Where attention and feed-forward are added side by side (parallel
architectures), x of the feed-forward is taken after the attention, in the order of addition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal, ranking, sublayer_budget, sublayer_proposal
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import ArchitectureError, InputError
from excise.measuring.passes import Rows
from excise.measuring.watched import block_hooks, watched
from excise.models.stack import SCALE, Block, Stack, Sublayer, first

# bfloat16 streams add up to about 1 %; a missing factor shows as tens of per cent.
SUM_TOLERANCE = 0.05


@dataclass(frozen=True)
class LLMDrop:
    """Criterion that removes the sublayers of some kinds that turn the residual stream least.

    Attributes:
        method: its name.
        kinds: kinds of sublayers that may go; empty for every kind, ranked together.

    """

    method: str
    kinds: frozenset[str] = frozenset()

    def __call__(self, context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
        """Choose; raises InputError where there are fewer sublayers of its kinds than the budget wants."""
        stack, blocks = context.stack, brief.candidates(context.stack)
        fits = [not self.kinds or sublayer.kind in self.kinds for sublayer in stack.sublayers]
        gates = [s.gate for s, fit in zip(stack.sublayers, fits, strict=True) if fit and s.block in blocks]
        count = sublayer_budget(stack, brief.budget)
        if count > len(gates):
            raise InputError(
                f"{self.method} would have to remove {count} sublayers for a budget of {brief.budget} blocks, and only "
                f"{len(gates)} of its kind may go; lower the budget, or use llm-drop-joint"
            )
        cosines = sublayer_cosines(context, samples)
        order, scores = ranking(-cosines, count, gates), tuple(map(float, cosines))
        return [sublayer_proposal(self.method, stack, order, scores, Cost(float(samples.tokens)))]


attention = LLMDrop("llm-drop-attention", frozenset({"attention"}))
feed_forward = LLMDrop("llm-drop-feed-forward", frozenset({"feed-forward", "moe"}))
joint = LLMDrop("llm-drop-joint")


def sublayer_cosines(context: Context, samples: Samples) -> np.ndarray:
    """Mean over tokens of cos(x, x + f(norm x)) of every sublayer [gates], in one pass.

    Raises:
        ArchitectureError: a block's output is not its input plus what its sublayers give.

    """
    stack = context.stack
    rows = watched(context, samples, "sublayer cosines", {}, lambda batch: _Cosines.of(stack, batch))
    return rows["cosines"].sum(axis=0) / samples.tokens


@dataclass(frozen=True, eq=False)
class _Cosines:
    """Sums [batch, gates] of cosines over the real tokens of each sample."""

    stack: Stack
    batch: Batch
    sums: np.ndarray
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(stack: Stack, batch: Batch) -> _Cosines:
        return _Cosines(stack, batch, np.zeros((len(batch.indices), len(stack.sublayers))))

    @contextlib.contextmanager
    def at(self, blocks: Sequence[Block]) -> Iterator[None]:
        sublayers = [sublayer for block in blocks for sublayer in block.sublayers]
        with _kept_outputs(sublayers, self.outputs), block_hooks(blocks, self._record):
            yield

    def rows(self) -> Rows:
        return {"cosines": self.sums}

    def _record(self, block: int, x_in: Tensor, x_out: Tensor) -> None:
        real = self.batch.real.to(x_in.device)
        # Granite scales what it adds.
        factor = getattr(self.stack.config, "residual_multiplier", 1.0)
        x = x_in.double()
        for sublayer in self.stack.blocks[block].sublayers:
            added = sublayer.share * self.outputs.pop(sublayer.gate).reshape(x_in.shape).double()
            after = x + (added if sublayer.kind == SCALE else factor * added)
            cosines = torch.nn.functional.cosine_similarity(x, after, dim=-1)
            self.sums[:, sublayer.gate] = cosines.where(real, 0.0).sum(dim=-1).cpu().numpy()
            x = after
        end = x_out[real].double()
        # Padding is left out: what stands there is nobody's business and may be anything.
        if (x[real] - end).norm() > SUM_TOLERANCE * end.norm():
            raise ArchitectureError(
                f"block {block} of this {self.stack.model.config.model_type} is not its input plus the outputs of its "
                f"sublayers, so LLM-Drop's cosines cannot be taken; choose a criterion over whole blocks"
            )


@contextlib.contextmanager
def _kept_outputs(sublayers: Sequence[Sublayer], outputs: dict[int, Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, gate: int) -> None:
        outputs[gate] = first(output)

    handles = [s.module.register_forward_hook(partial(hook, gate=s.gate)) for s in sublayers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
