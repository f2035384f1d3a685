"""Names in quantisation settings: the modules they pick after a removal are those they picked before."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest

from excise.errors import CheckpointError
from excise.surgery.quantisation import renumbered

BLOCKS, REMOVED = 24, (1, 4, 12, 20)
KEPT = [i for i in range(BLOCKS) if i not in REMOVED]
NEW = {i: KEPT.index(i) if i in KEPT else None for i in range(BLOCKS)}
PREFIXES = ("model.layers", "backbone.layers")
LEAVES = ("self_attn.q_proj", "mlp.gate", "mlp.gate_proj", "mlp.experts.3.up_proj", "mlp.experts.1.up_proj")


def modules(indices):
    outside = ["lm_head", "model.embed_tokens", "vision_tower.encoder.layers.4.mlp", "vision.layers.2.fc"]
    return outside + [f"model.layers.{i}.{leaf}" for i in indices for leaf in LEAVES]


def picked_by(entry, name):
    """Whether a list entry picks a module, as the tools' documents say: expression, wildcard, or name of a parent."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return fnmatchcase(name, entry) or name == entry or name.startswith(f"{entry}.")


def in_new_numbers(name):
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return f"model.layers.{NEW[int(match[1])]}.{match[2]}" if match else name


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
        "model.layers.2.mlp.gate",
        "model.layers.23.self_attn.q_proj",
        "model.layers.7",
        "model.layers.4",
        "model.layers.7*",
        "model.layers.1*",
        "model.layers.2?.mlp*",
        "model.layers.[5-9].mlp.gate",
        "model.layers.*.mlp.gate",
        "model.layers.11.self_attn*",
        "*.layers.13.mlp.gate",
        "*layers.13.mlp.gate",
        "*.mlp.gate",
        "model.layers.5.mlp.experts.3.up_proj",
        "vision_tower.encoder.layers.4.mlp",
        "vision.layers.2*",
        "re:.*lm_head",
        "re:.*mlp.gate$",
        r"re:model\.layers\.7\..*",
        r"re:.*layers\.2\.mlp\.gate$",
        r"re:.*\.layers\.(0|1|2)\.mlp.*",
        r"re:.*layers\.1\d\..*",
        r"re:.*layers\.[0-3]\.mlp\.experts\.\d+\.up_proj",
        r"re:.*layers\.\d+\.mlp\.gate$",
        "re:.*layers.1.*",
        "re:.*layers.7.*",
        r"re:model\.layers\.2",
        r"re:vision\.layers\.2.*",
    ],
)
def test_what_was_picked_is_picked(entry):
    before = {in_new_numbers(name) for name in modules(KEPT) if picked_by(entry, name)}
    entries = renumbered([entry], PREFIXES, NEW)
    after = {name for name in modules(range(len(KEPT))) if any(picked_by(new, name) for new in entries)}
    assert after == before


def test_a_parent_named_to_its_end_stays_so():
    assert renumbered([r"re:model\.layers\.7$"], PREFIXES, NEW) == [r"re:model\.layers\.5$"]


def test_both_spellings_and_names_with_less_or_more_before_them():
    names = ["backbone.layers.5.mixer.in_proj", "layers.5.mlp", "language_model.model.layers.5.mlp"]
    expected = ["backbone.layers.3.mixer.in_proj", "layers.3.mlp", "language_model.model.layers.3.mlp"]
    assert renumbered(names, PREFIXES, NEW) == expected


def test_settings_of_every_shape():
    """As ModelOpt (mixed precision), compressed-tensors and GPTQModel nest them."""
    settings = {
        "quant_method": "modelopt",
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        "quantized_layers": {"model.layers.4.mlp.gate": {"algo": "FP8"}, "model.layers.5.mlp.gate": {"algo": "FP8"}},
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "block_structure": [128, 128]}},
            "group_1": {"targets": [r"re:.*layers\.12\..*"]},
            "group_2": {"targets": [r"re:.*layers\.13\..*", "model.layers.4.mlp.gate"]},
        },
        "dynamic": {r"-:model\.layers\.4\..*": {}, r"+:model\.layers\.5\..*": {"bits": 8}},
        "ignore": [],
        "note": "model.layers.5 is prose here",
        "group_size": 12,
    }
    assert renumbered(settings, PREFIXES, NEW) == {
        **settings,
        "quantized_layers": {"model.layers.3.mlp.gate": {"algo": "FP8"}},
        "config_groups": {
            "group_0": settings["config_groups"]["group_0"],
            "group_2": {"targets": [r"re:.*layers\.10\..*"]},
        },
        "dynamic": {r"+:model\.layers\.3\..*": {"bits": 8}},
    }


def test_a_pattern_that_cannot_be_read_is_refused():
    with pytest.raises(CheckpointError, match="cannot be renumbered"):
        renumbered([r"re:model\.layers\.(1|2\.mlp)"], PREFIXES, NEW)
