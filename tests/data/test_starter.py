"""The starter set is what its description says."""

from __future__ import annotations

import collections

from excise.data.sources import STARTER, draw_rows

CATEGORIES = {"agentic", "code", "conversation", "mathematics", "science"}


def starter():
    return draw_rows(STARTER, 10_000, seed=0).rows


def test_256_chats_in_five_categories():
    rows = starter()
    assert len(rows) == 256
    counts = collections.Counter(row.category for row in rows)
    assert set(counts) == CATEGORIES
    assert min(counts.values()) >= 256 // 8


def test_turns_alternate_and_end_with_an_answer():
    for row in starter():
        roles = [message["role"] for message in row.messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row.name
        assert roles, row.name
        assert all(message["content"].strip() for message in row.messages), row.name


def test_no_chat_comes_twice():
    rows = starter()
    assert len({tuple(message["content"] for message in row.messages) for row in rows}) == len(rows)
    questions = [next(m["content"] for m in row.messages if m["role"] == "user") for row in rows]
    assert len({question.casefold() for question in questions}) == len(rows)
