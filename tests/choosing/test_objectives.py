"""Damage by every objective against naive formulas, one unpadded sample at a time."""

import gzip
import json

import numpy as np
import pytest
import torch

from excise.choosing.objectives import Objective, Term, load_objective, load_questions, parse_objective
from excise.data.fit import Fit
from excise.data.samples import Samples
from excise.errors import InputError
from excise.models.loading import Loaded
from excise.models.stack import find_stack
from excise.repair.openings import ridge_of
from excise.repair.repair import Folding, repair
from excise.repair.streams import swapped
from excise.settings import Objecting
from tests.choosing.criteria.naive import divergence, log_probabilities, rejection, token_losses, without
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

LAYERS = 5
REMOVALS = [(1,), (0, 3), (2, 4)]
TOLERANCE = 1e-5  # transformers' RMSNorm computes in float32


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", LAYERS, dtype=torch.float64)


def with_categories(samples, names):
    from dataclasses import replace

    return Samples(tuple(replace(s, category=n) for s, n in zip(samples, names, strict=True)))


def mean_loss(model, samples):
    return float(np.mean(np.concatenate([token_losses(model, sample) for sample in samples])))


def test_loss_is_the_difference_of_mean_losses(model):
    samples = random_samples(seed=1)
    found = parse_objective("loss", samples).damages(context_of(find_stack(model)), [(), *REMOVALS])
    expected = [0.0] + [mean_loss(without(model, r), samples) - mean_loss(model, samples) for r in REMOVALS]
    np.testing.assert_allclose(found.values, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.errors[0] == 0
    assert (found.errors[1:] > 0).all()


def test_kl_is_the_mean_divergence(model):
    samples = random_samples(seed=1)
    found = parse_objective("kl", samples).damages(context_of(find_stack(model)), REMOVALS)
    expected = [divergence(model, without(model, r), samples) for r in REMOVALS]
    np.testing.assert_allclose(found.values, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("repaired", [False, True])
def test_acceptance_is_the_mean_probability_of_rejection(model, repaired):
    samples, context = random_samples(seed=1), context_of(find_stack(model))
    objective = parse_objective("acceptance", samples, repaired=repaired)
    found, term = objective.damages(context, [(), *REMOVALS]), objective.terms[0]
    expected = []
    for removed in REMOVALS:
        ridges = (ridge_of(term.fitting.tokens),) if repaired else ()
        fitted = repair(context, removed, term.fitting, folding=Folding(ridges=ridges)).weights if repaired else {}
        with swapped(model, fitted):
            pruned = without(model, removed)
        expected.append(rejection(model, pruned, term.samples))
    np.testing.assert_allclose(found.values, [0.0, *expected], rtol=TOLERANCE, atol=1e-12)
    assert (found.errors[1:] > 0).all()
    assert objective.title == ("rejection after repair" if repaired else "rejection")


def test_acceptance_is_not_taken_for_the_divergence_in_the_store(model, tmp_path):
    context, samples = context_of(find_stack(model), tmp_path), random_samples(seed=1)
    parse_objective("kl", samples).damages(context, REMOVALS)
    acceptance = parse_objective("acceptance", samples)
    assert not acceptance.known(context)
    assert (acceptance.damages(context, REMOVALS).values < 1).all()
    assert acceptance.known(context_of(find_stack(model), tmp_path)) == sorted(REMOVALS)


def questions_file(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


QUESTIONS = [
    {"question": "two plus two", "choices": ["five", "four", "nine"], "answer": 1},
    {"question": "the fox is", "choices": {"text": ["brown", "blue"], "label": ["A", "B"]}, "answerKey": "A"},
    {"ctx": "a stack of", "endings": ["dogs jumps", "blocks"], "label": "1"},
]


def test_choices_is_the_surprise_at_the_right_option(model, tmp_path):
    questions = load_questions(questions_file(tmp_path / "q.jsonl.gz", QUESTIONS), tiny_tokenizer(), count=3)
    assert len(questions) == 7

    def surprise(model):
        by_question = {}
        for sample in questions:
            logs = log_probabilities(model, sample)[np.arange(len(sample.input_ids) - 1), sample.input_ids[1:]]
            by_question.setdefault(sample.name.rpartition("#")[0], []).append(logs[sample.counted[1:]].sum())
        return np.mean([np.log(np.exp(v).sum()) - v[0] for v in map(np.array, by_question.values())])

    found = parse_objective("choices", random_samples(), questions).damages(context_of(find_stack(model)), REMOVALS)
    expected = [surprise(without(model, r)) - surprise(model) for r in REMOVALS]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=TOLERANCE)


def test_the_right_option_comes_first_and_only_options_count(tmp_path):
    tokenizer = tiny_tokenizer()
    questions = load_questions(questions_file(tmp_path / "q.jsonl.gz", QUESTIONS[:1]), tokenizer, count=1)
    texts = [tokenizer.decode(sample.input_ids) for sample in questions]
    assert texts[0] == "Question: two plus two\nAnswer: four"
    assert tokenizer.decode(questions[0].input_ids[questions[0].counted]) == " four"


BAD_QUESTIONS = {
    "no JSON": b"{",
    "no options": b'{"question": "x", "answer": 0}',
    "one option": b'{"question": "x", "choices": ["y"], "answer": 0}',
    "no such option": b'{"ctx": "x", "endings": ["y", "z"], "label": 2}',
    "no number": b'{"question": "x", "choices": ["y", "z"], "answer": Infinity}',
    "null": b'{"question": null, "choices": ["y", "z"], "answer": 0}',
    "half a surrogate pair": b'{"question": "x", "choices": ["y", "\\ud83d"], "answer": 0}',
}


@pytest.mark.parametrize("kind", BAD_QUESTIONS)
def test_a_bad_question_is_skipped_counted_and_named(tmp_path, kind):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(QUESTIONS[0]).encode() + b"\r\n" + BAD_QUESTIONS[kind] + b"\n")
    with pytest.warns(UserWarning, match=r"1 questions of .* were skipped, such as q\.jsonl:2: "):
        questions = load_questions(path, tiny_tokenizer())
    assert {sample.name.rpartition("#")[0] for sample in questions} == {"q.jsonl:1"}
    assert questions.provenance["skipped"]["rows"] == 1


@pytest.mark.parametrize("part", ["question", "choices"])
def test_a_question_that_the_model_cannot_take_is_skipped_whole(tmp_path, part):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    bad = {"question": "x", "choices": ["y", "z"], "answer": 0}
    bad[part] = "<extra>" if part == "question" else ["y", "<extra>"]
    path = questions_file(tmp_path / "q.jsonl.gz", [bad, *QUESTIONS])
    with pytest.warns(UserWarning, match=r"q\.jsonl\.gz:1: token id 288 is outside"):
        questions = load_questions(path, tokenizer, fit=Fit(VOCABULARY))
    assert len({sample.name.rpartition("#")[0] for sample in questions}) == len(QUESTIONS)
    assert questions.provenance["questions"] == len(QUESTIONS)
    with pytest.raises(InputError, match=r"no questions in .* token id 288"):
        load_questions(questions_file(tmp_path / "bad.jsonl.gz", [bad]), tokenizer, fit=Fit(VOCABULARY))


def test_worst_domain_and_mixture(model):
    stack = find_stack(model)
    samples = with_categories(random_samples(seed=1), ["a", "b", "a", "b", "a", "b"])
    parts = [Samples(tuple(s for s in samples if s.category == name)) for name in "ab"]
    by_domain = np.array([parse_objective("loss", part).damages(context_of(stack), REMOVALS).values for part in parts])
    worst = parse_objective("loss", samples, domains="worst").damages(context_of(stack), REMOVALS)
    np.testing.assert_allclose(worst.values, by_domain.max(axis=0), rtol=1e-6)
    np.testing.assert_allclose([list(of_one.values()) for of_one in worst.domains], by_domain.T, rtol=1e-6)
    others = parse_objective("loss", with_categories(samples, ["b", "a", "a", "b", "a", "b"]), domains="worst")
    assert others.identity != parse_objective("loss", samples, domains="worst").identity
    mixed = parse_objective("kl:0.7,loss:0.3", samples)
    kl, loss = (parse_objective(kind, samples).damages(context_of(stack), REMOVALS) for kind in ("kl", "loss"))
    found = mixed.damages(context_of(stack), REMOVALS)
    np.testing.assert_allclose(found.values, 0.7 * kl.values + 0.3 * loss.values, rtol=1e-9)
    np.testing.assert_allclose(found.errors, np.hypot(0.7 * kl.errors, 0.3 * loss.errors), rtol=1e-9)
    assert mixed.name == "kl:0.7,loss:0.3"
    assert mixed.tokens == 2 * samples.tokens


def test_slices_keep_questions_whole(tmp_path):
    questions = load_questions(questions_file(tmp_path / "q.jsonl.gz", QUESTIONS), tiny_tokenizer(), count=3)
    for tokens in range(1, questions.tokens):
        few = Term("choices", questions).first_tokens(tokens).samples
        names = [sample.name.rpartition("#")[0] for sample in few]
        for name in set(names):
            assert names.count(name) == sum(s.name.startswith(name + "#") for s in questions)
    assert Objective((Term("loss", random_samples()),)).first_tokens(10).tokens == 14  # whole samples: 9 + 5


def test_slices_follow_one_another_and_a_term_of_few_samples_takes_turns(tmp_path):
    samples = random_samples(range(8, 48))
    whole = parse_objective("kl", samples, repaired=True)
    tokens = whole.tokens // 4
    parts = whole.slices(tokens)
    assert len(parts) in (3, 4)
    assert parts[0].identity == whole.first_tokens(tokens).identity
    for side in ("samples", "fitting"):
        hashes = [sample.name for part in parts for sample in getattr(part.terms[0], side)]
        assert hashes == [sample.name for sample in getattr(whole.terms[0], side)][: len(hashes)]
        assert len(hashes) == len(set(hashes))
    assert all(tokens <= part.tokens < tokens + 2 * 48 for part in parts)
    assert [part.identity for part in whole.slices(10**6)] == [whole.identity]
    # Of samples longer than their share of a slice, those to judge by end first.
    uneven = parse_objective("kl", random_samples([40] * 20), repaired=True).slices(30)
    assert len(uneven) == 8
    assert all(len(part.terms[0].samples) == len(part.terms[0].fitting) == 1 for part in uneven)
    questions = load_questions(questions_file(tmp_path / "q.jsonl.gz", QUESTIONS), tiny_tokenizer(), count=3)
    mixed = Objective((Term("kl", samples, 0.5), Term("choices", questions, 0.5)))
    for part in (parts := mixed.slices(mixed.tokens // 3)):
        names = [sample.name.rpartition("#")[0] for sample in part.terms[1].samples]
        assert all(names.count(n) == sum(s.name.startswith(n + "#") for s in questions) for n in names)
    assert len({part.terms[0].samples.hash for part in parts}) == len(parts)


def test_known_removals_are_found_again(model, tmp_path):
    context, objective = context_of(find_stack(model), tmp_path), parse_objective("kl:1,loss:1", random_samples())
    objective.damages(context, REMOVALS)
    parse_objective("loss", random_samples()).damages(context, [(4,)])
    assert objective.known(context) == sorted(REMOVALS)
    assert objective.known(context_of(find_stack(model), tmp_path)) == sorted(REMOVALS)


def test_questions_without_end_are_skipped(tmp_path):
    rows = [
        {"question": "Which?", "choices": ["a", "b" * 100_000], "answer": 0},
        {"question": "Which?", "choices": ["a", "b"], "answer": 0},
    ]
    path = questions_file(tmp_path / "q.jsonl.gz", rows)
    with pytest.warns(UserWarning, match=r"1 questions .* were skipped.*tokens; expected at most 4,096"):
        assert len(load_questions(path, tiny_tokenizer())) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "an objective of loss, kl, acceptance, choices"),
        ("kl:-1", "weight of kl must be a number above 0"),
        ("kl:much", "weight of kl must be a number above 0"),
        ("choices", "needs questions"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_objective(text, random_samples())


def test_questions_of_no_known_form_are_refused_with_their_line(tmp_path):
    path = questions_file(tmp_path / "q.jsonl.gz", [{"text": "no question"}])
    with pytest.raises(InputError, match=r"q\.jsonl\.gz:1: expected a question with"):
        load_questions(path, tiny_tokenizer())
    with pytest.raises(InputError, match="no file"):
        load_questions(tmp_path / "absent.jsonl", tiny_tokenizer())
    asked = Objecting(objective="kl:0.5,choices:0.5", questions=path)
    with pytest.raises(InputError, match="expected a question with"):
        load_objective(asked, random_samples(), Loaded.of(find_stack(tiny_model("llama")), tiny_tokenizer()))
