"""Random samples of mixed lengths, and a check that a model was left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from excise.data.samples import Sample, Samples
from tests.tiny import VOCABULARY

FIRST_ORDINARY_TOKEN = 6


def random_samples(
    lengths: Sequence[int] = (9, 5, 14, 2, 7, 5), *, seed: int = 0, counted_part: float = 0.7, below: int = VOCABULARY
) -> Samples:
    """Samples of these lengths, of tokens below `below`, a random part of them counted (the last one always is)."""
    generator = np.random.default_rng(seed)
    items = []
    for i, length in enumerate(lengths):
        counted = generator.random(length) < counted_part
        counted[-1] = True
        items.append(Sample(f"random:{i}", generator.integers(FIRST_ORDINARY_TOKEN, below, length), counted))
    return Samples(tuple(items), {"data": "random", "seed": seed})


def traces(model: Any) -> dict[str, Any]:
    """What temporary changes to a model could leave behind: hooks, instance forwards, gradients, requires_grad."""
    modules = dict(model.named_modules())
    return {
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in modules.items()
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
        },
        "forwards": {name: m.__dict__["forward"] for name, m in modules.items() if "forward" in m.__dict__},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
    }
