"""Block influence and norm ratio against their formulas, token by token in float64, on models cut by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from excise.choosing.brief import Brief
from excise.choosing.criteria import CRITERIA
from excise.errors import InputError
from excise.models.stack import find_stack
from excise.progress import Progress
from tests.contexts import Shown, chosen, context_of
from tests.random_samples import random_samples, traces
from tests.tiny import tiny_model

LAYERS = 6
FLOAT32_NORM = 1e-5  # transformers' RMSNorm computes in float32 even in a float64 model
MODELS = ("llama", "mixtral")


def residual_streams(model, sample):
    """Input of every block and output of the last [blocks + 1, tokens, width], of one unpadded sample."""
    after_the_stack = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: after_the_stack.append(args[0]))
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False, output_hidden_states=True
        )
    handle.remove()
    return torch.cat([*output.hidden_states[:-1], *after_the_stack]).numpy()


def naive_means(model, samples):
    """Mean over tokens of cos(x_in, x_out) and of ‖x_out‖ / ‖x_in‖, of every block."""
    cosines, ratios = [[] for _ in model.model.layers], [[] for _ in model.model.layers]
    for sample in samples:
        streams = residual_streams(model, sample)
        for block in range(len(model.model.layers)):
            for x_in, x_out in zip(streams[block].tolist(), streams[block + 1].tolist(), strict=True):
                norm_in, norm_out = math.hypot(*x_in), math.hypot(*x_out)
                cosines[block].append(math.fsum(a * b for a, b in zip(x_in, x_out, strict=True)) / (norm_in * norm_out))
                ratios[block].append(norm_out / norm_in)
    return np.mean(cosines, axis=1), np.mean(ratios, axis=1)


def without(model, removed):
    """A copy of the model that never had the blocks `removed`."""
    smaller = copy.deepcopy(model)
    kept = [block for i, block in enumerate(smaller.model.layers) if i not in removed]
    smaller.model.layers = torch.nn.ModuleList(kept)
    smaller.config.num_hidden_layers = len(kept)
    return smaller


def uneven_model(model_type, dtype=torch.float64):
    """A model whose blocks differ in strength at random, so that the upper ones are not always the weakest."""
    model = tiny_model(model_type, LAYERS, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.model.layers:
            strength = float(torch.exp(torch.randn((), generator=generator) - 0.7))
            block.self_attn.o_proj.weight.mul_(strength)
            (block.mlp.down_proj.weight if model_type == "llama" else block.mlp.experts.down_proj).mul_(strength)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return uneven_model(request.param)


@pytest.fixture(scope="module")
def samples():
    return random_samples((9, 5, 14, 2), seed=5)


def test_one_shot_block_influence(model, samples):
    influence = 1 - naive_means(model, samples)[0]
    selection = chosen(CRITERIA["block-influence"], find_stack(model), samples, 3)
    np.testing.assert_allclose(selection.scores, influence, rtol=FLOAT32_NORM)
    assert selection.removed == tuple(sorted(np.argsort(influence)[:3].tolist()))
    assert selection.cost.forward_tokens == samples.tokens
    assert selection.method == "block-influence"


def test_iterative_block_influence(model, samples):
    alive, order, cost = list(range(LAYERS)), [], 0
    for _round in range(3):
        influence = 1 - naive_means(without(model, order), samples)[0]
        cost += samples.tokens * len(alive) / LAYERS
        order.append(alive.pop(int(np.argmin(influence))))
    selection = chosen(CRITERIA["block-influence-iterative"], find_stack(model), samples, 3)
    assert selection.order == tuple(order)
    assert selection.removed == tuple(sorted(order))
    assert selection.cost.forward_tokens == pytest.approx(cost, rel=1e-12)
    np.testing.assert_allclose(selection.scores, 1 - naive_means(model, samples)[0], rtol=FLOAT32_NORM)


def test_iterative_measures_again(samples):
    """On this model the two disagree, so neither can pass for the other."""
    stack = find_stack(uneven_model("llama", dtype=torch.float32))
    one_shot = chosen(CRITERIA["block-influence"], stack, samples, 3).removed
    assert one_shot != chosen(CRITERIA["block-influence-iterative"], stack, samples, 3).removed


def test_prune_and_comp_scores_the_compensated_model(model, samples):
    layers, order = model.model.layers, []
    for _round in range(3):
        streams = {}
        handles = [
            layer.register_forward_hook(
                lambda module, args, output, i=i, to=streams: to.setdefault(i, []).append((args[0][0], output[0]))
            )
            for i, layer in enumerate(layers)
        ]
        with torch.no_grad():
            for sample in samples:
                model(input_ids=torch.tensor(sample.input_ids)[None], use_cache=False)
        for handle in handles:
            handle.remove()
        before, after = ({i: torch.cat([p[k] for p in pairs]) for i, pairs in streams.items()} for k in (0, 1))
        influence = [1 - torch.cosine_similarity(before[i], after[i], dim=-1).mean().item() for i in range(LAYERS)]
        least = min((i for i in range(LAYERS) if i not in order), key=influence.__getitem__)
        factor = (after[least].abs().sum(dim=0) / before[least].abs().sum(dim=0)).mean().item()
        layers[least].forward = lambda x, *args, factor=factor, **kwargs: factor * x
        order.append(least)
    for i in order:
        del layers[i].forward
    selection = chosen(CRITERIA["prune-and-comp"], find_stack(model), samples, 3)
    assert selection.order == tuple(order)
    iterated = chosen(CRITERIA["block-influence-iterative"], find_stack(model), samples, 3)
    assert selection.cost.forward_tokens == pytest.approx(2 * iterated.cost.forward_tokens)


def test_norm_ratio(model, samples):
    ratio = naive_means(model, samples)[1]
    selection = chosen(CRITERIA["norm-ratio"], find_stack(model), samples, 2)
    np.testing.assert_allclose(selection.scores, ratio, rtol=FLOAT32_NORM)
    assert selection.removed == tuple(sorted(np.argsort(ratio)[:2].tolist()))
    assert selection.cost.forward_tokens == samples.tokens


@pytest.mark.parametrize("method", CRITERIA)
@pytest.mark.parametrize("budget", [1, 3, 4])
def test_exactly_the_budget_is_removed_and_protected_blocks_stay(method, budget, samples):
    stack = find_stack(tiny_model("llama", LAYERS))
    before = traces(stack.model)
    for protected in ((), (0, 5), (1, -2)):
        selection = chosen(CRITERIA[method], stack, samples, budget, protected=protected, seed=budget)
        assert len(set(selection.removed)) == budget
        assert list(selection.removed) == sorted(selection.removed)
        assert not set(selection.removed) & {i % LAYERS for i in protected}
        assert selection.method == method
    assert traces(stack.model) == before


@pytest.mark.parametrize("method", CRITERIA)
def test_a_budget_that_does_not_fit_is_refused(method, samples):
    stack = find_stack(tiny_model("llama", LAYERS))
    for budget, protected, most in ((0, (), 5), (7, (), 5), (6, (), 5), (5, (0, 1), 4)):
        with pytest.raises(InputError, match=rf"between 1 and {most}: 6 blocks.*got {budget}"):
            CRITERIA[method](context_of(stack), samples, Brief(budget, protected))


@pytest.mark.parametrize("method", ["block-influence", "block-influence-iterative", "norm-ratio"])
def test_progress_adds_up_to_the_passes(method, samples):
    stack, shown = find_stack(tiny_model("llama", LAYERS)), Shown()
    chosen(CRITERIA[method], stack, samples, 3, progress=Progress(shown))
    passes = 3 if method.endswith("iterative") else 1
    assert (sum(shown.announced), sum(shown.done)) == (passes * samples.tokens, passes * samples.tokens)


@pytest.mark.parametrize("method", ["block-influence", "norm-ratio", "angular-distance"])
def test_a_pass_that_the_store_has_is_not_made_again_and_counts_as_if_it_were(method, samples, tmp_path):
    stack = find_stack(tiny_model("llama", LAYERS))
    first = chosen(CRITERIA[method], stack, samples, 3, folder=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert kept
    assert chosen(CRITERIA[method], stack, samples, 3, folder=tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == kept
