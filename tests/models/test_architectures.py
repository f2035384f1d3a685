"""Every architecture through everything, and the page that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture_walk import walk
from tests.tiny import MODEL_TYPES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
FLOAT32_INSIDE = 2e-5  # norms, routers and state space scans of transformers compute in float32 even in a float64 model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_walk_from_inspect_to_generation(model_type, tmp_path):
    found = walk(model_type, tmp_path)
    assert len(found.kinds) == 6
    assert found.gradient_error < FLOAT32_INSIDE
    assert found.certified
    assert len(found.removed) == 2
    assert not set(found.removed) & set(found.fixed)
    assert found.moved > 1e-3 * found.scale, "removal changes nothing: the walk would prove nothing"
    assert found.memory_error < 1e-9
    assert found.loading == {}
    assert found.disk_error < 1e-9
    assert found.cache_agrees
    assert found.same_bytes


def test_the_page_has_a_row_for_every_architecture():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == MODEL_TYPES
