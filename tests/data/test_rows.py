"""Every form of a row is recognised, with what it says beside its text."""

from __future__ import annotations

import json

import pytest

from excise.data.rows import row_of

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FORMS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "conversations": {"conversations": CHAT},
    "prompt and response": {"prompt": "Hi", "response": "Hello"},
    "parts": {
        "messages": [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    },
    "text of JSON": {"messages": json.dumps(CHAT)},
    "columns": {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
    "filled up with null": {"messages": [{**turn, "tool_calls": None, "name": None} for turn in CHAT], "text": None},
    "null beside text": {"messages": None, "prompt": "Hi", "response": "Hello"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_chat_is_recognised(form):
    row = row_of({**FORMS[form], "category": "code", "id": 7}, "a:1")
    assert list(row.messages) == CHAT
    assert row.text is None
    assert row.category == "code"
    assert row.name == "a:1"


def test_text_is_recognised():
    row = row_of({"text": "Once upon a time", "meta": {}}, "a:1")
    assert row.text == "Once upon a time"
    assert row.messages is None
    assert row.category is None


def test_a_tool_call_needs_no_content_and_keeps_what_it_says():
    function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "1", "function": function}]}
    answer = {"role": "tool", "content": "rain", "tool_call_id": "1"}
    (_, made, given) = row_of({"messages": [CHAT[0], call, answer]}, "a:1").messages
    assert made["content"] is None
    assert made["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Bonn"}}
    assert given == answer


def test_a_call_in_the_older_spelling_is_one_of_the_newer():
    function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
    turns = [CHAT[0], {"role": "assistant", "content": None, "function_call": function}]
    turns.append({"role": "function", "name": "weather", "content": "rain"})
    (_, made, given) = row_of({"messages": turns}, "a:1").messages
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    assert made == {"role": "assistant", "content": None, "tool_calls": [called]}
    assert given == {"role": "tool", "content": "rain", "name": "weather"}


def test_a_turn_of_thought_alone_needs_no_content():
    turn = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": []}
    assert row_of({"messages": [CHAT[0], turn]}, "a:1").messages[1]["content"] is None


def test_a_byte_order_mark_within_a_table_is_no_text():
    assert row_of({"text": "\ufeffOnce"}, "a:1").text == "Once"
