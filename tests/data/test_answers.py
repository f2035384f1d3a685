"""Samples in the model's own words: prompts continued by the model, each of them once."""

import json

import pytest
import torch

from excise.data import load_samples, own_answers
from excise.data.rows import Row
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


def test_a_prompt_of_text_leaves_half_of_a_sample_for_what_follows(loaded, tmp_path):
    rows = [{"text": "Once upon a time there was a very long story. " * 20}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for tokens in (64, 20, 3):
        (sample,) = draw(loaded, f"self={tmp_path / 'mine.jsonl'}", tokens=tokens)
        prompt = loaded.tokenizer(rows[0]["text"])["input_ids"][: tokens // 2]
        assert sample.input_ids[: tokens // 2].tolist() == prompt
        assert tokens // 2 < len(sample.input_ids) <= tokens


def test_a_text_file_is_continued_from_each_of_its_windows(loaded, tmp_path):
    (tmp_path / "prose.txt").write_text("".join(f"This is line {i} of a story. " for i in range(60)))
    own, plain = (draw(loaded, f"{how}{tmp_path / 'prose.txt'}", tokens=40) for how in ("self=", ""))
    assert len(own) == 6
    assert [(sample.name, sample.window) for sample in own] == [(sample.name, sample.window) for sample in plain]
    for said, read in zip(own, plain, strict=True):
        # A window may begin within a character that the tokenizer took apart, so texts and not ids are compared.
        texts = [loaded.tokenizer.decode(sample.input_ids) for sample in (said, read)]
        assert texts[0][:10] == texts[1][:10]
        assert texts[0] != texts[1]


def test_only_the_models_own_answers_count_as_responses(loaded, tmp_path):
    turns = [("user", "Two?"), ("assistant", "Two."), ("user", "Four?"), ("assistant", "Five.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}, {"text": "Once upon a time"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="plain text has no responses"):
        (sample,) = draw(loaded, f"self={tmp_path / 'mine.jsonl'}", tokens=160, loss_on="responses")
    before = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns[:3]) + "<|im_start|>assistant\n"
    prompt = loaded.tokenizer(before)["input_ids"]
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert not sample.counted[: len(prompt)].any()
    assert sample.counted[len(prompt) :].all()


def test_sampled_answers_are_those_of_a_seed_and_kept(loaded, asked):
    first = draw(loaded, "self@0.8")
    before = len(asked)
    assert draw(loaded, "self@0.8").hash == first.hash
    assert len(asked) == before
    assert first.provenance["answers"] == "own"
    assert first.provenance["temperature"] == 0.8
    greedy, cold = draw(loaded, "self"), draw(loaded, "self@0")
    assert cold.hash == greedy.hash != first.hash
    assert cold.describe() == greedy.describe()
    assert draw(loaded, "self@0.9").hash != first.hash


def test_other_seeds_and_temperatures_sample_other_answers(loaded, tmp_path):
    row, answer = Row("a:1", text="Once upon a time there was a story"), own_answers(loaded)
    said = {
        how: answer(row, 60, temperature=how[0], seed=how[1]).text for how in ((1.0, 0), (1.0, 1), (0.5, 0), (0.0, 0))
    }
    assert len(set(said.values())) == len(said)
    assert answer(row, 60, temperature=0.0, seed=1).text == said[0.0, 0] == answer(row, 60).text


def test_words_that_are_not_told_right_are_refused(loaded):
    for data in ("self@warm", "self@-1", "self@inf", "self@nan=starter", "self@", "self="):
        with pytest.raises(InputError, match=r"expected 'self', 'self=SOURCE', or either with a temperature"):
            draw(loaded, data)


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
