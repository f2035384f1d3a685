"""The example that trains the small hybrid: what it reads, what it keeps apart, and that it goes on if interrupted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from examples.train_hybrid import (
    BALANCE_RATE,
    Plan,
    _balance,
    configuration,
    library_prose,
    new_model,
    starter_chats,
    token_stream,
    train,
    train_tokenizer,
    windows,
)

TEXTS = [f"Return the number {n} of things, or raise an error if there are none of them." for n in range(40)]
PLAN = Plan(steps=4, batch=2, tokens=16, warmup=2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return token_stream(TEXTS, tokenizer, seed=0)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tokenizer, ids, tmp_path):
    whole, halves, again = (new_model(configuration(tokenizer), seed=0) for _ in range(3))
    curve, _ = train(whole, ids, PLAN, tmp_path / "whole.pt")
    train(halves, ids, PLAN, tmp_path / "state.pt", until=2)
    resumed, _ = train(again, ids, PLAN, tmp_path / "state.pt")
    assert resumed == curve
    assert len(curve) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    before = new_model(configuration(tokenizer), seed=0).state_dict()
    frozen = [name for name, weight in whole.state_dict().items() if torch.equal(weight, before[name])]
    assert frozen == []


def test_a_state_of_another_plan_is_not_taken_up(tokenizer, ids, tmp_path):
    train(new_model(configuration(tokenizer), seed=0), ids, PLAN, tmp_path / "state.pt", until=1)
    other = Plan(steps=1, batch=2, tokens=16, warmup=2, seed=1)
    curve, _ = train(new_model(configuration(tokenizer), seed=1), ids, other, tmp_path / "state.pt")
    fresh, _ = train(new_model(configuration(tokenizer), seed=1), ids, other, tmp_path / "fresh.pt")
    assert curve == fresh


def test_an_epoch_has_every_window_once():
    numbers = np.arange(20 * PLAN.tokens + 5)
    first, second = ([windows(numbers, PLAN, step + start) for step in range(10)] for start in (0, 10))
    for epoch in (first, second):
        assert all(batch.shape == (PLAN.batch, PLAN.tokens) for batch in epoch)
        rows = sorted(torch.cat(epoch).tolist())
        assert rows == numbers[: 20 * PLAN.tokens].reshape(20, PLAN.tokens).tolist()
    assert not torch.equal(first[0], second[0])


def test_documents_are_ended_and_survive(tokenizer, ids):
    documents = tokenizer.decode(ids).split(tokenizer.eos_token)
    assert documents.pop() == ""
    assert sorted(documents) == sorted(TEXTS)


def test_what_is_kept_apart_is_not_trained_on(tmp_path):
    for n in range(100):
        (tmp_path / f"module{n}.py").write_text(f'"""{TEXTS[n % 40]} {"Prose " * 8}{n}."""\n')
    (tmp_path / "copy.py").write_text((tmp_path / "module3.py").read_text())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text(f'"""{"Not prose " * 10}"""\n')
    kept, apart = library_prose(tmp_path)
    own = [text for text in kept + apart if "Prose Prose" in text]
    assert len(own) == len(set(own)) == 100
    assert not set(kept) & set(apart)
    assert 1 <= len(apart) <= 0.15 * len(kept)
    assert not any("Not prose" in text for text in kept + apart)
    chats, chats_apart = starter_chats()
    assert (len(chats), len(chats_apart)) == (224, 32)
    assert not set(chats) & set(chats_apart)


def test_experts_that_few_choose_are_favoured():
    router = SimpleNamespace(num_experts=3, e_score_correction_bias=torch.zeros(3))
    _balance(router, None, (None, None, torch.tensor([[0, 1], [0, 2]])))
    np.testing.assert_allclose(router.e_score_correction_bias, [-BALANCE_RATE, BALANCE_RATE, BALANCE_RATE])
