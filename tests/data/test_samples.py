"""Tokenising: templates, masks of responses, truncation, windows of text, unusable rows."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys

import numpy as np
import pytest

from excise.choosing.judged import halves
from excise.choosing.objectives import parse_objective
from excise.data.fit import Fit, require_fit
from excise.data.samples import Sample, Samples, load_samples, split_samples
from excise.data.sources import draw_rows
from excise.errors import InputError
from excise.models.stack import find_stack
from tests.tiny import CHAT_TEMPLATE, VOCABULARY, beginning_tokenizer, tiny_model, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four, of course."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six."},
]
RENDERED = (
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nFour, of course.<|im_end|>\n"
    "<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\nSix.<|im_end|>\n"
)


def data_file(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def decoded(sample, tokenizer, counted=True):
    return tokenizer.decode(sample.input_ids[sample.counted == counted])


def test_chats_go_through_the_template(tmp_path):
    tokenizer = tiny_tokenizer()
    data = data_file(tmp_path, {"messages": CHAT, "category": "mathematics"})
    (sample,) = load_samples(data, tokenizer, loss_on="all")
    assert tokenizer.decode(sample.input_ids) == RENDERED
    assert sample.counted.all()
    assert sample.targets == len(sample.input_ids) - 1
    assert sample.category == "mathematics"
    assert sample.input_ids.dtype == np.int64


def test_content_leaves_out_what_the_template_puts_before_a_chat(tmp_path):
    tokenizer = tiny_tokenizer()
    texts = ["What is 2 + 2?", "Four, of course.", "Six."]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    rows.append({"messages": [{"role": "system", "content": "What?"}, {"role": "user", "content": "Six."}]})
    samples = load_samples(data_file(tmp_path, *rows), tokenizer)
    expected = {f"{text}<|im_end|>\n" for text in texts} | {"What?<|im_end|>\n<|im_start|>user\nSix.<|im_end|>\n"}
    assert {decoded(sample, tokenizer) for sample in samples} == expected
    every = load_samples(data_file(tmp_path, *rows), tokenizer, loss_on="all")
    assert all(sample.counted.all() for sample in every)


def test_a_chat_cut_before_its_content_is_unusable(tmp_path):
    tokenizer = tiny_tokenizer()
    opening = len(tokenizer("<|im_start|>user\n")["input_ids"])
    with pytest.raises(InputError, match="0 of them counted"):
        load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer, tokens=opening)


def test_without_a_template_turns_are_joined_by_blank_lines(tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    (sample,) = load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer)
    assert tokenizer.decode(sample.input_ids) == "What is 2 + 2?\n\nFour, of course.\n\nAnd 3 + 3?\n\nSix."


def test_responses_counts_exactly_the_assistants_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    (sample,) = load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer, loss_on="responses")
    assert tokenizer.decode(sample.input_ids) == RENDERED
    assert decoded(sample, tokenizer) == "Four, of course.<|im_end|>\nSix.<|im_end|>\n"
    expected = sum(len(tokenizer(text)["input_ids"]) for text in ("Four, of course.<|im_end|>\n", "Six.<|im_end|>\n"))
    assert sample.targets == expected


def test_responses_without_a_template(tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    (sample,) = load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer, loss_on="responses")
    assert decoded(sample, tokenizer) == "Four, of course.Six."
    assert decoded(sample, tokenizer, False) == "What is 2 + 2?\n\n\n\nAnd 3 + 3?\n\n"


def test_the_mask_follows_a_template_with_a_system_prompt_of_its_own(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s>system: be brief\n" + CHAT_TEMPLATE
    (sample,) = load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer, loss_on="responses")
    assert decoded(sample, tokenizer) == "Four, of course.<|im_end|>\nSix.<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_not_guessed_at(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}:"
        "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% endif %}\n{% endfor %}"
    )
    with pytest.raises(InputError, match="rewrites earlier turns"):
        load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer, loss_on="responses")
    assert len(load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer)) == 1


def test_chats_whose_roles_the_template_refuses_are_skipped_and_named(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    data = data_file(tmp_path, {"messages": [{"role": "system", "content": "Be brief"}, *CHAT]}, {"messages": CHAT})
    with pytest.warns(UserWarning, match=r"1 rows .*data\.jsonl:1: the chat template refused it"):
        samples = load_samples(data, tokenizer)
    assert [sample.name for sample in samples] == ["data.jsonl:2"]
    assert samples.provenance["skipped"]["rows"] == 1
    (reason,) = samples.provenance["skipped"]["first"]
    assert reason.startswith("data.jsonl:1: the chat template refused it")
    assert "no system role" in reason


def test_no_usable_sample_is_an_error(tmp_path):
    tokenizer = tiny_tokenizer()
    for records, options, message in (
        ([], {}, "the source holds no rows"),
        ([{"text": "a"}, {"text": ""}], {}, r"data\.jsonl:\d: [01] tokens"),
        ([{"text": "plain"}, {"text": "text"}], {"loss_on": "responses"}, "plain text has no responses"),
        ([{"messages": CHAT[:1]}], {"loss_on": "responses"}, "0 of them counted"),
        ([{"messages": CHAT}], {"tokens": 5, "loss_on": "responses"}, "5 tokens, 0 of them counted"),
    ):
        with pytest.raises(InputError, match=f"no usable samples in .*{message}"):
            load_samples(data_file(tmp_path, *records), tokenizer, **options)


def test_options_out_of_range_are_refused(tmp_path):
    data = data_file(tmp_path, {"messages": CHAT})
    for options in ({"samples": 0}, {"tokens": -1}, {"loss_on": "prompts"}):
        with pytest.raises(InputError, match=r"expected samples >= 1, tokens >= 0 and loss_on"):
            load_samples(data, tiny_tokenizer(), **options)


def test_long_samples_are_cut(tmp_path):
    tokenizer, data = tiny_tokenizer(), data_file(tmp_path, {"messages": CHAT})
    (whole,) = load_samples(data, tokenizer, tokens=0)
    (cut,) = load_samples(data, tokenizer, tokens=11)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:11])
    assert len(cut.counted) == 11
    (response,) = load_samples(data, tokenizer, tokens=30, loss_on="responses")
    assert decoded(response, tokenizer)
    assert "Four, of course.".startswith(decoded(response, tokenizer))


def test_rows_of_text(tmp_path):
    tokenizer = tiny_tokenizer()
    samples = load_samples(data_file(tmp_path, {"text": "first row"}, {"text": "second row"}), tokenizer, seed=1)
    assert sorted(tokenizer.decode(sample.input_ids) for sample in samples) == ["first row", "second row"]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(200)))
    return path


def test_a_text_file_is_cut_into_windows(book):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(book.read_text())["input_ids"]
    samples = load_samples(str(book), tokenizer, samples=1000, tokens=50, seed=0)
    assert len(samples) == len(ids) // 50
    for sample in samples:
        start, stop = map(int, sample.name.removeprefix("book.txt[").removesuffix("]").split(":"))
        assert (start % 50, stop - start) == (0, 50)
        assert sample.input_ids.tolist() == ids[start:stop]
    assert len({sample.name for sample in samples}) == len(samples)


def test_windows_are_drawn_by_seed(book):
    draws = [
        [s.name for s in load_samples(str(book), tiny_tokenizer(), samples=5, tokens=50, seed=i)] for i in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(draws[0]) == 5


def test_a_text_shorter_than_a_window_is_one_sample(tmp_path):
    (tmp_path / "note.txt").write_text("short")
    (sample,) = load_samples(str(tmp_path / "note.txt"), tiny_tokenizer(), tokens=50)
    assert tiny_tokenizer().decode(sample.input_ids) == "short"


def test_a_text_file_has_no_responses(book):
    with pytest.raises(InputError, match="plain text has no responses"):
        load_samples(str(book), tiny_tokenizer(), loss_on="responses")


def test_one_row_of_text_is_treated_like_several(tmp_path):
    data = data_file(tmp_path, *({"text": f"row {i} " * 30} for i in range(3)))
    (sample,) = load_samples(data, tiny_tokenizer(), samples=1, tokens=20)
    assert sample.name.startswith("data.jsonl:")
    assert "[" not in sample.name
    assert len(sample.input_ids) == 20


def test_starter_samples_by_seed():
    tokenizer = tiny_tokenizer()
    first, again, other = (load_samples("starter", tokenizer, samples=16, seed=seed) for seed in (0, 0, 1))
    assert first.hash == again.hash != other.hash
    assert first.describe() == again.describe()
    assert first.describe()["samples"] == 16
    assert first.describe()["total_tokens"] == first.tokens == sum(len(sample.input_ids) for sample in first)
    assert max(len(sample.input_ids) for sample in first) <= 512


def test_the_hash_sees_tokens_masks_and_borders():
    def samples(*pieces):
        return Samples(tuple(Sample("s", np.array(ids), np.array(mask, dtype=bool)) for ids, mask in pieces))

    hashes = [
        samples(([1, 2], [1, 1]), ([3], [1])).hash,
        samples(([1, 2], [1, 0]), ([3], [1])).hash,
        samples(([1, 2], [1, 1]), ([4], [1])).hash,
        samples(([1], [1]), ([2, 3], [1, 1])).hash,
        samples(([3], [1]), ([1, 2], [1, 1])).hash,
    ]
    assert len(set(hashes)) == len(hashes)
    one, renamed = (Samples((Sample(name, np.array([1]), np.array([True])),)) for name in "ab")
    assert one.hash == renamed.hash


def test_a_slice_says_so():
    items = tuple(Sample(str(i), np.arange(3), np.ones(3, dtype=bool)) for i in range(5))
    part = Samples(items, {"data": "x"})[1:3]
    assert [sample.name for sample in part] == ["1", "2"]
    assert part.describe()["slice"] == [1, 3, None]
    assert part.describe()["data"] == "x"
    assert dataclasses.replace(part).tokens == 6


def test_samples_apart_from_others_share_no_row_and_no_part_of_a_text(tmp_path):
    tokenizer = tiny_tokenizer()
    drawn = load_samples("starter", tokenizer, samples=40, tokens=20)
    longer = load_samples("starter", tokenizer, samples=40, tokens=30, seed=1)
    apart = longer.apart_from(drawn)
    names = {sample.name for sample in drawn}
    assert [s.name for s in apart] == [s.name for s in longer if s.name not in names]
    assert 0 < len(apart) < 40
    assert apart.describe()["left_out"] == 40 - len(apart)
    text = tmp_path / "text.txt"
    text.write_text("a sentence of some length about nothing at all. " * 60)
    held_out = load_samples(str(text), tokenizer, samples=2, tokens=50)
    kept = load_samples(str(text), tokenizer, samples=1000, tokens=20).apart_from(held_out)
    taken = {token for sample in held_out for token in range(*sample.window)}
    assert len(kept) > 0
    assert all(taken.isdisjoint(range(*sample.window)) for sample in kept)
    assert len(load_samples(str(text), tokenizer, samples=1000, tokens=20)) - len(kept) >= 2 * 50 // 20


# What a template may do with a turn whose content is null and which calls a tool.
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
CALLS = (
    "{% for call in message.tool_calls %}<call>{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
)
CALL_TEMPLATES = {
    "reads them": "{% if message.content %}{{ message.content }}{% endif %}" + CALLS,
    "writes null down": "{{ message.content }}" + CALLS,
    "cannot add null": "{{ message.content + '' }}" + CALLS,
}


@pytest.mark.parametrize("kind", CALL_TEMPLATES)
def test_a_call_of_a_tool_is_rendered_without_content(tmp_path, kind):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<" + CALL_TEMPLATES[kind] + ">{% endfor %}"
    (sample,) = load_samples(data_file(tmp_path, {"messages": [CHAT[0], CALL]}), tokenizer, loss_on="all")
    assert tokenizer.decode(sample.input_ids) == f"<{CHAT[0]['content']}><<call>add(1)>"


HALVES = {
    "a role": [{"role": "us\ud83d", "content": "Hi"}],
    "an argument": [
        CHAT[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\udead"}}}],
        },
    ],
    "a name": [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "\udead", "arguments": {}}}]},
    ],
}


@pytest.mark.parametrize("kind", HALVES)
def test_half_a_surrogate_pair_anywhere_in_a_chat_costs_its_row_alone(tmp_path, kind):
    tokenizer = tiny_tokenizer()
    reads = CALL_TEMPLATES["reads them"]
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}:" + reads + "{% endfor %}"
    with pytest.warns(UserWarning, match=r"data\.jsonl:1: .* holds half a surrogate pair"):
        (sample,) = load_samples(data_file(tmp_path, {"messages": HALVES[kind]}, {"messages": CHAT}), tokenizer)
    assert sample.name == "data.jsonl:2"


OPENINGS = {
    "a word of the opening": ("{{ 'You are a helpful assistant.' }}" + CHAT_TEMPLATE, "a"),
    "the role": (CHAT_TEMPLATE, "user"),
    "nothing": ("{{ 'Be brief. ' }}" + CHAT_TEMPLATE, ""),
    "the opening itself": ("{{ 'Be brief. ' }}" + CHAT_TEMPLATE, "Be brief. "),
    "spaces that the template trims": (
        "{{ 'a' }}" + CHAT_TEMPLATE.replace("message['content']", "message['content'].strip()"),
        " a ",
    ),
}


@pytest.mark.parametrize("kind", OPENINGS)
def test_the_opening_is_what_all_chats_share_whatever_the_first_message_says(tmp_path, kind):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, text = OPENINGS[kind]
    (sample,) = load_samples(data_file(tmp_path, {"messages": [{"role": "user", "content": text}]}), tokenizer)
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "\x00"}], tokenize=False)
    opening = len(tokenizer(whole[: whole.index("\x00")])["input_ids"])
    assert np.flatnonzero(sample.counted)[0] == opening
    assert sample.counted[opening:].all()


def test_a_first_message_that_the_template_leaves_out_is_no_content(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}"
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "Six."}]
    (sample,) = load_samples(data_file(tmp_path, {"messages": chat}), tokenizer)
    assert decoded(sample, tokenizer) == "Six.>"


DATES = {
    "{{ strftime_now('%d %b %Y') }}": "01 Jan 2025",
    "{% set f = '%Y-%m-%d' %}{% set today = strftime_now(f) %}{{ today }}": "2025-01-01",
    "{% macro system() %}{{ strftime_now('%B %-d, %Y') }}{% endmacro %}{{ system() }}": "January 1, 2025",
    "\n  {% if strftime_now is defined %}{{ strftime_now(format='%A') }}{% endif %}": "\nWednesday",
}


@pytest.mark.parametrize("ask", DATES)
def test_a_template_that_asks_for_the_date_gets_always_the_same(tmp_path, ask):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ask + "|" + CHAT_TEMPLATE
    samples = load_samples(data_file(tmp_path, {"messages": CHAT}), tokenizer, loss_on="all")
    assert tokenizer.decode(samples[0].input_ids).partition("|")[0] == DATES[ask]
    assert samples.provenance["template_date"] == "2025-01-01"
    assert "template_date" not in load_samples("starter", tiny_tokenizer(), samples=2).provenance


@pytest.mark.parametrize("ending", [False, True])
def test_every_window_begins_as_the_tokenizer_begins_a_text(book, ending):
    tokenizer = beginning_tokenizer(ending=ending)
    samples = load_samples(str(book), tokenizer, samples=1000, tokens=50)
    assert len(samples) > 5
    assert {sample.input_ids[0] for sample in samples} == {tokenizer.bos_token_id}
    assert {len(sample.input_ids) for sample in samples} == {50}
    text = tiny_tokenizer()(book.read_text())["input_ids"]
    for sample in samples:
        start, stop = sample.window
        assert sample.input_ids[1:].tolist() == text[start:stop]
    assert sorted(sample.window[0] for sample in samples) == [49 * i for i in range(len(samples))]


FITS = {
    "an added token": ({"text": "all well <extra>"}, Fit(VOCABULARY), r"data\.jsonl:1: token id 288 is outside"),
    "an added token in a chat": (
        {"messages": [{"role": "user", "content": "<extra>"}]},
        Fit(VOCABULARY),
        "token id 288 is outside the model's embedding of 288 rows",
    ),
    "a smaller embedding": ({"text": "zzz"}, Fit(50), "is outside the model's embedding of 50 rows"),
}


@pytest.mark.parametrize("kind", FITS)
def test_rows_with_tokens_that_the_model_lacks_are_skipped(tmp_path, kind):
    record, fit, message = FITS[kind]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(InputError, match=message):
        load_samples(data_file(tmp_path, record), tokenizer, fit=fit)
    tame = tokenizer.decode([7, 8, 9])
    with pytest.warns(UserWarning, match=message):
        samples = load_samples(data_file(tmp_path, record, {"text": tame}), tokenizer, fit=fit)
    assert len(samples) == 1


@pytest.mark.parametrize("source", ["rows", "text"])
@pytest.mark.parametrize("tokens", [0, 500])
def test_samples_are_cut_to_the_positions_that_a_model_learned(tmp_path, book, source, tokens):
    data = str(book) if source == "text" else data_file(tmp_path, {"text": book.read_text()})
    samples = load_samples(data, tiny_tokenizer(), tokens=tokens, fit=Fit(VOCABULARY, 44))
    assert {len(sample.input_ids) for sample in samples} == {44}


def test_the_limits_of_models():
    for model_type, positions in (("llama", None), ("gpt2", 128), ("opt", 128)):
        stack = find_stack(tiny_model(model_type))
        assert Fit.of(stack) == Fit(VOCABULARY, positions)
        items = (Sample("data.jsonl:7", np.arange(129) % 50, np.ones(129, dtype=bool)),)
        if positions is None:
            require_fit(items, stack)
        else:
            with pytest.raises(InputError, match=r"data\.jsonl:7: 129 tokens, and the model has learned 128 positions"):
                require_fit(items, stack)


def test_sources_are_mixed_in_their_shares_throughout(tmp_path, book):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    data = f"{tmp_path / 'a.jsonl'}:3,{book}:1"
    samples = load_samples(data, tiny_tokenizer(), samples=16, tokens=20)
    texts = [sample.window is not None for sample in samples]
    assert (len(texts), sum(texts)) == (16, 4)
    assert [sum(texts[i : i + 4]) for i in range(0, 16, 4)] == [1, 1, 1, 1]
    assert [source["share"] for source in samples.provenance["sources"]] == [0.75, 0.25]
    assert samples.hash == load_samples(data, tiny_tokenizer(), samples=16, tokens=20).hash
    assert samples.hash != load_samples(data, tiny_tokenizer(), samples=16, tokens=20, seed=1).hash


def mixture(tmp_path, *names, **row):
    """Sources of 100 rows each, one a name."""
    for name in names:
        rows = ({"text": f"{name} {i}", **row} for i in range(100))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows))
    return [f"{tmp_path / name}.jsonl" for name in names]


def sources(samples):
    return collections.Counter(sample.name.partition(".")[0] for sample in samples)


@pytest.mark.parametrize("row", [{}, {"category": "chat"}], ids=["no category", "one category"])
def test_every_part_of_a_mixture_has_every_source_in_its_share(tmp_path, row):
    a, b = mixture(tmp_path, "a", "b", **row)
    for data, shares in ((f"{a},{b}", {"a": 0.5, "b": 0.5}), (f"{a}:3,{b}:1", {"a": 0.75, "b": 0.25})):
        _, held_out = split_samples(
            data, tiny_tokenizer(), samples=64, held_out=64, tokens=30, seed=0, loss_on="content"
        )
        parts = (held_out, *halves(held_out))
        assert [sources(part) for part in parts] == [
            {name: share * len(part) for name, share in shares.items()} for part in parts
        ]


def test_repairs_are_fitted_and_judged_on_every_source_of_a_mixture(tmp_path):
    names = "abcde"
    samples = load_samples(",".join(mixture(tmp_path, *names)), tiny_tokenizer(), samples=100)
    (term,) = parse_objective("kl", samples, domains="worst", repaired=True).terms
    assert sources(term.fitting) == dict.fromkeys(names, 12)
    assert sources(term.samples) == dict.fromkeys(names, 8)
    assert collections.Counter(term.domain_of_items()) == dict.fromkeys(names, 8)


def test_what_has_no_category_is_of_its_source_in_a_mixture_alone(tmp_path):
    (tmp_path / "other").mkdir()
    (a,), (twin,) = mixture(tmp_path, "a"), mixture(tmp_path / "other", "a")
    (kind,) = mixture(tmp_path, "kind", category="verse")
    (tmp_path / "verse.txt").write_text("a line of some length. " * 20)
    mixed = load_samples(f"{a},{twin},{kind},{tmp_path / 'verse.txt'}", tiny_tokenizer(), samples=40, tokens=10)
    assert collections.Counter(mixed.domains) == {"a": 10, "a 2": 10, "verse": 10, "verse 2": 10}
    assert set(load_samples(a, tiny_tokenizer(), samples=4).domains) == {""}


@pytest.mark.parametrize("wanted", [100, sys.maxsize])
def test_a_source_that_is_too_small_makes_the_mixture_smaller(tmp_path, wanted, recwarn):
    for name, rows in (("a", 10), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i} x"}) + "\n" for i in range(rows))
        )
    samples = load_samples(f"{tmp_path / 'a.jsonl'}:1,{tmp_path / 'b.jsonl'}:2", tiny_tokenizer(), samples=wanted)
    counts = collections.Counter(sample.name.partition(".")[0] for sample in samples)
    assert counts == {"a": 10, "b": 20}
    assert bool(recwarn.list) == (wanted == 100)


def rows_of_which_some_are_usable(usable):
    return [{"text": f"row {i}" if usable(i) else "a"} for i in range(100)]


def test_other_rows_are_drawn_in_place_of_unusable_ones(tmp_path):
    tokenizer = tiny_tokenizer()
    data = data_file(tmp_path, *rows_of_which_some_are_usable(lambda i: i % 3))
    with pytest.warns(UserWarning, match="rows of .* were skipped"):
        some, again = (load_samples(data, tokenizer, samples=40) for _ in range(2))
    assert len({sample.name for sample in some}) == 40
    assert [sample.name for sample in some] == [sample.name for sample in again]
    with pytest.warns(UserWarning, match="34 rows of"):
        every = load_samples(data, tokenizer, samples=90)
    assert len({sample.name for sample in every}) == 66
    # Of a draw of usable rows nothing moves.
    first = [row.name for row in draw_rows(data, 40, seed=0).rows if len(row.text) > 1]
    assert [sample.name for sample in some][: len(first)] == first


def test_a_draw_from_rows_of_which_none_is_usable_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("excise.data.samples.PATIENCE", 20)
    data = data_file(tmp_path, *rows_of_which_some_are_usable(lambda i: False))
    with pytest.raises(InputError, match="no usable samples"):
        load_samples(data, tiny_tokenizer(), samples=5)


def split(data, **options):
    drawing = {"samples": 20, "tokens": 30, "seed": 0, "loss_on": "content", **options}
    return split_samples(data, tiny_tokenizer(), held_out=10, **drawing)


def test_both_parts_of_a_split_are_as_large_as_asked_where_enough_rows_are_usable(tmp_path):
    data = data_file(tmp_path, *rows_of_which_some_are_usable(lambda i: i % 3))
    with pytest.warns(UserWarning, match="were skipped"):
        assert list(map(len, split(data))) == [20, 10]


def test_too_few_samples_are_split_as_asked(tmp_path):
    for usable, sizes in ((27, [18, 9]), (29, [19, 10]), (2, [1, 1])):
        data = data_file(tmp_path, *rows_of_which_some_are_usable(lambda i, usable=usable: i < usable))
        told = f"gives {usable} of the 30 samples wanted: {sizes[0]} to calibrate, {sizes[1]} held out"
        with pytest.warns(UserWarning, match="were skipped"), pytest.warns(UserWarning, match=told):
            calibration, held_out = split(data)
        assert [len(calibration), len(held_out)] == sizes
        assert {sample.name for sample in calibration}.isdisjoint(sample.name for sample in held_out)
