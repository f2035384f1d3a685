"""Folders as `excise run`, `solve`, `compare`, `evaluate` and `heal` write them, made from numbers, without a model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from excise.evaluation.scores import Metric, Model, Result, Scores
from excise.ising.energies import Energy, fisher
from excise.ising.gradients import Gradients
from excise.ising.spectrum import Spectrum, State

HOSTILE = "<script>alert('x')</script>\"&"


def lowest(energy: Energy, budget: int, count: int = 20) -> Spectrum:
    """The lowest states by brute force."""
    every = list(itertools.combinations(range(len(energy)), budget))
    ranked = sorted(zip(energy.energies(every), every, strict=True))[:count]
    states = tuple(State(removed, value) for value, removed in ranked)
    return Spectrum(states, len(energy), budget, "exhaustive", 0.01, certified=True, lower_bound=ranked[0][0], gap=0.0)


def gradients(blocks: int = 12, seed: int = 0) -> Gradients:
    """Random gradients of two gates a block."""
    A = np.random.default_rng(seed).normal(size=(60, 2 * blocks)) / np.arange(1, 2 * blocks + 1)
    owners = tuple(gate // 2 for gate in range(2 * blocks))
    sizes = {"blocks": {"parameters": [1000 + block for block in range(blocks)]}}
    names = tuple(f"sample {k}" for k in range(60))
    return Gradients(A, np.ones(60), owners, ("attention", "feed-forward") * blocks, names, sizes=sizes)


SPEED = {
    "engine": "transformers",
    "request": {"prompt_tokens": 512, "new_tokens": 64, "batch": 1},
    "predicted": {"request": 1.32, "prefill": 1.3, "decode": 1.35},
    "measured": {"request": 1.28, "prefill": 1.3, "decode": 1.25},
}


def run_folder(
    folder: Path,
    blocks: int = 12,
    budget: int = 3,
    *,
    name: str = "org/model",
    seed: int = 0,
    repaired: bool = False,
    speed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A run: gradients, a spectrum, five measured candidates, the manifest; returns the manifest.

    Where it is `repaired`, what measured second best was chosen: repair leaves least of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = gradients(blocks)
    measured.save(folder / "gradients.safetensors")
    energy = fisher(measured.blocks())
    spectrum = lowest(energy, budget)
    spectrum.save(folder / "spectrum-fisher.json")
    draw = np.random.default_rng(seed)
    removals = [
        ("fisher:0", spectrum[0].removed),
        ("fisher:1", spectrum[1].removed),
        ("norm-ratio", spectrum[0].removed),
    ]
    removals += [(f"random:{k}", tuple(sorted(draw.choice(blocks, budget, False).tolist()))) for k in range(2)]
    losses = {removed: 3.2 + 0.3 * k + 0.01 * budget for k, (_, removed) in enumerate(dict(removals[::-1]).items())}
    losses = {removed: losses.setdefault(removed, 4.0) for _, removed in removals}
    candidates = [
        {
            "method": method,
            "removed": list(removed),
            "energy": energy.energy(removed),
            "loss": losses[removed],
            "delta": losses[removed] - 3.0,
            "perplexity": math.exp(losses[removed]),
            "parameters": 20_000 - sum(1000 + block for block in removed),
        }
        for method, removed in removals
    ]
    candidates.sort(key=lambda c: c["loss"])
    chosen = candidates[0]
    if repaired:
        chosen = next(c for c in candidates if c["removed"] != candidates[0]["removed"])
        for candidate, after in ((candidates[0], candidates[0]["loss"] - 0.01), (chosen, candidates[0]["loss"] - 0.1)):
            candidate["repaired_loss"] = after
    facts = {
        "model": name,
        "model_hash": "0" * 64,
        "blocks": blocks,
        "budget": budget,
        "asked": "--speedup 1.3" if speed else f"--remove {budget}",
        "speed": speed,
        "removed": chosen["removed"],
        "proposed_by": [c["method"] for c in candidates if c["removed"] == chosen["removed"]],
        "selected_by": "measured",
        "base_loss": 3.0,
        "pruned_loss": chosen["loss"],
        "checkpoint_loss": chosen.get("repaired_loss", chosen["loss"]),
        "base_perplexity": math.exp(3.0),
        "pruned_perplexity": chosen["perplexity"],
        "damage": {
            "error": 0.02,
            "domains": {"verse": chosen["delta"] + 0.1, "news": chosen["delta"] - 0.1},
            "pruned_domains": {"verse": chosen["delta"] + 0.1, "news": chosen["delta"] - 0.1},
        },
        "parameters": 20_000,
        "pruned_parameters": chosen["parameters"],
        "energy": "fisher",
        "spearman": 0.5,
        "candidates": candidates,
        "spectra": {"fisher": "spectrum-fisher.json"},
        "certified": {"fisher": True},
        "calibration": {"data": "starter", "samples": 60, "total_tokens": 4000, "hash": "a" * 64},
        "held_out": {"data": "starter", "samples": 8, "total_tokens": 800, "hash": "b" * 64},
        "settings": {"seed": 0},
        "checkpoint": "model",
        "provenance": {
            "command": f"excise run {name} --remove {budget} --out run",
            "time": "2026-01-01T00:00:00+00:00",
            "versions": {"excise": "0.1.0"},
            "machine": {"cpus": 2},
        },
        "self_test": {
            "passed": True,
            "level": "generates",
            "failed": [],
            "untested": {},
            "max_abs_logit_difference": 0.0,
        },
        "seconds": {"gradients": 1.0, "solve": 2.5},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return facts


def add_spectra(folder: Path, budgets: range, blocks: int = 12) -> None:
    """What `excise solve --remove LOW..HIGH --out spectra-fisher.json` writes."""
    energy = fisher(gradients(blocks).blocks())
    spectra = [lowest(energy, budget).to_json() for budget in budgets]
    (folder / "spectra-fisher.json").write_text(json.dumps({"spectra": spectra}))


def add_comparison(folder: Path, budgets: tuple[int, ...] = (2, 3)) -> None:
    """What `excise compare` writes: a clear winner, two that are not told apart, a merge."""
    rows = [
        {
            "method": method,
            "remove": budget,
            "removed": list(range(1, budget + 1)),
            "merge": "average" if method == "swm-code" else None,
            "delta": delta * budget,
            "interval": [delta * budget - 0.05, delta * budget + 0.05],
            "behind": (delta - 0.1) * budget,
            "behind_interval": [(delta - 0.1) * budget - 0.2, (delta - 0.1) * budget + 0.2],
            "perplexity": math.exp(3.0 + delta * budget),
            "forward_tokens": 1000.0,
            "backward_tokens": 0.0,
        }
        for budget in budgets
        for method, delta in (("sleb", 0.1), ("norm-ratio", 0.12), ("swm-code", 0.9), ("random", 1.5))
    ]
    facts = {"base_loss": 3.0, "rows": rows, "skipped": {"evopress": "too slow"}, "model": "org/model", "blocks": 12}
    (folder / "compare.json").write_text(json.dumps(facts))


ORIGINAL = Model("0" * 64, "org/model", (), 12, None, None, False, 20_000, 80_000)
PRUNED = Model("1" * 64, "run/model", (1, 4, 5), 12, "norm-ratio", "org/model", False, 17_000, 68_000)
HEALED = Model("2" * 64, "run/healed", (1, 4, 5), 12, "norm-ratio", "org/model", True, 17_000, 68_000)


def scores() -> Scores:
    """Two benchmarks, a perplexity and a speed of three models."""
    found = Scores(provenance={"command": "excise evaluate run"})
    for model, accuracy in ((ORIGINAL, 0.7), (PRUNED, 0.5), (HEALED, 0.62)):
        settings = {"shots": None, "limit": None, "chat_template": False, "lm_eval": "0.4.13"}
        details = {"samples": 100, "of_samples": 200, "shots": 0, "dataset": {"path": "org/arc", "name": "easy"}}
        for task, error in (("arc_easy", 0.02), ("winogrande", 0.2)):
            metrics = {"acc,none": Metric(accuracy, error), "acc_norm,none": Metric(accuracy + 0.01, error)}
            found = found.adding(model, Result(model.hash, "benchmark", task, settings, metrics, details))
        perplexity = {"perplexity": Metric(10 / accuracy, 0.3, False)}
        text = Result(model.hash, "perplexity", "wiki.txt", {}, perplexity, {"tokens": 1000, "window": 128})
        speed = {
            "prefill_tokens_per_second": Metric(1000 / accuracy),
            "decode_tokens_per_second": Metric(50.0),
            "weight_bytes": Metric(model.bytes, None, False),
            "cache_bytes_per_token": Metric(64, None, False),
            "peak_bytes": Metric(1e8, None, False),
        }
        where = {"device": "cpu", "batch": 1}
        timed = Result(model.hash, "speed", "speed", where, speed, {"dtype": "float32", "prompt_tokens": 512})
        found = found.adding(model, text, timed)
    return found


def add_healing(folder: Path, name: str = "healed", steps: int = 300) -> None:
    """What `excise heal` writes."""
    (folder / name).mkdir()
    curve = [{"step": k + 1, "loss": 2.0 / (k + 1) + 0.5} for k in range(steps)]
    facts = {"student": "run/model", "losses": {"original": 3.0, "pruned": 4.0, "healed": 3.25}, "steps": steps}
    (folder / name / "heal.json").write_text(json.dumps({**facts, "curve": curve}))


def add_refinement(folder: Path, budget: int = 3) -> None:
    """What `excise refine` writes into its folder."""
    place = folder / "refined"
    place.mkdir()
    finalist = {"removed": [1, 4, 5], "predicted": 0.4, "damage": 0.5, "error": 0.02, "tokens": 768}
    rounds = [
        {"proposed": [[1, 4, 5], [1, 4, 6]], "best": 0.5, "predicted": [0.4, 0.7], "measured": [0.5, float("inf")]}
    ]
    measured = [
        {"removed": removed, "damage": damage, "error": 0.01}
        for removed, damage in (([4], 0.1), ([5], 0.2), ([0], None), ([1, 4, 5], 0.5))
    ]
    facts = {"removed": [1, 4, 5], "finalists": [finalist], "rounds": rounds, "anchors": [[2.9, 3.1], [0.9, 0.8]]}
    facts["measured"] = measured
    found = {str(budget): {**facts, "random_rho": 0.97, "low_rho": None}}
    (place / "candidates.json").write_text(json.dumps({"model": "org/model", "budgets": found}))
    energy = fisher(gradients().blocks())
    energy.save(place / f"energy-{budget}.safetensors")
    lowest(energy, budget, 5).save(place / f"spectrum-fitted-{budget}.json")


def add_panel(folder: Path, said: str = "a cat") -> None:
    """What `excise evaluate --panel` writes: arithmetic lost, refusals kept, agreement, one question of each kind."""

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    def row(group: str, name: str, variant: str, unit: str, *values: float | None) -> dict[str, Any]:
        figures = [None if value is None else figure(value) for value in values]
        differences = [] if values[0] is None else [figure(value - values[0]) for value in values[1:]]
        facts = {"group": group, "name": name, "variant": variant, "unit": unit, "higher_is_better": True}
        return {**facts, "samples": 8, "figures": figures, "differences": differences, "chance": None, "note": ""}

    rows = [
        row("capabilities", "arithmetic", "", "share", 0.75, 0.25),
        row("capabilities", "refusals", "", "share", 0.5, 0.55),
        row("capabilities", "refusals", "due", "share", 0.5, 0.5),
        row("agreement", "KL from the original", "", "nats", None, 0.4),
    ]
    exchanges = [
        {"name": f"{c}-{k}", "capability": c, "variant": "", "prompt": f"Question {k} of {c}?", "said": [
            {"text": said, "tokens": 3, "ended": True, "passed": passed} for passed in (True, False)
        ]}
        for c in ("arithmetic", "refusals") for k in range(3)
    ]  # fmt: skip
    models = [{"name": "org/model", "removed": []}, {"name": "run/model", "removed": [1, 4, 5]}]
    (folder / "panel.json").write_text(json.dumps({"models": models, "rows": rows, "exchanges": exchanges}))


def full_folder(folder: Path, **options: Any) -> dict[str, Any]:
    """A run with everything there is."""
    facts = run_folder(folder, speed=SPEED, **options)
    add_spectra(folder, range(1, 6))
    add_comparison(folder)
    scores().save(folder / "scores.json")
    add_healing(folder)
    add_refinement(folder)
    add_panel(folder)
    return facts
