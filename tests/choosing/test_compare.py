"""The comparison of criteria: rows against plain measurements, intervals against a plain bootstrap, resumption."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from excise.choosing.brief import Brief
from excise.choosing.compare import MANIFEST, WORK, Comparison, compare
from excise.choosing.contest import Contest
from excise.choosing.criteria import CRITERIA, SUBLAYER_CRITERIA
from excise.choosing.intervals import Choice, Judge
from excise.choosing.proposal import Proposal, at_smaller_budget
from excise.context import Context
from excise.errors import InputError
from excise.ising.energies import fisher
from excise.measuring.measure import measure
from excise.models.loading import Loaded, load
from excise.models.stack import find_stack
from excise.repair.repair import repair
from excise.report.comparison import comparison_markdown, write_comparison_figures
from excise.store import Store
from excise.surgery.merge import merging
from tests.contexts import chosen, context_of
from tests.random_samples import random_samples
from tests.svg_files import Figure
from tests.tiny import tiny_folder, tiny_model

LAYERS = 6
METHODS = ("fisher", "norm-ratio", "sleb", "swm-figure", "random", "llm-drop-joint")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("model"), "llama", layers=LAYERS)))


@pytest.fixture(scope="module")
def samples():
    return random_samples(range(6, 30), seed=1), random_samples(range(5, 15), seed=2)


@pytest.fixture(scope="module")
def finished(loaded, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return compared(loaded, samples, [3, 1], out, methods=",".join(METHODS), random_draws=3, search_tokens=60), out


def compared(loaded, samples, budgets, out, *, seed=0, **contest):
    """A comparison of a model in memory, kept in `out`."""
    brief = Brief(max(budgets, default=0), seed=seed)
    context = Context(loaded, Store(out / WORK))
    comparison = compare(context, *samples, brief, budgets, Contest(**contest))
    comparison.save(out / MANIFEST)
    return comparison


def test_rows_say_what_plain_measurement_says(finished, loaded, samples):
    comparison, out = finished
    assert {(row.method, row.remove) for row in comparison.rows} == {(m, b) for m in METHODS for b in (1, 3)}
    stack = loaded.stack
    for row in comparison.rows:
        if row.draws:
            losses = measure(context_of(stack), samples[1], [draw["removed"] for draw in row.draws]).losses
            assert row.delta == pytest.approx(np.mean(losses) - comparison.base_loss, rel=1e-6)
            continue
        if row.sublayers:
            gates = [s.gate for s in stack.sublayers if s.name in row.sublayers]
            loss = measure(context_of(stack), samples[1], [gates], sublayers=True).losses[0]
        else:
            with merging(stack, row.removed, row.merge):
                loss = measure(context_of(stack), samples[1], [row.removed]).losses[0]
        assert row.loss == pytest.approx(loss, rel=1e-6)
        assert row.interval[0] <= row.delta <= row.interval[1]
    assert json.dumps(Comparison.load(out / "compare.json").to_json()) == json.dumps(comparison.to_json())
    written = json.loads((out / "compare.json").read_text())
    keys = {"method", "remove", "removed", "loss", "delta", "interval", "forward_tokens", "backward_tokens", "seconds"}
    assert all(row.keys() >= keys for row in written["rows"])
    best = [row for row in comparison.rows if row.behind == 0]
    assert {row.remove for row in best} == {1, 3}


def test_intervals_are_those_of_a_plain_paired_bootstrap():
    stack = find_stack(tiny_model("llama", LAYERS))
    generator = np.random.default_rng(0)
    counts, base = generator.integers(5, 30, 40).astype(float), generator.gamma(9, 4, 40)
    sums = [base + shift * counts + generator.normal(0, 3, 40) for shift in (0.5, 0.8)]
    choices = [Choice(f"m{i}", 1, 0, Proposal(f"m{i}", (i,)), s) for i, s in enumerate(sums)]
    rows = Judge(stack, fisher(generator.normal(size=(60, 12))), base, counts).rows(choices)
    picks = generator.integers(0, 40, (20_000, 40))
    for row, values in zip(rows, sums, strict=True):
        replicates = (values - base)[picks].sum(axis=1) / counts[picks].sum(axis=1)
        np.testing.assert_allclose(row.interval, np.quantile(replicates, [0.025, 0.975]), atol=0.02)
    paired = (sums[1] - sums[0])[picks].sum(axis=1) / counts[picks].sum(axis=1)
    np.testing.assert_allclose(rows[1].behind_interval, np.quantile(paired, [0.025, 0.975]), atol=0.02)


def test_what_is_done_is_not_done_again(finished, loaded, samples):
    comparison, out = finished
    kept = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*") if path.is_file()}
    forwards = []
    handle = loaded.stack.model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    again = compared(loaded, samples, [3, 1], out, methods=",".join(METHODS), random_draws=3, search_tokens=60)
    handle.remove()
    assert not forwards
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert [replace(row, seconds=0) for row in again.rows] == [replace(row, seconds=0) for row in comparison.rows]


def test_a_method_that_cannot_run_is_left_out_with_its_reason(samples, tmp_path):
    mixtral = Loaded(find_stack(tiny_model("mixtral", LAYERS)), None, "mixtral", None)
    with pytest.warns(UserWarning, match="swm-code is left out"):
        comparison = compared(mixtral, samples, [2], tmp_path, methods="swm-code,first")
    assert [row.method for row in comparison.rows] == ["first"]
    assert "dense pre-norm blocks" in comparison.skipped["swm-code"]


def test_all_is_everything_but_the_published_evolution():
    assert set(Contest().names()) == {*CRITERIA, *SUBLAYER_CRITERIA} - {"evopress"}
    assert Contest(methods="first, all").names()[0] == "first"
    with pytest.raises(InputError, match=r"expected --methods 'all' or some of .*, got \['best'\]"):
        Contest(methods="best")


def test_the_docs_name_every_criterion():
    page = Path(__file__).parents[2] / "docs/compare.md"
    rows = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == {*CRITERIA, *SUBLAYER_CRITERIA}


@pytest.mark.parametrize("budgets", [[0], [6], [2, 9]])
def test_budgets_out_of_range_are_refused(loaded, samples, tmp_path, budgets):
    with pytest.raises(InputError, match="between 1 and 5"):
        compared(loaded, samples, budgets, tmp_path, methods="first")


NESTED = (
    "block-influence", "block-influence-iterative", "prune-and-comp", "norm-ratio", "shortened-llama-perplexity",
    "shortened-llama-taylor", "sleb", "cooperative-game", "block-pruner", "llm-drop-joint",
)  # fmt: skip


@pytest.mark.parametrize("method", NESTED)
def test_one_nested_search_gives_what_a_search_at_each_budget_gives(method):
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples(seed=4)
    criterion = {**CRITERIA, **SUBLAYER_CRITERIA}[method]
    whole = chosen(criterion, stack, samples, 4)
    for budget in (1, 2, 3, 4):
        nested, alone = at_smaller_budget(whole, stack, budget), chosen(criterion, stack, samples, budget)
        assert nested.removed == alone.removed
        assert nested.sublayers == alone.sublayers
        assert nested.cost.forward_tokens == pytest.approx(alone.cost.forward_tokens)


def test_searches_of_their_own_give_no_smaller_budget():
    stack, samples = find_stack(tiny_model("llama", LAYERS)), random_samples(seed=4)
    for method in ("fisher", "angular-distance", "swm-figure", "random", "last"):
        assert at_smaller_budget(chosen(CRITERIA[method], stack, samples, 3), stack, 2) is None


def test_table_and_figures_show_every_method(finished, tmp_path):
    comparison, _ = finished
    text = comparison_markdown(comparison)
    for method in METHODS:
        assert text.count(f"| {method} |") == 2
    assert text.count("●") >= 2
    odd = replace(comparison.rows[0], domains={"a|b": 0.5, "c": 0.1})
    assert r"| a\|b +0.50 |" in comparison_markdown(replace(comparison, rows=(odd,)))
    names = write_comparison_figures(comparison, tmp_path / "figures")
    budgets = {row.remove for row in comparison.rows}
    assert set(names) == {"damage_against_budget", "damage_against_cost", *(f"damage-{m}" for m in budgets)}
    for name in names.values():
        figure = Figure(tmp_path / name)
        for method in METHODS:
            assert method in figure.texts
            assert any(tip.startswith(f"{method}, M = ") for tip in figure.tips)


def test_a_comparison_with_repair_is_of_the_damage_after_it_where_blocks_are_dropped(loaded, samples, tmp_path):
    methods = ("norm-ratio", "swm-figure", "random", "llm-drop-joint")
    comparison = compared(
        loaded, samples, [2], tmp_path, methods=",".join(methods), random_draws=2, seed=3, repair=True
    )
    rows = {row.method: row for row in comparison.rows}
    assert rows["swm-figure"].pruned_delta is rows["llm-drop-joint"].pruned_delta is None
    for row in (rows["norm-ratio"], rows["random"]):
        removals = [draw["removed"] for draw in row.draws] or [row.removed]
        if any(0 in removed for removed in removals):
            assert row.pruned_delta is None
            continue
        losses = [repair(context_of(loaded.stack), r, samples[0], held_out=samples[1]).losses for r in removals]
        assert row.delta == pytest.approx(np.mean([loss.delta_after for loss in losses]), abs=1e-6)
        assert row.pruned_delta == pytest.approx(np.mean([loss.delta_before for loss in losses]), abs=1e-6)
        assert row.interval[0] <= row.delta <= row.interval[1]
    assert any(row.pruned_delta is not None for row in rows.values())
    assert [row.delta for row in comparison.rows] == sorted(row.delta for row in comparison.rows)
    text = comparison_markdown(comparison)
    assert "| Δ loss [95 %] | before repair | worst domain | perplexity |" in text
    shown = next(row for row in rows.values() if row.pruned_delta is not None)
    assert f"] | {shown.pruned_delta:+.3f} | " in text
