"""Batches of samples of similar length, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from excise.data.samples import Sample
from excise.models.stack import Stack

IGNORED = -100  # what torch's cross-entropy leaves out
MOST_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
LEAST_BATCH_TOKENS = 128
MEMORY_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side.

    Attributes:
        indices: which samples, in the order of the rows.
        input_ids: [batch, tokens], padded on the right with token 0.
        labels: [batch, tokens], token that each position must predict, `IGNORED` where none counts.
        lengths: [batch], tokens of each sample.

    """

    indices: tuple[int, ...]
    input_ids: Int64[Tensor, "batch tokens"]
    labels: Int64[Tensor, "batch tokens"]
    lengths: Int64[Tensor, " batch"]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> Batch:
        """Move to a device."""
        return Batch(self.indices, self.input_ids.to(device), self.labels.to(device), self.lengths.to(device))

    @property
    def real(self) -> Bool[Tensor, "batch tokens"]:
        """Mask [batch, tokens] of the tokens that are not padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)


def default_batch_tokens(stack: Stack) -> int:
    """Tokens that go through a model at once: enough to keep the device busy, less where memory is short.

    The activations that a gradient pass keeps are estimated from the blocks' sizes and may take a quarter of the
    device's memory. It depends on total memory, not on what is free, so that an interrupted pass finds the same.
    """
    width = stack.model.get_input_embeddings().weight.shape[-1]
    blocks = [block.parameters for block in stack.blocks]
    return batch_tokens_of(stack.device, width, blocks, stack.model.dtype.itemsize)


def batch_tokens_of(device: torch.device, width: int, blocks: Sequence[int], item: int) -> int:
    """The same for a model of which only sizes are known.

    Args:
        device: of the computation.
        width: of the residual stream.
        blocks: parameters of each block.
        item: bytes of a number.

    """
    on_gpu = device.type == "cuda"
    tokens = MOST_BATCH_TOKENS["cuda" if on_gpu else "cpu"]
    memory = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    a_token = sum(12 * width + 2 * parameters // width for parameters in blocks) * item
    while tokens > LEAST_BATCH_TOKENS and tokens * a_token > MEMORY_SHARE * memory:
        tokens //= 2
    return tokens


def make_batches(samples: Sequence[Sample], batch_tokens: int) -> list[Batch]:
    """Group samples by length into batches of at most `batch_tokens` padded tokens (at least one sample each).

    The grouping depends on the lengths alone, so that an interrupted pass meets the same batches again.

    Examples:
        >>> ids = np.arange(6); ones = np.ones(6, dtype=bool)
        >>> samples = [Sample("a", ids[:2], ones[:2]), Sample("b", ids, ones), Sample("c", ids[:3], ones[:3])]
        >>> [batch.indices for batch in make_batches(samples, batch_tokens=8)]
        [(1,), (2, 0)]

    """
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].input_ids), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and len(samples[groups[-1][0]].input_ids) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [pad([samples[i] for i in group], tuple(group)) for group in groups]


def pad(samples: Sequence[Sample], indices: tuple[int, ...]) -> Batch:
    """Put samples side by side; `indices` are theirs."""
    width = max(len(sample.input_ids) for sample in samples)
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    counted = np.zeros((len(samples), width), dtype=bool)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = sample.input_ids
        counted[row, : len(sample.input_ids)] = sample.counted
    ids = torch.from_numpy(input_ids)
    labels = shifted_labels(ids, torch.from_numpy(counted))
    return Batch(indices, ids, labels, torch.tensor([len(sample.input_ids) for sample in samples]))


def shifted_labels(
    input_ids: Int[Tensor, "batch tokens"], counted: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """Labels [batch, tokens] for next-token prediction: position t predicts token t+1 where that token is `counted`."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = torch.where(counted[:, 1:], input_ids[:, 1:], IGNORED)
    return labels


def longest_together(samples: Sequence[Sample], count: int = 4) -> Int[Tensor, "samples tokens"]:
    """Token ids [count, tokens] of the longest samples, cut to one length; without padding, for self-tests."""
    longest = sorted(samples, key=lambda sample: -len(sample.input_ids))[:count]
    width = min(len(sample.input_ids) for sample in longest)
    return torch.tensor(np.stack([sample.input_ids[:width] for sample in longest]))
