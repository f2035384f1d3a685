"""One tiny random checkpoint of an architecture through everything: inspect, score, solve, prune, load, generate.

`tests/test_architectures.py` asserts what a walk finds; `python -m tests.architectures_table` tabulates it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from excise.errors import ArchitectureError
from excise.ising.energies import fisher
from excise.ising.problem import Problem, at_most
from excise.ising.solvers import solve
from excise.measuring.score import score
from excise.models.stack import Stack, find_stack, gated
from excise.surgery.checkpoint import pruned, write_pruned
from excise.surgery.config import pruned_config
from excise.surgery.on_disk import prune_folder
from excise.surgery.stock_load import compare_generation
from tests.contexts import context_of
from tests.random_samples import random_samples
from tests.tiny import EAGER_EXPERTS, tiny_folder

BUDGET, LENGTHS, CHECKED = 2, (9, 5, 7, *(4,) * 21), 3
PROMPT = torch.tensor([[7, 81, 250, 33, 9, 120, 64, 200, 15, 41], [90, 12, 12, 77, 280, 6, 31, 199, 55, 100]])


@dataclass(frozen=True)
class Walk:
    """What one walk found.

    Attributes:
        model_type: as in the records.
        model_class: of the pruned checkpoint in stock transformers.
        kinds: kind of each block.
        fixed: blocks that cannot go, with the reason.
        gradient_error: largest deviation from explicit autograd gates, relative to the largest gradient.
        certified: whether the spectrum is proved.
        removed: blocks of the lowest state that a config can describe.
        skipped: lower states that none can.
        scale: largest absolute logit of the gated original.
        moved: largest change of a logit by the removal, which all deviations stand against.
        memory_error: largest deviation of logits, pruned in memory.
        loading: keys that are missing, unexpected or mismatched in stock transformers.
        disk_error: likewise of logits, reloaded in stock transformers.
        cache_agrees: generation with and without KV cache.
        same_bytes: whether pruning from folder to folder gives the same tensors and config.

    """

    model_type: str
    model_class: str
    kinds: tuple[str, ...]
    fixed: dict[int, str]
    gradient_error: float
    certified: bool
    removed: tuple[int, ...]
    skipped: int
    scale: float
    moved: float
    memory_error: float
    loading: dict[str, Any]
    disk_error: float
    cache_agrees: bool
    same_bytes: bool


def walk(model_type: str, place: Path) -> Walk:
    """Walk a tiny model of `model_type`, with its checkpoints in the folder `place`."""
    original, out = tiny_folder(place / "original", model_type, dtype=torch.float64), place / "pruned"
    stack = find_stack(_load(original)[0])
    gradients = score(context_of(stack), random_samples(LENGTHS))
    one_stays = (
        [at_most(stack.needed, len(stack.needed) - 1, len(stack.blocks), name="one stays")] if stack.needed else []
    )
    problem = Problem(fisher(gradients.blocks()), BUDGET, tuple(stack.fixed), constraints=tuple(one_stays))
    spectrum = solve(problem, states=15)
    skipped, removed = next((k, s.removed) for k, s in enumerate(spectrum) if _describable(stack, s.removed))
    intact = _logits(stack.model)
    alpha = torch.ones(len(stack.blocks), dtype=torch.float64)
    alpha[list(removed)] = 0
    with gated(stack, alpha):
        expected = _logits(stack.model)
    with pruned(stack, removed) as model:
        memory_error = _difference(_logits(model), expected)
    write_pruned(stack, removed, out)
    model, loading = _load(out)
    disk_error = _difference(_logits(model), expected)
    return Walk(
        model_type,
        type(model).__name__,
        tuple(block.kind for block in stack.blocks),
        dict(stack.fixed),
        float(np.abs(gradients.A[:CHECKED] - _autograd(stack)).max() / np.abs(gradients.A[:CHECKED]).max()),
        spectrum.certified,
        removed,
        skipped,
        expected.abs().max().item(),
        _difference(intact, expected),
        memory_error,
        loading,
        disk_error,
        compare_generation(model.float(), PROMPT, 8)["cache_agrees"],
        _same_on_disk(original, removed, out, place / "from folder"),
    )


def kinds_in_words(kinds: Sequence[str]) -> str:
    """Kinds of blocks with their number: "4 mamba, 2 attention"."""
    counts = Counter(kinds)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, **EAGER_EXPERTS
    )
    return model.eval(), {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}


def _describable(stack: Stack, removed: Sequence[int]) -> bool:
    try:
        pruned_config(stack.model.config, stack.architecture, removed)
    except ArchitectureError:
        return False
    return True


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=PROMPT, use_cache=False).logits.double()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _autograd(stack: Stack) -> np.ndarray:
    """The first rows of A by autograd through gates that are multiplied in, one sample at a time."""
    rows = []
    for sample in random_samples(LENGTHS)[:CHECKED]:
        alpha = torch.ones(len(stack.sublayers), dtype=torch.float64, requires_grad=True)
        ids, counted = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.counted[1:])
        with gated(stack, alpha):
            logits = stack.model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits[counted], ids[1:][counted])
        rows.append(torch.autograd.grad(loss, alpha)[0])
    return torch.stack(rows).numpy()


def _same_on_disk(original: Path, removed: Sequence[int], expected: Path, out: Path) -> bool:
    prune_folder(original, removed, out)
    return _stored(out) == _stored(expected)


def _stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: dtype, shape and bytes."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                tensors[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes())
    return tensors
