from __future__ import annotations

import gguf
import pytest
from huggingface_hub import ModelCard

from excise.surgery.card import model_card, original_metadata
from tests.gguf_files import write_gguf
from tests.released import released_folder
from tests.tiny import tiny_model

FACTS = {
    "original": "org/base-model",
    "removed": [3, 7],
    "original_blocks": [0, 1, 2, 4, 5, 6],
    "proposed_by": "fisher",
    "energy": 0.123456,
    "base_loss": 2.0,
    "pruned_loss": 2.5,
    "parameters": {"before": 1000, "after": 800},
    "data": {"source": "starter", "samples": 256},
    "seed": 42,
    "versions": {"excise": "0.1.0", "torch": "2.13.0"},
    "command": "excise run org/base-model --remove 2 --out small",
}


def test_says_everything_that_is_known():
    card = model_card(FACTS, name="small")
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert front.splitlines()[:2] == ["library_name: transformers", "base_model: org/base-model"]
    assert "- depth-pruning" in front
    for expected in (
        "# base-model, 6 of 8 blocks\n",
        "2 of 8 blocks",
        "| 3, 7 |",
        "| fisher |",
        "| 0.1235 |",
        "2.0000 nats/token (perplexity 7.389)",
        "2.5000 nats/token (perplexity 12.18)",
        "800 of 1,000 (80.0%)",
        "source starter, samples 256",
        "| 42 |",
        "excise 0.1.0, torch 2.13.0",
        "excise run org/base-model --remove 2 --out small",
        'from_pretrained("small")',
    ):
        assert expected in body, expected


def test_says_nothing_that_is_not_known():
    card = model_card({"removed": [3]}, name="small")
    assert "None" not in card
    for absent in ("base_model", "Loss", "Predicted", "Seed", "Proposed", "```sh"):
        assert absent not in card, absent


def test_a_local_path_is_neither_a_base_model_nor_told_in_full():
    told = {
        "original": "/home/someone/models/mine",
        "command": "excise run /home/someone/models/mine --data ~/someone/a.jsonl:2,starter --out=/home/someone/small",
        "data": {"calibration": "/home/someone/a.jsonl"},
    }
    card = model_card({**FACTS, **told}, name="small")
    assert "base_model" not in card
    assert "someone" not in card
    assert "mine with 2 of 8 blocks" in card
    assert "excise run mine --data a.jsonl:2,starter --out=small\n" in card
    assert "| calibration a.jsonl |" in card


def test_a_bar_does_not_break_the_table():
    assert "a\\|b" in model_card({"data": "a|b"}, name="small")


def test_a_repair_is_told_with_where_it_went_and_what_it_was_fitted_on():
    steps = [{"block": 2, "kind": "feed-forward"}, {"block": 6, "kind": "attention"}]
    repair = {"steps": steps, "samples": {"samples": 40, "data": "/home/someone/chats.jsonl"}}
    card = model_card({**FACTS, "repair": repair, "repaired_loss": 2.25}, name="small")
    assert "are unchanged, but for a matrix below and one above each cut, refitted without training." in card
    assert "feed-forward of block 2; attention of block 6, fitted on 40 samples of chats.jsonl" in card
    assert "| Loss after repair | 2.2500 nats/token" in card
    assert "/home/someone" not in card
    healed = model_card({**FACTS, "repair": repair, "healing": {"steps": 3}}, name="small")
    assert "the others were repaired in closed form and then healed." in healed


ORIGINALS = {  # README.md of the original → what must be in the result's metadata
    "a licence of its own": (
        "---\nlicense: other\nlicense_name: 'terms: v2'\nlicense_link: LICENSE\n---\n# x\n",
        {"license": "other", "license_name": "terms: v2", "license_link": "LICENSE"},
    ),
    "languages, Norwegian among them": ("---\nlanguage: [en, no, 'yes']\n---\n", {"language": ["en", "no", "yes"]}),
    "Norwegian alone": ("---\nlanguage: no\n---\n", {"language": "no"}),
    "a base model of its own": (
        "---\nbase_model: org/grandparent\nbase_model_relation: finetune\n---\n",
        {"base_model": ["org/base-model", "org/grandparent"], "base_model_relation": "finetune"},
    ),
    "several base models": (
        "---\nbase_model:\n- a/b\n- org/base-model\n---\n",
        {"base_model": ["org/base-model", "a/b"]},
    ),
    "tags and data": (
        "---\ntags: [chat, 'a: b', pruned]\ndatasets: [x/y]\n---\n",
        {"tags": ["chat", "a: b", "pruned", "excise", "depth-pruning"], "datasets": ["x/y"]},
    ),
    "another task and library": (
        "---\npipeline_tag: feature-extraction\nlibrary_name: sentence-transformers\n---\n",
        {"pipeline_tag": "feature-extraction", "library_name": "sentence-transformers"},
    ),
    "terms of access": (
        '---\nextra_gated_prompt: "You agree:\\n- to \\"all\\""\nextra_gated_fields:\n  Name: text\n---\n',
        {"extra_gated_prompt": 'You agree:\n- to "all"', "extra_gated_fields": {"Name": "text"}},
    ),
    "scores, which are not this model's": (
        "---\nlicense: mit\nmodel-index:\n- name: x\n  results: []\nnew_version: a/b\n---\n",
        {"license": "mit", "model-index": None, "new_version": None},
    ),
    "words that huggingface_hub keeps for scores": (
        "---\nlicense: mit\neval_results: [1]\nmodel_name: x\n---\n",
        {"license": "mit", "eval_results": None, "model_name": None, "model-index": None},
    ),
    "a mark at the start and carriage returns": ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
    "no metadata": ("# only text\n", {"license": None, "base_model": "org/base-model"}),
    "metadata that are no YAML": ("---\nlicense: [mit\n---\n", {"license": None}),
    "metadata that are no dictionary": ("---\n- mit\n---\n", {"license": None}),
    "no card": (None, {"license": None}),
}


@pytest.mark.parametrize("kind", ORIGINALS)
def test_what_the_original_says_stays_and_the_hub_reads_it(kind, tmp_path):
    text, expected = ORIGINALS[kind]
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    card = ModelCard(
        model_card(FACTS, name="small", original=original_metadata(tmp_path)), ignore_metadata_errors=False
    )
    data = card.data.to_dict()
    assert {key: data.get(key) for key in expected} == expected
    assert {"excise", "depth-pruning", "pruned"} <= set(data["tags"])
    assert card.text.strip().startswith("# base-model, 6 of 8 blocks")


def test_what_a_gguf_file_says_stays(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_license_link("LICENSE")
    writer.add_languages(["en", "no"])
    writer.add_tags(["chat"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://hub.example/org/base")
    writer.add_dataset_count(1)
    writer.add_dataset_repo_url(0, "https://hub.example/datasets/org/chats")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = original_metadata(path)
    data = ModelCard(model_card({"original": str(path), "removed": [1]}, name="x", original=metadata)).data.to_dict()
    expected = {
        "license": "apache-2.0",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "base_model": "org/base",
        "datasets": ["org/chats"],
    }
    assert {key: data.get(key) for key in expected} == expected
    assert "chat" in data["tags"]


def test_a_gguf_file_that_says_nothing(tmp_path, excise):
    write_gguf(tiny_model("llama", 3), tmp_path / "a.gguf")
    assert excise("prune", tmp_path / "a.gguf", "--removed", "1", "--out", tmp_path / "out", "--no-self-test")[0] == 0
    data = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["excise", "depth-pruning", "pruned"],
    }


def test_values_of_any_kind_are_escaped():
    facts = {**FACTS, "license": "a: 'b' # c", "command": "excise run x --data 'a```b'", "data": "one\ntwo | three"}
    card = ModelCard(model_card(facts, name='quo"ted'), ignore_metadata_errors=False)
    assert card.data.license == "a: 'b' # c"
    assert "````sh\nexcise run x --data 'a```b'\n````" in card.text
    assert 'from_pretrained("quo\\"ted")' in card.text
    assert "| one two \\| three |" in card.text


HOSTILE = "x\n\n# Heading\n---\nlicense: mit\n---\n<script>`` [a](javascript:b) \x1b[2J\ud83d"


@pytest.mark.parametrize(
    "facts",
    [
        {"original": f"/somewhere/{HOSTILE.replace('/', '')}"},
        {"proposed_by": HOSTILE},
        {"command": HOSTILE},
        {"license": HOSTILE},
        {"zeroed_sublayers": [HOSTILE]},
        {"left_out": {HOSTILE: HOSTILE}},
        {"versions": {HOSTILE: HOSTILE}},
        {"readers": {"right": [HOSTILE], "wrong": {"vllm": HOSTILE}}},
        {"readers": {}},
    ],
)
def test_texts_of_others_add_no_heading_metadata_or_html(facts):
    plain = ModelCard(model_card(FACTS, name="name"), ignore_metadata_errors=False)
    text = model_card({**FACTS, **facts}, name=HOSTILE, original={"tags": [HOSTILE], "base_model": [{}, HOSTILE]})
    text.encode("utf-8")
    card = ModelCard(text, ignore_metadata_errors=False)
    assert set(card.data.to_dict()) <= set(plain.data.to_dict()) | {"license"}
    assert card.data.license in (None, facts.get("license"))
    outside, fence, command = card.text.partition("The command:")
    assert fence
    headings = [line.rpartition(", ")[2] for line in outside.splitlines() if line.startswith("#")]
    assert headings == ["6 of 8 blocks", "## Recipe"]
    assert not [line for line in outside.splitlines() if line.startswith("---")]
    assert "<script>" not in outside.replace("\\<script", "")
    assert "\x1b" not in text
    assert len([line for line in command.splitlines() if line.startswith("tokenizer = ")]) == 1


def test_every_way_of_writing_keeps_it(tmp_path, excise):
    source, pruned = released_folder(tmp_path / "model"), tmp_path / "pruned"
    assert excise("prune", source, "--removed", "1,4", "--out", pruned)[0] == 0
    assert excise("prune", source, "--removed", "1,4", "--merge", "code", "--out", tmp_path / "merged")[0] == 0
    healing = ("--samples", 6, "--tokens", 16, "--held-out", 0.3, "--steps", 1, "--batch", 2)
    assert excise("heal", pruned, "--teacher", source, "--out", tmp_path / "healed", *healing)[0] == 0
    for name in ("pruned", "merged", "healed"):
        data = ModelCard.load(tmp_path / name / "README.md").data.to_dict()
        assert (data["license"], data["license_link"], data["language"]) == ("llama3.2", "LICENSE", ["en", "no"]), name
        assert (data["base_model"], data["datasets"]) == ("org/grandparent", ["HuggingFaceTB/smoltalk"])
        assert {"chat", "a: b", "excise"} <= set(data["tags"])


def test_what_comes_from_files_begins_no_heading_and_no_metadata():
    hostile = "org/model\n---\nlicense: mit\n# Heading\n\n| a | b |"
    card = model_card({**FACTS, "original": hostile, "proposed_by": hostile, "command": hostile}, name="small")
    lines = card.splitlines()
    assert lines.count("---") == 2
    assert not [line for line in lines if line.startswith(("# Heading", "license: mit", "| a | b |"))]
