"""Perplexity without a block against models cut by hand; Taylor+ against plain autograd over all weights at once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from excise.choosing.criteria import CRITERIA
from excise.choosing.criteria.shortened_llama import Taylor
from excise.data.batches import default_batch_tokens, make_batches
from excise.errors import ArchitectureError
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import FLOAT32_NORM, MODELS, perplexity, uneven_model, without
from tests.contexts import chosen
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

SAMPLES = random_samples((9, 5, 14), seed=5)
SEVERAL_BATCHES = random_samples(range(120, 60, -5), seed=5)


@pytest.mark.parametrize("model_type", MODELS)
def test_perplexity_without_each_block(model_type):
    model = uneven_model(model_type, 6)
    perplexities = [perplexity(without(model, [i]), SAMPLES) for i in range(6)]
    selection = chosen(CRITERIA["shortened-llama-perplexity"], find_stack(model), SAMPLES, 3)
    np.testing.assert_allclose(selection.scores, perplexities, rtol=FLOAT32_NORM)
    assert selection.removed == tuple(sorted(np.argsort(perplexities)[:3].tolist()))
    assert selection.cost.forward_tokens < 6 * SAMPLES.tokens


def naive_taylor(model, samples):
    """Σ over each block's matrices of Σ |w · ∂L/∂w|, from one backward pass over everything."""
    model = copy.deepcopy(model).requires_grad_(True)
    losses, count = 0, 0
    for sample in samples:
        logits = model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False).logits[0, :-1]
        targets, counted = torch.from_numpy(sample.input_ids[1:]), torch.from_numpy(sample.counted[1:])
        losses = losses - torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets][counted].sum()
        count += int(counted.sum())
    (losses / count).backward()
    return [
        sum((p * p.grad).abs().sum().item() for p in block.parameters() if p.dim() >= 2) for block in model.model.layers
    ]


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("blocks_at_once", [1, 3, 4])
def test_taylor_against_plain_autograd(model_type, blocks_at_once):
    """Over several batches, so that their sum inside the absolute value matters."""
    model, samples = uneven_model(model_type, 10), SEVERAL_BATCHES
    assert len(make_batches(samples, default_batch_tokens(find_stack(model)))) > 1
    scores = naive_taylor(model, samples)
    before = traces(model)
    selection = chosen(Taylor(blocks_at_once), find_stack(model), samples, 2)
    assert traces(model) == before
    assert selection.scores[:4] == (None,) * 4
    assert selection.scores[8:] == (None,) * 2
    np.testing.assert_allclose(selection.scores[4:8], scores[4:8], rtol=10 * FLOAT32_NORM)
    assert selection.removed == tuple(sorted(sorted(range(4, 8), key=lambda i: scores[i])[:2]))
    passes = {1: [4, 5, 6, 7], 3: [4, 7], 4: [4]}[blocks_at_once]
    assert selection.cost.forward_tokens == len(passes) * samples.tokens
    assert selection.cost.backward_tokens == pytest.approx(sum(10 - low for low in passes) * samples.tokens / 10)


def test_short_stacks_say_that_the_ends_go_too():
    model = uneven_model("llama", 8)
    scores = naive_taylor(model, SAMPLES)
    selection = chosen(Taylor(), find_stack(model), SAMPLES, 4)
    ends = sorted((0, 1, 2, 3, 6, 7), key=lambda i: scores[i])[:2]
    assert selection.removed == tuple(sorted([4, 5, *ends]))
    assert str(sorted(ends)) in selection.note
    assert chosen(Taylor(), find_stack(model), SAMPLES, 2).note == ""


def test_quantised_weights_are_refused():
    model = tiny_model("llama", 8)
    weight = model.model.layers[4].mlp.down_proj.weight
    stack = find_stack(model)
    model.model.layers[4].mlp.down_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match="block 4 are quantised"):
        chosen(Taylor(), stack, SAMPLES, 1)
