"""LLM-Drop against its cosine, token by token, on streams caught at the norms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from excise.choosing.criteria import SUBLAYER_CRITERIA
from excise.errors import ArchitectureError, InputError
from excise.models.stack import find_stack
from tests.choosing.criteria.naive import FLOAT32_NORM, uneven_model
from tests.contexts import chosen
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

LAYERS = 6
SAMPLES = random_samples((9, 5, 14, 2), seed=5)


def naive_cosines(model):
    """Mean over tokens of cos(stream before a sublayer, stream after it), attention and feed-forward in turn."""
    cosines = [[] for _ in range(2 * LAYERS)]
    for sample in SAMPLES:
        streams = []
        norms = [n for block in model.model.layers for n in (block.input_layernorm, block.post_attention_layernorm)]
        handles = [
            norm.register_forward_pre_hook(lambda module, args, streams=streams: streams.append(args[0][0].tolist()))
            for norm in (*norms, model.model.norm)
        ]
        with torch.no_grad():
            model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False)
        for handle in handles:
            handle.remove()
        for gate in range(2 * LAYERS):
            for x, y in zip(streams[gate], streams[gate + 1], strict=True):
                product = math.fsum(a * b for a, b in zip(x, y, strict=True))
                cosines[gate].append(product / (math.hypot(*x) * math.hypot(*y)))
    return np.mean(cosines, axis=1)


def highest(cosines, gates, count):
    return tuple(sorted(sorted(gates, key=lambda g: -cosines[g])[:count]))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "granite"])
def test_the_highest_cosines_go(model_type):
    model = uneven_model(model_type, LAYERS, spread=1.5)
    cosines, stack = naive_cosines(model), find_stack(model)
    before = traces(model)
    pools = {
        "llm-drop-attention": range(0, 2 * LAYERS, 2),
        "llm-drop-feed-forward": range(1, 2 * LAYERS, 2),
        "llm-drop-joint": range(2 * LAYERS),
    }
    for method, gates in pools.items():
        selection = chosen(SUBLAYER_CRITERIA[method], stack, SAMPLES, 2)
        np.testing.assert_allclose(selection.scores, cosines, rtol=FLOAT32_NORM)
        assert selection.sublayers == highest(cosines, gates, 4)
        assert selection.removed == tuple(b for b in range(LAYERS) if {2 * b, 2 * b + 1} <= set(selection.sublayers))
        assert selection.method == method
        assert selection.cost.forward_tokens == SAMPLES.tokens
    assert traces(model) == before


def test_too_few_of_a_kind_is_refused():
    stack = find_stack(tiny_model("llama", LAYERS))
    with pytest.raises(InputError, match="8 sublayers for a budget of 4 blocks, and only 6"):
        chosen(SUBLAYER_CRITERIA["llm-drop-attention"], stack, SAMPLES, 4)
    assert len(chosen(SUBLAYER_CRITERIA["llm-drop-joint"], stack, SAMPLES, 4).sublayers) == 8


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox", "gpt2", "qwen3_moe"])
def test_other_ways_of_adding_add_up(model_type):
    selection = chosen(SUBLAYER_CRITERIA["llm-drop-joint"], find_stack(tiny_model(model_type, LAYERS)), SAMPLES, 1)
    assert len(selection.sublayers) == 2


def test_a_block_that_is_not_the_sum_of_its_sublayers_is_refused():
    stack = find_stack(tiny_model("granite", LAYERS))
    stack.model.config.residual_multiplier = 0.1  # the modules were built with another
    with pytest.raises(ArchitectureError, match="not its input plus"):
        chosen(SUBLAYER_CRITERIA["llm-drop-joint"], stack, SAMPLES, 1)
