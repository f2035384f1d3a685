"""The README's table of architectures says what the walks found, and which."""

from dataclasses import replace

import pytest

from tests.architecture_walk import Walk
from tests.architectures_table import BEGIN, END, README, compact_table, with_table
from tests.tiny import MODEL_TYPES

DENSE = Walk(
    model_type="llama",
    model_class="LlamaForCausalLM",
    kinds=("attention+feed-forward",) * 6,
    fixed={},
    gradient_error=1e-16,
    certified=True,
    removed=(1, 4),
    skipped=0,
    scale=3.0,
    moved=1.0,
    memory_error=0.0,
    loading={},
    disk_error=0.0,
    cache_agrees=True,
    same_bytes=True,
)
HYBRID = replace(DENSE, model_type="nemotron_h", kinds=("mamba", "moe", "mamba", "attention", "feed-forward", "moe"))


def test_types_that_agree_share_a_line():
    table = compact_table([DENSE, replace(DENSE, model_type="qwen2"), HYBRID]).splitlines()[2:]
    assert table == [
        "| `llama`, `qwen2` | attention, feed-forward | every sublayer |  |",
        "| `nemotron_h` | moe, mamba, attention, feed-forward | no: a block has one | one full_attention block stays |",
    ]


@pytest.mark.parametrize(
    "failure",
    [{"disk_error": 0.1}, {"loading": {"missing_keys": ["x"]}}, {"cache_agrees": False}, {"same_bytes": False}],
)
def test_a_failed_walk_is_said_to_have_failed(failure):
    assert "**`llama` failed**" in compact_table([replace(DENSE, **failure)])


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert with_table(text, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter"
    with pytest.raises(ValueError, match="once each"):
        with_table("no markers", "new\n")


def test_the_readme_has_every_architecture():
    table = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name.strip(" `") for cell in cells for name in cell.split(",")) == MODEL_TYPES
