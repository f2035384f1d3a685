"""The questions are shipped, whole, and what each capability's intervals are said to rest on."""

import json
from collections import Counter
from pathlib import Path

import excise
from excise.evaluation.panel.checks import CHECKS, passes
from excise.evaluation.panel.questions import (
    CAPABILITIES,
    DOMAINS,
    FILE,
    all_questions,
    first_questions,
    hash_of,
    limit_at,
)
from excise.evaluation.panel.schema import KEYWORDS


def test_they_are_package_data():
    import tomllib

    root = Path(excise.__file__).parent
    patterns = tomllib.loads((root.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert FILE in [path for pattern in patterns["excise"] for path in root.glob(pattern)]


def test_every_capability_has_24_and_every_domain_16_and_none_comes_twice():
    counts = Counter(question.capability for question in all_questions())
    assert counts == {**dict.fromkeys(CAPABILITIES, 24), **dict.fromkeys(DOMAINS, 16)}
    assert len({question.prompt for question in all_questions()}) == len(all_questions())
    assert len({question.name for question in all_questions()}) == len(all_questions())
    for question in all_questions():
        assert bool(question.checks) == (question.capability in CAPABILITIES)


def test_variants_take_turns():
    for limit in (3, 6, 12, 24):
        counts = Counter((q.capability, q.variant) for q in first_questions(limit) if q.capability in CAPABILITIES)
        for capability in CAPABILITIES:
            own = [count for (name, _), count in counts.items() if name == capability]
            assert sum(own) == limit
            assert max(own) - min(own) <= 1


def test_checks_know_their_arguments_and_schemas_their_keywords():
    def keywords(schema):
        inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
        return set(schema).union(*map(keywords, inner))

    for question in all_questions():
        passes(question, "Anything at all, 12.")
        for check in question.checks:
            assert check["kind"] in CHECKS
            for name in ("schema", "parameters"):
                assert keywords(check.get(name, {})) <= KEYWORDS.keys()


def test_what_is_to_be_copied_or_found_stands_in_the_prompt():
    for question in all_questions():
        for check in question.checks:
            if check["kind"] in ("copy", "code"):
                assert question.prompt.count(check["text"]) == 1
                assert passes(question, check["text"])


def test_the_hash_is_of_what_is_asked_and_how_it_is_judged():
    one, *others = first_questions(3)
    assert hash_of([one, *others]) != hash_of(others)
    assert json.dumps(hash_of(others)) == json.dumps(hash_of(first_questions(3)[1:]))


def test_effort_sets_how_many():
    assert [limit_at(effort) for effort in (0, 1, 4, 8, 16.4)] == [2, 2, 4, 8, 16]
