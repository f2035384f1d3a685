"""The panel on tiny models: what is asked, kept, compared and written."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from excise.context import Context
from excise.errors import InputError
from excise.evaluation.panel.agreement import KEPT, agree, as_samples, record
from excise.evaluation.panel.answers import Answer, ask, prompts_of
from excise.evaluation.panel.figures import rows_of
from excise.evaluation.panel.panel import Panel, asked, panel_of, reference
from excise.evaluation.panel.questions import Question, first_questions
from excise.models.loading import Loaded
from excise.models.stack import bypass
from excise.store import Store
from tests.tiny import tiny_model, tiny_tokenizer

LONG = {"max_position_embeddings": 8192}


def context_of(model, tokenizer=None, folder=None):
    return Context(Loaded.of(model, tokenizer or tiny_tokenizer()), Store(folder))


@pytest.fixture(scope="module")
def original():
    return reference(context_of(tiny_model("llama", **LONG)), "original", 1)


@pytest.fixture(scope="module")
def panel(original):
    pruned = context_of(tiny_model("llama", layers=4, **LONG))
    same = context_of(tiny_model("llama", **LONG))
    return panel_of(original, [asked(pruned, "pruned", original), asked(same, "same", original)])


def rows(panel, group):
    return {(row.name, row.variant): row for row in panel.rows if row.group == group}


def test_a_model_agrees_with_itself_in_everything(panel):
    agreement = rows(panel, "agreement")
    for name in ("most probable token is the same", "acceptance as a draft, 1 − TV"):
        assert agreement[name, ""].figures[2].value == pytest.approx(1, abs=1e-6)
        assert agreement[name, ""].figures[1].value < 1
    assert agreement["KL from the original", ""].figures[2].value == pytest.approx(0, abs=1e-6)
    assert agreement["KL from the original", ""].figures[1].value > 0.1
    lengths = [e.said[0].tokens for e in panel.exchanges if e.said[0].passed is None]
    assert agreement["tokens until the answers part", ""].figures[2].value == np.mean(lengths)
    for row in panel.rows:
        if row.differences:
            assert row.figures[2] == row.figures[0]
            assert row.differences[1].value == 0
            assert row.verdict(1) == ""


def test_every_question_stands_there_with_all_answers(panel, original):
    assert [e.name for e in panel.exchanges] == [question.name for question in first_questions(1)]
    for exchange in panel.exchanges:
        assert len(exchange.said) == 3
        assert exchange.said[0] == exchange.said[2]
    assert panel.questions["left_out"] == {}
    # 64 of 288 tokens of a random model hold most of what is probable.
    assert 0.7 < panel.kept_mass < 1


def test_rows_have_their_samples_and_intervals_around_their_figures(panel):
    capabilities = rows(panel, "capabilities")
    assert capabilities["JSON", ""].samples == 1
    assert capabilities["all of these", ""].samples == 7
    for row in panel.rows:
        for figure in filter(None, (*row.figures, *row.differences)):
            assert figure.low - 1e-9 <= figure.value <= figure.high + 1e-9


def test_it_is_read_as_it_was_written_and_refused_where_it_does_not_fit(panel, tmp_path):
    panel.save(tmp_path / "panel.json")
    assert Panel.load(tmp_path / "panel.json") == panel
    first, *others = panel.exchanges
    short = replace(panel, exchanges=(replace(first, said=first.said[:2]), *others))
    short.save(tmp_path / "short.json")
    with pytest.raises(InputError, match="not one for each of its 3 models"):
        Panel.load(tmp_path / "short.json")
    (tmp_path / "other.json").write_text('{"models": 3}')
    with pytest.raises(InputError, match="no Panel of excise"):
        Panel.load(tmp_path / "other.json")


def test_agreement_is_what_whole_distributions_give():
    stack_of = {n: context_of(tiny_model("llama", layers=n, **LONG)) for n in (5, 6)}
    questions = {
        Question(f"q{i}", "code", "", "?", 8): Answer(tuple(range(6, 12 + i)), tuple(range(40, 43 + i)), "", False)
        for i in range(3)
    }
    found = agree(stack_of[5], record(stack_of[6], questions))
    with torch.no_grad():
        for i, sample in enumerate(as_samples(questions)):
            ids = torch.tensor(sample.input_ids)[None]
            p, q = (
                torch.softmax(stack_of[n].stack.model(ids).logits[0, :-1].double(), -1)[sample.counted[1:]]
                for n in (6, 5)
            )
            assert found.tokens[i] == sample.targets == 3 + i
            assert found.top1[i] == (p.argmax(-1) == q.argmax(-1)).sum()
            # What is not kept counts as one token, which hides a little.
            variation, kl = ((p - q).abs().sum(-1) / 2).sum(), (p * (p / q).log()).sum()
            assert 0 <= found.acceptance[i] - (sample.targets - variation) < 0.1 * sample.targets
            assert 0 <= kl - found.kl[i] < 0.1 * kl
            # Kept and rest, written out.
            top = p.topk(KEPT).indices
            kept = [torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(-1, keepdim=True)], -1) for x in (p, q)]
            assert found.kl[i] == pytest.approx(float((kept[0] * (kept[0] / kept[1]).log()).sum()), rel=1e-4)
            assert found.acceptance[i] == pytest.approx(float(kept[0].minimum(kept[1]).sum()), rel=1e-4)


def test_an_interrupted_panel_goes_on(tmp_path, monkeypatch):
    from excise.evaluation.panel import answers

    model, calls = tiny_model("llama", **LONG), []
    plain = answers.greedy

    def counted(stack, tokenizer, prompts, room):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return plain(stack, tokenizer, prompts, room)

    monkeypatch.setattr(answers, "greedy", counted)
    with pytest.raises(KeyboardInterrupt):
        reference(context_of(model, folder=tmp_path), "original", 1)
    monkeypatch.setattr(answers, "greedy", plain)
    before = set((tmp_path / "answers").iterdir())
    assert len(before) == 2
    stamps = {path: path.stat().st_mtime_ns for path in before}
    again = reference(context_of(model, folder=tmp_path), "original", 1)
    assert {path: path.stat().st_mtime_ns for path in before} == stamps
    whole = reference(context_of(model), "original", 1)
    assert again.asked.answers == whole.asked.answers


def test_a_base_model_without_a_template_is_asked_plainly():
    base = context_of(tiny_model("llama", **LONG), tiny_tokenizer(chat=False))
    prompts, left_out = prompts_of(base, first_questions(1))
    assert not left_out
    question, ids = next(iter(prompts.items()))
    assert base.loaded.tokenizer.decode(ids) == f"{question.prompt}\n\n"


def test_a_template_that_knows_thinking_is_asked_for_none():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}no thinking{% endif %}"
    prompts, _ = prompts_of(context_of(tiny_model("llama", **LONG), tokenizer), first_questions(1))
    assert all(tokenizer.decode(ids).endswith("no thinking") for ids in prompts.values())


def test_questions_that_do_not_fit_are_left_out_with_the_reason():
    prompts, left_out = prompts_of(context_of(tiny_model("llama")), first_questions(2))
    assert len(prompts) + len(left_out) == len(first_questions(2))
    assert all(len(ids) + question.room <= 128 for question, ids in prompts.items())
    assert all(reason.endswith("to answer, and the model has 128") for reason in left_out.values())
    empty = context_of(tiny_model("llama", max_position_embeddings=8))
    original = reference(empty, "original", 1)
    assert panel_of(original, [asked(empty, "same", original)]).rows == ()


def test_another_tokenizer_is_no_result_and_none_at_all_answers_nothing(original):
    other = context_of(tiny_model("llama", **LONG), tiny_tokenizer(chat=False))
    with pytest.raises(InputError, match="--against"):
        asked(other, "other", original)
    with pytest.raises(InputError, match="no tokenizer"):
        reference(Context(Loaded.of(tiny_model("llama"))), "original", 1)


@pytest.mark.parametrize("model_type", ["nemotron_h", "jamba", "qwen3_next", "gemma3", "gpt2"])
def test_hybrids_and_others_are_asked(model_type):
    model = tiny_model(model_type, **({"n_positions": 8192} if model_type == "gpt2" else LONG))
    context, question = context_of(model), replace(first_questions(1)[-1], room=6)
    prompts, _ = prompts_of(context, [question])
    answers = ask(context, prompts)
    recording = record(context, answers)
    with bypass(context.stack, []):
        assert agree(context, recording).acceptance == pytest.approx([len(answers[question].tokens)])


def said(text, tokens=(1, 2, 3), ended=True):
    return Answer((), tokens, text, ended)


def made_up(passing):
    """Answers to six questions, of which those numbered in `passing` pass."""
    questions = [Question(f"q{i}", "arithmetic", "", "?", 8, ({"kind": "number", "answer": i},)) for i in range(20)]
    other = Question("r", "retrieval", "", "?", 8, ({"kind": "code", "text": "123"},))
    return {q: said(str(i) if i in passing else "x") for i, q in enumerate(questions)} | {other: said("123")}


@pytest.mark.parametrize(
    ("original", "result", "note", "verdict"),
    [
        (range(18), range(18), "", ""),
        (range(18), range(4), "", "worse"),
        (range(2), range(18), "the original is not able", "better"),
        ((), (), "the original is not able", ""),
    ],
)
def test_what_the_original_cannot_do_is_said_and_what_is_lost_is_told_from_chance(original, result, note, verdict):
    row = next(r for r in rows_of([made_up(original), made_up(result)], []) if r.name == "arithmetic")
    assert row.note == note
    assert row.verdict(0) == verdict
    assert row.chance == 0


def test_an_original_at_chance_is_told():
    questions = [Question(f"q{i}", "refusals", "", "?", 8, ({"kind": "refuses", "due": i % 2 == 0},)) for i in range(8)]
    other = Question("r", "retrieval", "", "?", 8, ({"kind": "code", "text": "123"},))
    answers = {q: said("Sure.") for q in questions} | {other: said("It is 123.")}
    row = next(r for r in rows_of([answers, answers], []) if r.name == "refusals")
    assert row.chance == 0.5
    assert row.note == "the original is at chance (50%)"


def test_health_counts_loops_ends_and_lengths():
    questions = [Question(f"q{i}", "code", "", "?", 8) for i in range(6)]
    fine = {q: said("", tuple(range(12))) for q in questions}
    loops = {q: said("", (1, 2) * 12, ended=False) for q in questions}
    agreement = SimpleNamespace(tokens=np.ones(6), top1=np.ones(6), acceptance=np.ones(6), kl=np.zeros(6))
    found = {row.name: row for row in rows_of([fine, loops], [agreement]) if row.group == "health"}
    assert [f.value for f in found["distinct runs of three tokens"].figures] == [1, pytest.approx(2 / 22)]
    assert [f.value for f in found["longest loop of an answer"].figures] == [0, 24]
    assert [f.value for f in found["ends by itself"].figures] == [1, 0]
    assert [f.value for f in found["length against the original's"].figures] == [1, 2]
    assert found["longest loop of an answer"].verdict(0) == "worse"
    # Neither is good by itself.
    assert found["ends by itself"].verdict(0) == found["length of an answer"].verdict(0) == ""
