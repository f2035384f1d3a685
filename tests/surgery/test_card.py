from __future__ import annotations

from excise.surgery.card import model_card

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
    card = model_card({**FACTS, "original": "/home/someone/models/mine", "command": "excise run mine"}, name="small")
    assert "base_model" not in card
    assert "/home/someone" not in card
    assert "mine with 2 of 8 blocks" in card


def test_a_bar_does_not_break_the_table():
    assert "a\\|b" in model_card({"data": "a|b"}, name="small")


def test_a_repair_is_told_with_where_it_went_and_what_it_was_fitted_on():
    steps = [{"block": 2, "kind": "feed-forward"}, {"block": 6, "kind": "attention"}]
    repair = {"steps": steps, "samples": {"samples": 40, "data": "/home/someone/chats.jsonl"}}
    card = model_card({**FACTS, "repair": repair, "repaired_loss": 2.25}, name="small")
    assert "are unchanged, but for one matrix below each cut, refitted without training." in card
    assert "feed-forward of block 2; attention of block 6, fitted on 40 samples of chats.jsonl" in card
    assert "| Loss after repair | 2.2500 nats/token" in card
    assert "/home/someone" not in card
    healed = model_card({**FACTS, "repair": repair, "healing": {"steps": 3}}, name="small")
    assert "the others were repaired in closed form and then healed." in healed
