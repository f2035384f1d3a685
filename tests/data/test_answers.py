"""Samples in the model's own words: prompts continued by the model, each of them once."""

import json

import pytest
import torch

from excise.data import load_samples, own_answers
from excise.data.sources import local_places
from excise.errors import InputError
from excise.models.loading import Loaded
from excise.models.stack import find_stack
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path / "cache"))
    return Loaded.of(find_stack(tiny_model("llama", 3)), tiny_tokenizer())


@pytest.fixture
def asked(loaded, monkeypatch):
    """Grows by one with every prompt that the model continues."""
    prompts, generate = [], loaded.stack.model.generate

    def watched(ids, **options):
        prompts.append(ids)
        return generate(ids, **options)

    monkeypatch.setattr(loaded.stack.model, "generate", watched)
    return prompts


def draw(loaded, data="self", **options):
    return load_samples(
        data, loaded.tokenizer, **{"samples": 6, "tokens": 96, "seed": 3, **options}, own=own_answers(loaded)
    )


def test_answers_are_the_models_and_asked_for_once(loaded, asked):
    first = draw(loaded)
    assert len(asked) >= len(first) > 0
    before = len(asked)
    again = draw(loaded)
    assert again.hash == first.hash
    assert len(asked) == before
    assert {sample.category for sample in first} <= {
        sample.category for sample in load_samples("starter", loaded.tokenizer)
    }
    assert first.provenance["answers"] == "own"


def test_each_sample_is_what_the_model_says_to_its_prompt(loaded, asked, tmp_path):
    rows = [
        {"prompt": "Two and two?", "response": "Twenty-two."},
        {"text": "Once upon a time there was a very long story"},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = draw(loaded, f"self={tmp_path / 'mine.jsonl'}", tokens=64, loss_on="all")
    assert local_places(f"self={tmp_path / 'mine.jsonl'}") == [tmp_path / "mine.jsonl"]
    texts = [loaded.tokenizer.decode(sample.input_ids) for sample in samples]
    assert not any("Twenty-two" in text for text in texts)
    for prompt in asked:
        (sample,) = [s for s in samples if s.input_ids[: prompt.shape[1] - 1].tolist() == prompt[0, :-1].tolist()]
        with torch.no_grad():
            best = loaded.stack.model(input_ids=prompt, use_cache=False).logits[0, -1].argmax().item()
        said = loaded.tokenizer.decode(sample.input_ids[prompt.shape[1] :], skip_special_tokens=True)
        assert said.startswith(loaded.tokenizer.decode([best], skip_special_tokens=True))


def test_another_model_answers_anew(loaded, asked):
    draw(loaded)
    before = len(asked)
    with torch.no_grad():
        loaded.stack.model.lm_head.weight.neg_()
    draw(loaded)
    assert len(asked) > before


def test_it_mixes_with_other_sources_and_needs_a_model(loaded):
    mixed = draw(loaded, "self:1,starter:1")
    assert [source["share"] for source in mixed.provenance["sources"]] == [0.5, 0.5]
    with pytest.raises(InputError, match="no model to ask here"):
        load_samples("self", loaded.tokenizer)
