"""Perplexity against a naive loop in float64."""

import math

import numpy as np
import pytest
import torch

from excise.data.fit import Fit
from excise.errors import InputError
from excise.evaluation.perplexity import perplexity
from tests.tiny import VOCABULARY, beginning_tokenizer, tiny_model, tiny_tokenizer

TEXT = "A stack of blocks loses a few of them and still speaks. Größe, naïve: 42!\n" * 6


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=3)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def naive_losses(model, ids):
    """Cross-entropy of every token after the first, one at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return [float(torch.logsumexp(logits[t], 0) - logits[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def test_it_is_the_mean_over_windows_that_do_not_overlap(model, text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    windows = [naive_losses(model, ids[start : start + 50]) for start in range(0, len(ids), 50)]
    losses = np.concatenate(windows)
    found = perplexity(model, tokenizer, text, fingerprint="x", window=50)
    assert found.metrics["loss"].value == pytest.approx(losses.mean(), rel=1e-5)
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found.metrics["bits_per_byte"].value == pytest.approx(
        losses.sum() / math.log(2) / len(TEXT.encode()), rel=1e-5
    )
    assert found.details["tokens"] == len(losses)
    assert found.details["windows"] == len(windows)
    sums, counts = np.array([sum(w) for w in windows]), np.array([len(w) for w in windows])
    jackknife = [np.delete(sums, k).sum() / np.delete(counts, k).sum() for k in range(len(sums))]
    expected = math.sqrt((len(sums) - 1) * np.var(jackknife))
    assert found.metrics["loss"].stderr == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("ending", [False, True])
def test_every_window_begins_as_the_tokenizer_begins_a_text(model, text, ending):
    ids = tiny_tokenizer()(TEXT)["input_ids"] + [2] * ending  # what it puts at the end is read there alone
    begun = [[1, *ids[start : start + 49]] for start in range(0, len(ids), 49)]
    losses = [naive_losses(model, window) for window in begun]
    found = perplexity(model, beginning_tokenizer(ending=ending), text, fingerprint="x", window=50)
    assert found.details["windows"] == len(begun)
    assert found.details["tokens"] == len(ids)
    assert found.metrics["loss"].value == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(model, text, encoding):
    plain = perplexity(model, tiny_tokenizer(), text, fingerprint="x")
    text.write_text(TEXT, encoding=encoding)
    marked = perplexity(model, tiny_tokenizer(), text, fingerprint="x")
    assert marked.metrics == plain.metrics
    assert marked.settings == plain.settings


def test_a_text_that_the_model_cannot_take_is_refused_with_its_window(model, text):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    text.write_text(TEXT + "<extra>")
    number = len(tokenizer(TEXT)["input_ids"]) // 50
    with pytest.raises(InputError, match=rf"text\.txt, window {number}: token id 288 is outside"):
        perplexity(model, tokenizer, text, fingerprint="x", window=50, fit=Fit(VOCABULARY))
    text.write_text(TEXT)
    with pytest.raises(InputError, match="window 0: 50 tokens, and the model has learned 40 positions"):
        perplexity(model, tokenizer, text, fingerprint="x", window=50, fit=Fit(VOCABULARY, 40))


def test_windows_are_limited_in_number_and_by_the_models_positions(model, text):
    one = perplexity(model, tiny_tokenizer(), text, fingerprint="x", limit=1)
    assert one.details["window"] == model.config.max_position_embeddings
    assert one.details["windows"] == 1
    assert one.metrics["loss"].stderr is None


def test_no_text_no_perplexity(model, tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.txt", "binary", "absent"):
        with pytest.raises(InputError, match=name):
            perplexity(model, tiny_tokenizer(), tmp_path / name, fingerprint="x")
