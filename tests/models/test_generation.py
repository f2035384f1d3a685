"""Several prompts together give what each gives alone, in every architecture; ends and configs are heeded."""

import random

import pytest
import torch

from excise.models.generation import end_tokens, greedy, sampled
from excise.models.stack import find_stack
from tests.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer

LENGTHS, ROOM = (5, 9, 17, 30), 8


def prompts(lengths=LENGTHS):
    draw = random.Random(0)
    return [[draw.randrange(6, 288) for _ in range(length)] for length in lengths]


def naive(model, prompt, room, ends):
    """The most probable token, again and again, without a cache."""
    said = []
    while len(said) < room and not (said and said[-1] in ends):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits[0, -1]
        said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prompts_of_other_lengths_beside_it_change_nothing(model_type):
    stack, tokenizer = find_stack(tiny_model(model_type)), tiny_tokenizer()
    together = greedy(stack, tokenizer, prompts(), ROOM)
    assert together == [greedy(stack, tokenizer, [prompt], ROOM)[0] for prompt in prompts()]


def test_it_is_the_most_probable_token_and_nothing_behind_an_end():
    stack, tokenizer = find_stack(tiny_model("llama")), tiny_tokenizer()
    free = naive(stack.model, prompts()[0], 12, ())
    # An end that the model says by itself in the middle.
    stack.model.generation_config.eos_token_id = [2, free[4]]
    expected = [naive(stack.model, prompt, 12, {2, free[4]}) for prompt in prompts()]
    assert greedy(stack, tokenizer, prompts(), 12) == expected
    assert len(expected[0]) == free.index(free[4]) + 1
    assert end_tokens(stack, tokenizer) == {2, free[4]}


def test_sampling_and_penalties_of_a_generation_config_do_not_matter():
    stack, tokenizer = find_stack(tiny_model("llama")), tiny_tokenizer()
    expected = greedy(stack, tokenizer, prompts(), ROOM)
    for name, value in {"do_sample": True, "temperature": 2.0, "top_k": 3, "repetition_penalty": 5.0}.items():
        setattr(stack.model.generation_config, name, value)
    assert greedy(stack, tokenizer, prompts(), ROOM) == expected


def test_a_sampled_answer_depends_on_its_prompt_and_the_seed_alone():
    stack, tokenizer = find_stack(tiny_model("llama")), tiny_tokenizer()
    how = {"temperature": 1.0, "seed": 3}
    together = sampled(stack, tokenizer, prompts(), ROOM, **how)
    torch.manual_seed(17)
    assert together == [sampled(stack, tokenizer, [prompt], ROOM, **how)[0] for prompt in prompts()]
    assert together != sampled(stack, tokenizer, prompts(), ROOM, temperature=1.0, seed=4)
    assert sampled(stack, tokenizer, prompts(), ROOM, temperature=1e-6, seed=3) == greedy(
        stack, tokenizer, prompts(), ROOM
    )


def test_tokens_are_sampled_from_the_distribution_at_a_temperature():
    stack, tokenizer = find_stack(tiny_model("llama")), tiny_tokenizer()
    (prompt, *_), temperature, draws = prompts(), 0.7, 400
    with torch.no_grad():
        logits = stack.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, dim=0)
    found = torch.zeros_like(expected)
    for seed in range(draws):
        found[sampled(stack, tokenizer, [prompt], 1, temperature=temperature, seed=seed)[0][0]] += 1 / draws
    assert 0.05 < expected.max() < 0.95
    # Five standard errors of each share.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1 / draws).all()
