"""Measurements of single sublayers, and of the divergence from the intact model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from excise.data.batches import make_batches
from excise.errors import InputError
from excise.measuring.losses import sample_losses
from excise.measuring.measure import measure
from excise.models.stack import find_stack, gated
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import MODEL_TYPES, tiny_model

BATCH_TOKENS = 24
LAYERS = 5


@torch.no_grad()
def gated_sums(stack, batch, off):
    alpha = torch.ones(len(stack.sublayers), dtype=stack.model.dtype)
    alpha[list(off)] = 0
    with gated(stack, alpha):
        return sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).sums.numpy()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sublayers_off_equal_gates_at_zero(model_type):
    model = tiny_model(model_type, LAYERS)
    stack, samples = find_stack(model), random_samples()
    gates = len(stack.sublayers)
    generator = np.random.default_rng(0)
    removals = [tuple(sorted(map(int, generator.permutation(gates)[:k]))) for k in range(gates + 1) for _ in range(2)]
    before = traces(model)
    measured = measure(context_of(stack, batch_tokens=BATCH_TOKENS), samples, removals, sublayers=True)
    assert traces(model) == before
    assert measured.removals == tuple(dict.fromkeys(removals))
    for batch in make_batches(samples, BATCH_TOKENS):
        for off, sums in zip(measured.removals, measured.sums, strict=True):
            np.testing.assert_allclose(sums[list(batch.indices)], gated_sums(stack, batch, off), rtol=1e-4)


def test_whole_blocks_cost_and_give_the_same_as_all_their_sublayers():
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples()
    blocks = [(), (1,), (1, 3), (0, 4)]
    by_block = measure(context_of(stack), samples, blocks)
    by_gate = measure(
        context_of(stack), samples, [[g for b in r for g in (2 * b, 2 * b + 1)] for r in blocks], sublayers=True
    )
    np.testing.assert_array_equal(by_gate.sums, by_block.sums)
    assert by_gate.forward_tokens == by_block.forward_tokens


def test_candidates_share_the_blocks_below_the_one_they_differ_in():
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples((7,))
    ran = []
    for block in stack.blocks:
        block.module.mlp.register_forward_hook(lambda module, args, output: ran.append(1))
    measured = measure(context_of(stack), samples, [(), (8,), (9,), (2,)], sublayers=True)
    assert len(ran) == 5 + 1 + 1 + 4
    assert measured.forward_tokens == pytest.approx(7 * 11 / LAYERS)


def test_gates_outside_the_stack_are_refused():
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples((7,))
    for removal in ((10,), (-1,), (3, 3)):
        with pytest.raises(InputError, match="gate indices must be distinct and between 0 and 9"):
            measure(context_of(stack), samples, [removal], sublayers=True)


def test_divergence_is_zero_without_removal_and_runs_the_intact_model_once():
    stack, samples = find_stack(tiny_model("llama", LAYERS, seed=11)), random_samples(seed=11)
    context = context_of(stack, batch_tokens=BATCH_TOKENS)
    loss = measure(context, samples, [(), (2,)])
    divergence = measure(context, samples, [(), (2,)], statistic="divergence")
    assert divergence.loss() == pytest.approx(0, abs=1e-6)
    assert divergence.loss((2,)) > 0.01
    assert divergence.forward_tokens == loss.forward_tokens
    ran = []
    stack.model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    measure(context, samples, [(3,)], statistic="divergence")
    assert len(ran) == len(make_batches(samples, BATCH_TOKENS))  # for the removal; the intact states are at hand
    again = measure(context_of(stack, batch_tokens=BATCH_TOKENS), samples, [(2,)], statistic="divergence")
    np.testing.assert_array_equal(again.sums[0], divergence.sums[1])
    np.testing.assert_array_equal(divergence.counts, loss.counts)
