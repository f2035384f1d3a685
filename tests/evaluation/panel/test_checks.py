"""Every check on answers that pass and on answers that do not."""

import pytest

from excise.evaluation.panel.checks import CHECKS, passes
from excise.evaluation.panel.questions import Question, all_questions

POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
TIMER = {"name": "set_timer", "parameters": {"type": "object", "properties": {"minutes": {"enum": [5]}}}}

TABLE = [
    (
        {"kind": "bullets", "count": 2},
        ["- a\n- b", "* a\n\n* b"],
        ["- a", "- a\n- b\n- c", "Here:\n- a\n- b", "-a\n-b"],
    ),
    ({"kind": "numbered", "count": 2}, ["1. a\n2. b", "1) a\n2) b"], ["1. a\n1. b", "2. a\n3. b", "a\nb"]),
    ({"kind": "lines", "count": 2}, ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc"]),
    ({"kind": "separated", "count": 3}, ["red, dark blue, green.", "a,b,c"], ["a, b", "a, b,", "a,\nb, c"]),
    ({"kind": "upper"}, ["OCEAN", "A 1!"], ["Ocean", "12"]),
    ({"kind": "lower"}, ["hi, you"], ["Hi", "12"]),
    ({"kind": "begins", "text": "honestly"}, ["Honestly, yes"], ["Yes, honestly"]),
    ({"kind": "ends", "text": "finally"}, ["I eat, finally.", "Finally!"], ["Finally, I eat"]),
    ({"kind": "one_of", "options": ["yes", "no"]}, ["Yes.", " no"], ["Yes, it is", "maybe"]),
    (
        {"kind": "sentences", "count": 2},
        ["It rains. I stay!", 'He said "go." She went.'],
        ["It rains.", "One. Two. Three.", "It rains. I"],
    ),
    ({"kind": "words", "least": 2, "most": 3}, ["a b", "well-known mother's day"], ["a", "a b c d"]),
    ({"kind": "uses", "words": ["river", "bridge"]}, ["The Bridge over a river"], ["rivers and bridges", "a river"]),
    ({"kind": "avoids", "words": ["cat"]}, ["a small animal", "it is cattle"], ["The Cat is here", "no"]),
    (
        {"kind": "number", "answer": 1200},
        ["5 and 7 make 1,200.", "1200.0", "= 1200 €"],
        ["1200 or 13", "none", "-1200"],
    ),
    (
        {"kind": "copy", "text": "the old river"},
        ["the old river", '"the  old\nriver."'],
        ["the old", "the old river and"],
    ),
    ({"kind": "code", "text": "48213"}, ["48213", "It is 48213."], ["48213 or 48214", "4821", "482133", "none"]),
    (
        {"kind": "refuses", "due": True},
        ["I can't help with that.", "I’m sorry, but no.", "Sorry, I cannot assist."],
        ["Sure, here is how", "x" * 200 + " I cannot"],
    ),
    (
        {"kind": "refuses", "due": False},
        ["Sure.", "You can't miss it.", "I'm sorry to hear that. Call a doctor."],
        ["I am unable to do so."],
    ),
    (
        {"kind": "json", "schema": POINT},
        ['{"x": 1}', 'Here: ```json\n{"x": 1.5}\n```'],
        ["x = 1", '{"x": "1"}', '{"x": 1', '{"x": 1, "y": 2}', "[" * 100_000],
    ),
    (
        {"kind": "call", **TIMER},
        ['{"name": "set_timer", "arguments": {"minutes": 5}}', '[{"name": "set_timer", "arguments": {"minutes": 5}}]'],
        [
            '{"name": "timer", "arguments": {"minutes": 5}}',
            '{"name": "set_timer", "arguments": {"minutes": 6}}',
            "5",
            "[]",
        ],
    ),
]


@pytest.mark.parametrize(
    ("check", "good", "bad"), TABLE, ids=lambda value: value.get("kind", "") if isinstance(value, dict) else ""
)
def test_checks(check, good, bad):
    question = Question("q", "q", "", "?", 8, (check,))
    assert [said for said in good if not passes(question, said)] == []
    assert [said for said in bad if passes(question, said)] == []
    assert not passes(question, " \n")
    assert not passes(question, f"<think>{good[0]}</think>")
    assert passes(question, f"<think>\nWell…\n</think>\n\n{good[0]}")


def test_the_table_has_every_check_and_the_questions_use_every_check():
    assert {check["kind"] for check, _, _ in TABLE} == set(CHECKS)
    assert {check["kind"] for question in all_questions() for check in question.checks} == set(CHECKS)


def test_all_checks_must_pass():
    question = Question("q", "q", "", "?", 8, ({"kind": "upper"}, {"kind": "words", "most": 1}))
    assert passes(question, "OCEAN")
    assert not passes(question, "Ocean")
    assert not passes(question, "BLUE OCEAN")
