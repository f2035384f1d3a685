"""Losses along the trie equal those of one removal at a time, and cost what the trie's nodes cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from excise.data.batches import make_batches
from excise.errors import InputError
from excise.measuring.losses import sample_losses
from excise.measuring.measure import measure
from excise.models.stack import bypass, find_stack
from tests.contexts import context_of
from tests.random_samples import random_samples, traces
from tests.tiny import MODEL_TYPES, tiny_model

BATCH_TOKENS = 24
LAYERS = 6


def random_removals(seed, count=15):
    """Random removals of all sizes, with (), everything, duplicates and neighbours (one block moved) among them."""
    generator = np.random.default_rng(seed)
    removals = [()]
    for _ in range(count):
        size = int(generator.integers(0, LAYERS + 1))
        removals.append(tuple(sorted(map(int, generator.choice(LAYERS, size, replace=False)))))
    removals += [(1, 2), (1, 3), (1, 4), (0,), (LAYERS - 1,), tuple(range(LAYERS)), removals[3], removals[5]]
    generator.shuffle(removals := [list(removal) for removal in removals])
    return [tuple(removal) for removal in removals]


@torch.no_grad()
def one_by_one_sums(stack, samples, removed):
    """Loss sums of single, unpadded samples by the stock forward with blocks bypassed."""
    sums = []
    with bypass(stack, removed):
        for sample in samples:
            logits = stack.model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False).logits[0]
            targets, counted = torch.from_numpy(sample.input_ids[1:]), torch.from_numpy(sample.counted[1:])
            picked = torch.log_softmax(logits, dim=-1)[:-1].gather(1, targets.unsqueeze(1)).squeeze(1)
            sums.append(-picked[counted].sum().item())
    return sums


def nodes(removals):
    """Blocks that a trie over kept blocks computes: distinct beginnings that end in a kept block."""
    masks = {tuple(i in removed for i in range(LAYERS)) for removed in removals}
    return len({mask[: i + 1] for mask in masks for i in range(LAYERS) if not mask[i]})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equal_one_by_one_losses(model_type):
    model = tiny_model(model_type, LAYERS, dtype=torch.float64)
    stack, samples = find_stack(model), random_samples()
    choices = [(), (2,), (2, 3), (1, 4), (1, 3, 4), (0,), (5,), (0, 5), tuple(range(6))]
    removals = list(dict.fromkeys(tuple(i for i in choice if i not in stack.fixed) for choice in choices))
    measured = measure(context_of(stack, batch_tokens=BATCH_TOKENS), samples, removals)
    expected = np.array([one_by_one_sums(stack, samples, removed) for removed in removals])
    np.testing.assert_allclose(measured.sums, expected, rtol=1e-5)
    assert measured.counts.tolist() == [sample.targets for sample in samples]


@pytest.mark.parametrize("seed", range(5))
def test_random_sets_of_removals_equal_bypass_exactly(seed):
    model = tiny_model("gpt2", LAYERS, seed=seed)
    stack, samples = find_stack(model), random_samples(seed=seed)
    removals = random_removals(seed)
    before = traces(model)
    measured = measure(context_of(stack, batch_tokens=BATCH_TOKENS), samples, removals)
    assert traces(model) == before
    assert measured.removals == tuple(dict.fromkeys(removals))
    for batch in make_batches(samples, BATCH_TOKENS):
        for removed, sums in zip(measured.removals, measured.sums, strict=True):
            with torch.no_grad(), bypass(stack, removed):
                expected = sample_losses(stack, stack.hidden(batch.input_ids), batch.labels).sums
            assert sums[list(batch.indices)].tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_forward_tokens_count_the_nodes_of_the_trie(seed):
    stack, samples, removals = find_stack(tiny_model("llama", LAYERS)), random_samples(), random_removals(seed)
    ran = []
    for block in stack.blocks:
        block.module.mlp.register_forward_hook(lambda module, args, output: ran.append(1))
    measured = measure(context_of(stack, batch_tokens=BATCH_TOKENS), samples, removals)
    assert len(ran) == nodes(removals) * len(make_batches(samples, BATCH_TOKENS))
    assert measured.forward_tokens == pytest.approx(nodes(removals) * samples.tokens / LAYERS, rel=1e-12)


def test_every_removal_of_three_blocks():
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples((9, 5))
    removals = list(itertools.combinations(range(LAYERS), 3))
    measured = measure(context_of(stack), samples, removals)
    expected = np.array([one_by_one_sums(stack, samples, removed) for removed in removals])
    np.testing.assert_allclose(measured.sums, expected, rtol=1e-5)
    assert measured.forward_tokens < 0.6 * 20 * 3 / LAYERS * 14 * 2


def test_losses_are_means_over_all_tokens():
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples()
    measured = measure(context_of(stack), samples, [(3, 1), (), (-1,), (1, 3)])
    assert measured.removals == ((1, 3), (), (5,))
    np.testing.assert_allclose(measured.losses, measured.sums.sum(axis=1) / sum(s.targets for s in samples), rtol=1e-12)
    assert measured.loss() == measured.losses[1]
    assert measured.loss([3, 1]) == measured.losses[0]
    with pytest.raises(InputError, match="between 0 and 5"):
        measure(context_of(stack), samples, [(6,)])


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    model = tiny_model("llama", LAYERS)
    stack, samples, removals = find_stack(model), random_samples(), [(), (1,), (1, 2), (4,)]
    whole = measure(context_of(stack, batch_tokens=BATCH_TOKENS), samples, removals)
    before = traces(model)
    calls = []

    def interrupt(tokens):
        calls.append(tokens)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(
            context_of(stack, batch_tokens=BATCH_TOKENS, folder=tmp_path, told=interrupt),
            samples,
            removals,
        )
    assert traces(model) == before
    forwards, advanced = [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    resumed = measure(
        context_of(stack, batch_tokens=BATCH_TOKENS, folder=tmp_path, told=advanced.append),
        samples,
        removals,
    )
    assert len(forwards) == (len(make_batches(samples, BATCH_TOKENS)) - 1) * len(removals)
    assert sum(advanced) == samples.tokens * len(removals)
    np.testing.assert_array_equal(resumed.sums, whole.sums)
    np.testing.assert_array_equal(resumed.counts, whole.counts)
    assert resumed.forward_tokens == whole.forward_tokens
    assert not list(tmp_path.rglob("batch-*"))


def test_what_is_known_is_not_measured_again(tmp_path):
    model = tiny_model("llama", LAYERS)
    stack, samples = find_stack(model), random_samples()
    whole = measure(context_of(stack), samples, [(), (1,), (1, 2), (4,)])
    measure(context_of(stack, folder=tmp_path), samples, [(4,), (1,)])
    forwards, advanced = [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    later = measure(
        context_of(stack, folder=tmp_path, told=advanced.append),
        samples,
        [(), (1,), (1, 2), (4,)],
    )
    assert len(forwards) == 2 * len(make_batches(samples, BATCH_TOKENS * 20))
    assert sum(advanced) == samples.tokens * 4
    np.testing.assert_array_equal(later.sums, whole.sums)
    assert later.costs.tolist() == whole.costs.tolist()  # as if all were measured now
    other = measure(context_of(stack, folder=tmp_path), random_samples(seed=1), [(4,)])  # other samples stand apart
    assert other.losses[0] != later.losses[3]


def test_a_damaged_ledger_is_told_and_measured_again(tmp_path):
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples()
    whole = measure(context_of(stack, folder=tmp_path), samples, [(4,)])
    (part,) = tmp_path.rglob("part-*.safetensors")
    content = part.read_bytes()
    for damaged in (content[:-3], content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], b""):
        part.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged; what it held is worked out again"):
            again = measure(context_of(stack, folder=tmp_path), samples, [(4,)])
        np.testing.assert_array_equal(again.sums, whole.sums)


def test_a_removal_that_overflows_is_reported_as_not_finite():
    model = tiny_model("llama", LAYERS)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    measured = measure(context_of(find_stack(model)), random_samples(), [(), (2,)])
    assert np.isnan(measured.loss())
    assert np.isfinite(measured.loss((2,)))
