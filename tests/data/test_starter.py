"""The starter set is what its description says."""

from __future__ import annotations

import collections

from excise.data.samples import load_samples
from excise.data.sources import STARTER, draw_rows
from tests.tiny import tiny_tokenizer

CHATS = {"agentic", "code", "conversation", "mathematics", "science"}
DOCUMENTS = {"dialogue", "encyclopaedic", "exposition", "languages", "news", "program", "prose", "verse"}


def starter(categories=CHATS | DOCUMENTS):
    return [row for row in draw_rows(STARTER, 10_000, seed=0).rows if row.category in categories]


def test_chats_in_five_categories_and_documents_in_eight():
    for categories, least in ((CHATS, 256 // 8), (DOCUMENTS, 30)):
        counts = collections.Counter(row.category for row in starter(categories))
        assert set(counts) == categories
        assert min(counts.values()) >= least
    assert len(starter(CHATS)) == 256
    assert len(starter()) == len(draw_rows(STARTER, 10_000, seed=0).rows)


def test_documents_are_plain_texts_and_none_comes_twice():
    texts = [row.text for row in starter(DOCUMENTS)]
    assert all(text and text.strip() for text in texts)
    assert len(set(texts)) == len(texts)


def test_every_part_of_a_draw_has_every_kind():
    samples = load_samples(STARTER, tiny_tokenizer(), samples=128, tokens=16)
    for part in (samples[:64], samples[64:]):
        assert {sample.category for sample in part} >= CHATS | DOCUMENTS


def test_turns_alternate_and_end_with_an_answer():
    for row in starter(CHATS):
        roles = [message["role"] for message in row.messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row.name
        assert roles, row.name
        assert all(message["content"].strip() for message in row.messages), row.name


def test_no_chat_comes_twice():
    rows = starter(CHATS)
    assert len({tuple(message["content"] for message in row.messages) for row in rows}) == len(rows)
    questions = [next(m["content"] for m in row.messages if m["role"] == "user") for row in rows]
    assert len({question.casefold() for question in questions}) == len(rows)
