"""The main job on a tiny model."""

import json
import math

import numpy as np
import pytest
import torch

from excise.choosing import engines, timing
from excise.choosing.judged import halves
from excise.context import Context
from excise.data import split_samples
from excise.drawing.axes import signed
from excise.errors import InputError, OutputError
from excise.evaluation.panel.answers import ask, prompts_of
from excise.evaluation.panel.panel import Panel
from excise.evaluation.panel.questions import first_questions
from excise.ising.gradients import Gradients
from excise.ising.spectrum import Spectrum
from excise.ising.times import Latency, Request, Times
from excise.measuring.measure import measure
from excise.models.identity import model_identity
from excise.models.loading import load
from excise.progress import Progress, silent
from excise.report.figures import write_report_figures
from excise.report.material import gather
from excise.run import RunResult, RunSettings, run
from excise.settings import values_of
from tests.contexts import context_of
from tests.gguf_files import write_gguf
from tests.quantised import quantise
from tests.surgery.test_on_disk import tensors_of
from tests.svg_files import Figure
from tests.tiny import tiny_folder, tiny_model


def run_in(out, loaded, samples, remove, *, progress=None, **options):
    """A run of a model in memory, without the panel, which the tests about it ask for."""
    settings = RunSettings(model=loaded.source, remove=remove, out=out, **{"panel": False, **options})
    return run(loaded, *samples, settings, progress=progress)


def as_written(candidate):
    """Loss of a candidate, repaired where that lowers it."""
    return min(candidate.loss, candidate.repaired_loss or candidate.loss)


RUN_KEYS = {"removed", "proposed_by", "base_loss", "pruned_loss", "candidates", "self_test", "seconds", "provenance"}
STAGES = {"gradients", "refine", "solve", "rivals", "verify", "repair", "prune", "self_test", "report"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("model"), "llama", layers=6)))


@pytest.fixture(scope="module")
def samples(loaded):
    return split_samples("starter", loaded.tokenizer, samples=20, held_out=6, tokens=24, seed=0, loss_on="all")


@pytest.fixture(scope="module")
def finished(loaded, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return run_in(out, loaded, samples, 2, states=10), out


def test_the_manifest_says_what_was_done(finished):
    facts, out = finished
    assert json.loads((out / "run.json").read_text()).keys() >= RUN_KEYS
    assert json.dumps(RunResult.load(out / "run.json").to_json()) == json.dumps(facts.to_json())
    assert facts.seconds.keys() >= STAGES
    assert facts.self_test["loads_in_stock_transformers"]
    assert facts.self_test["cache_agrees"]
    assert facts.self_test["max_abs_logit_difference"] < 1e-4
    for candidate in facts.candidates:
        assert candidate.method
        assert len(candidate.removed) == 2


def test_the_lowest_measured_candidate_is_removed_and_its_proposers_are_named(finished, loaded, samples):
    facts, _ = finished
    tied = {tuple(each["removed"]) for each in facts.choice["tied"]}
    assert {min(facts.candidates, key=as_written).removed, facts.removed} <= tied
    assert set(facts.proposed_by) == {c.method for c in facts.candidates if c.removed == facts.removed}
    choosing, judging = halves(samples[1])
    assert facts.choice["samples"]["hash"] == choosing.hash != judging.hash == facts.held_out["hash"]
    # What chose and what is told of the choice are of different samples.
    chosen = next(c for c in facts.candidates if c.removed == facts.removed)
    for part, losses in (
        (judging, [facts.base_loss, facts.pruned_loss]),
        (choosing, [facts.choice["base_loss"], chosen.loss]),
    ):
        again = measure(context_of(loaded.stack), part, [(), facts.removed])
        np.testing.assert_allclose(again.losses, losses, rtol=1e-6)
    assert facts.damage["delta"] == pytest.approx(facts.checkpoint_loss - facts.base_loss)
    weights = {name: sum(s.targets for s in judging if s.category == name) for name in facts.damage["domains"]}
    mean = sum(facts.damage["domains"][name] * weights[name] for name in weights) / sum(weights.values())
    assert mean == pytest.approx(facts.damage["delta"])


def test_three_are_repaired_and_what_is_written_is_what_was_measured(finished, samples):
    facts, out = finished
    fitted = {tuple(r["removed"]): r["losses"] for r in facts.repair["fitted"]}
    refused = {tuple(r["removed"]) for r in facts.repair["refused"]}
    # What refinement found by damage after repair, however it measures without, and then the lowest without.
    refined = [c.removed for c in facts.candidates if c.method in ("refined:0", "refined:1")]
    ranked = list(dict.fromkeys([*refined, *(tuple(c.removed) for c in facts.candidates)]))
    assert set(ranked[:3]) == set(fitted) | refused
    for candidate in facts.candidates:
        losses = fitted.get(tuple(candidate.removed))
        assert candidate.repaired_loss == (losses and losses["repaired"])
    assert facts.repair["applied"] == (facts.checkpoint_loss < facts.pruned_loss)
    written = load(str(out / "model"), dtype="float32")
    judging = halves(samples[1])[1]
    assert measure(context_of(written.stack), judging, [()]).losses[0] == pytest.approx(facts.checkpoint_loss, abs=1e-5)
    assert not any("repaired" in path.name for path in out.iterdir())


def test_without_repair_the_lowest_measured_removal_is_written_as_it_is(loaded, samples, tmp_path):
    facts = run_in(tmp_path / "run", loaded, samples, 2, effort=0, random_states=1, rivals=(), repair=False)
    assert facts.repair is None
    assert facts.checkpoint_loss == facts.pruned_loss
    assert facts.candidates[0].removed in [tuple(each["removed"]) for each in facts.choice["tied"]]
    assert all(c.repaired_loss is None for c in facts.candidates)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "are unchanged.\n" in card


def test_what_cannot_be_repaired_exactly_is_left_with_the_reason(tmp_path):
    shared = load(str(tiny_folder(tmp_path / "model", "gemma4_text", layers=5)))
    drawn = split_samples("starter", shared.tokenizer, samples=20, held_out=4, tokens=20, seed=0, loss_on="all")
    with pytest.warns(
        UserWarning, match=r"not repaired \(--no-repair leaves this out\).*keys and values of blocks below"
    ):
        facts = run_in(tmp_path / "run", shared, drawn, 2, effort=0, random_states=1, rivals=())
    assert not facts.repair["applied"]
    assert len(facts.repair["refused"]) == 3
    assert facts.self_test["max_abs_logit_difference"] < 1e-4


def test_every_artefact_can_be_read_back(finished):
    facts, out = finished
    assert Gradients.load(out / "gradients.safetensors").A.shape == (20, 12)
    for name in facts.spectra.values():
        spectrum = Spectrum.load(out / name)
        assert spectrum.certified
        assert len(spectrum) == 10
    for name in facts.figures.values():
        assert Figure(out / name).title
    drawn = {name: (out / name).read_bytes() for name in facts.figures.values()}
    assert write_report_figures(gather(out)) == facts.figures
    assert drawn == {name: (out / name).read_bytes() for name in drawn}


def test_a_run_writes_its_page_with_all_budgets_around_its_own(finished):
    facts, out = finished
    assert {"damage_of_budgets", "energy_and_loss-2", "couplings"} <= facts.figures.keys()
    material = gather(out)
    assert [*material.spectra["fitted"]] == [1, 2, 3, 4]
    assert all(spectrum.certified for spectrum in material.spectra["fitted"].values())
    page = (out / "report.html").read_text()
    assert "Blocks removed, M" in page
    assert 'type="range" id="budget"' in page
    for number in (facts.damage["delta"], facts.pruned_loss - facts.base_loss):
        assert signed(number) in page


def test_select_energy_removes_the_ground_state(loaded, samples, tmp_path):
    facts = run_in(tmp_path / "run", loaded, samples, 2, select="energy", effort=0, rivals=(), random_states=0)
    assert facts.removed == Spectrum.load(tmp_path / "run" / "spectrum-fisher.json")[0].removed
    assert "fisher:0" in facts.proposed_by


@pytest.mark.parametrize("options", [{"select": "refined"}, {"objective": "acceptance"}])
def test_select_refined_removes_what_refinement_found(loaded, samples, tmp_path, options):
    facts = run_in(tmp_path / "run", loaded, samples, 2, rivals=(), random_states=0, **options)
    found = json.loads((tmp_path / "run" / "candidates.json").read_text())
    assert found["objective"] == options.get("objective", "kl")
    assert facts.selected_by == "refined"
    assert list(facts.removed) == found["budgets"]["2"]["removed"]
    assert "refined:0" in facts.proposed_by
    assert facts.energy == "fitted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "best"}, "--select in measured, refined, energy"),
        ({"effort": -1.0}, "--effort expects a finite number, at least 0"),
        ({"effort": 0, "energy": "fitted"}, "needs an --effort above 0"),
        ({"effort": 0, "select": "refined"}, "needs an --effort above 0"),
        ({"protect": (1, 2), "force_blocks": (2,)}, "2 cannot both stay and go"),
        ({"force_blocks": (1, 2, 3)}, "at most as many as --remove"),
        ({"solver": "nonsense"}, "--solver in auto, "),
        ({"rivals": ("norm-ratio", "magic")}, "--rivals in .*got 'magic'"),
        ({"objective": "kl:0.7,choices:0.3"}, "needs questions"),
    ],
)
def test_choices_that_make_no_sense_are_refused(loaded, samples, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run_in(tmp_path / "run", loaded, samples, 2, **options)


def test_protected_blocks_stay_and_forced_blocks_go_whoever_proposes(loaded, samples, tmp_path):
    facts = run_in(tmp_path / "run", loaded, samples, 3, protect=(0, -1), force_blocks=(2,))
    for candidate in facts.candidates:
        assert 2 in candidate.removed
        assert not {0, 5} & set(candidate.removed)


@pytest.mark.parametrize("model_type", ["nemotron_h", "jamba", "gemma4_text"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_whose_blocks_are_tied_to_each_other(model_type, tmp_path):
    tied = load(str(tiny_folder(tmp_path / "model", model_type, layers=6)))
    drawn = split_samples("starter", tied.tokenizer, samples=20, held_out=4, tokens=20, seed=0, loss_on="all")
    facts = run_in(tmp_path / "run", tied, drawn, 2, effort=1, verify_states=2, random_states=1, rivals=("norm-ratio",))
    assert facts.self_test["loads_in_stock_transformers"]
    assert facts.self_test["max_abs_logit_difference"] < 1e-3
    for candidate in facts.candidates:
        assert not set(tied.stack.fixed) & set(candidate.removed)
        assert not tied.stack.needed or set(tied.stack.needed) - set(candidate.removed)


@pytest.mark.parametrize("form", ["modelopt", "fp8"])
def test_a_float8_folder_stays_one_byte_for_byte(form, tmp_path):
    source = tiny_folder(tmp_path / "model", "llama", layers=4, dtype=torch.bfloat16)
    quantise(source, form, keep=("layers.3.mlp",))
    float8 = load(str(source))
    drawn = split_samples("starter", float8.tokenizer, samples=8, held_out=3, tokens=20, seed=0, loss_on="all")
    facts = run_in(tmp_path / "run", float8, drawn, 1, effort=0, rivals=(), random_states=0, protect=(3,))
    (gone,) = facts.removed
    expected = {}
    for name, stored in tensors_of(source).items():
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if not head.isdigit():
            expected[name] = stored
        elif int(head) != gone:
            expected[f"model.layers.{int(head) - (int(head) > gone)}.{rest}"] = stored
    assert tensors_of(tmp_path / "run" / "model") == expected
    assert any(dtype == "F8_E4M3" for dtype, _, _ in expected.values())
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["quantization_config"]
    assert "model.layers.2.mlp.up_proj" in settings["ignore" if form == "modelopt" else "modules_to_not_convert"]
    assert facts.self_test["loads_in_stock_transformers"] is None
    assert (facts.self_test["level"], facts.self_test["max_abs_logit_difference"]) == ("generates", 0)


def test_a_gguf_file_becomes_a_folder_of_plain_weights(tmp_path):
    write_gguf(tiny_model("llama", 4), tmp_path / "a.gguf")
    plain = load(str(tmp_path / "a.gguf"))
    drawn = split_samples("starter", plain.tokenizer, samples=8, held_out=3, tokens=20, seed=0, loss_on="all")
    facts = run_in(tmp_path / "run", plain, drawn, 1, effort=0, rivals=(), random_states=0)
    assert facts.self_test["loads_in_stock_transformers"]
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "run" / "model").values()} == {"F32"}


def test_a_finished_run_is_not_replaced_and_an_interrupted_one_goes_on(loaded, samples, tmp_path):
    out = tmp_path / "run"

    class Stop(Exception):
        pass

    def stop_in_verify(stage, tokens):
        if stage == "held-out":
            raise Stop
        return silent(stage, tokens)

    with pytest.raises(Stop):
        run_in(out, loaded, samples, 2, states=10, progress=Progress(stop_in_verify))
    assert not (out / "run.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*") if path.is_file()}
    assert kept
    facts = run_in(out, loaded, samples, 2, states=10)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(OutputError, match="--force"):
        run_in(out, loaded, samples, 2, states=10)
    assert run_in(out, loaded, samples, 2, states=10, force=True).removed == facts.removed
    assert len(run_in(out, loaded, samples, 3, effort=0, force=True).removed) == 3


def test_a_folder_of_something_else_is_refused(loaded, samples, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not written by excise"):
        run_in(tmp_path, loaded, samples, 2)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("budget", [0, 6, 40])
def test_a_budget_out_of_range_is_refused_with_the_range(loaded, samples, tmp_path, budget):
    with pytest.raises(InputError, match="between 1 and 5" if budget else "at least 1"):
        run_in(tmp_path / "run", loaded, samples, budget)


def test_calibration_and_held_out_samples_are_disjoint(samples):
    calibration, held_out = samples
    assert (len(calibration), len(held_out)) == (20, 6)
    assert not {s.name for s in calibration} & {s.name for s in held_out}


def test_a_small_source_is_split_with_a_warning(loaded, tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"text": f"sentence number {i} of ten"}) + "\n" for i in range(10)))
    with pytest.warns(UserWarning, match="8 to calibrate, 2 held out"):
        split_samples(str(data), loaded.tokenizer, samples=20, held_out=6, tokens=24, seed=0, loss_on="all")


def test_what_remains_keeps_the_pattern_that_other_readers_take_from_the_index(tmp_path):
    oss = load(str(tiny_folder(tmp_path / "model", "gpt_oss", layers=8)))
    drawn = split_samples("starter", oss.tokenizer, samples=20, held_out=4, tokens=20, seed=0, loss_on="all")
    options = {"effort": 1, "random_states": 3, "rivals": ("last",), "repair": False}
    facts = run_in(tmp_path / "run", oss, drawn, 2, portable=("vllm", "llama.cpp"), **options)
    kinds = oss.stack.config.layer_types
    for candidate in facts.candidates:
        kept = [kinds[i] for i in range(8) if i not in candidate.removed]
        assert kept == kinds[:6]
    assert facts.certified["fisher"]
    assert len({c.removed for c in facts.candidates if c.method.startswith("random")}) > 1
    recipe = json.loads((tmp_path / "run" / "model" / "excise.json").read_text())
    assert {"vllm", "llama.cpp"} <= set(recipe["readers"]["right"])


def test_a_run_repeats_its_own_settings(loaded, samples, finished, tmp_path):
    first, out = finished
    values = values_of(RunSettings, json.loads((out / "run.json").read_text())["settings"])
    again = run(loaded, *samples, RunSettings(**values, out=tmp_path / "again"))
    assert again.removed == first.removed
    assert again.candidates == first.candidates
    assert again.checkpoint_loss == first.checkpoint_loss


def test_the_panel_asks_what_was_written_and_the_original(tmp_path):
    loaded = load(str(tiny_folder(tmp_path / "model", "llama", layers=6, max_position_embeddings=4096)))
    drawn = split_samples("starter", loaded.tokenizer, samples=20, held_out=4, tokens=24, seed=0, loss_on="all")
    out = tmp_path / "run"
    facts = run_in(out, loaded, drawn, 2, effort=0, random_states=1, rivals=(), panel=True)
    panel = Panel.load(out / "panel.json")
    assert facts.seconds["panel"] > 0
    assert panel.questions["limit"] == 2
    assert [model.removed for model in panel.models] == [(), facts.removed]
    assert [model.blocks for model in panel.models] == [6, 6]
    # The original's own blocks without those removed answer as what was written does.
    written = Context(load(str(out / "model"), dtype="float32"))
    prompts, _ = prompts_of(written, first_questions(2))
    answers = ask(written, prompts)
    assert [e.said[1].text for e in panel.exchanges] == [answer.text for answer in answers.values()]
    assert panel.exchanges[0].said[0].text != panel.exchanges[0].said[1].text
    card = (out / "model" / "README.md").read_text()
    assert card.index("## Capabilities") < card.index("## Spectrum") < card.index("## Use")


def test_a_model_that_does_not_generate_is_pruned_all_the_same(tmp_path, monkeypatch):
    loaded = load(str(tiny_folder(tmp_path / "model", "llama", layers=6, max_position_embeddings=4096)))
    drawn = split_samples("starter", loaded.tokenizer, samples=20, held_out=4, tokens=24, seed=0, loss_on="all")
    monkeypatch.setattr(loaded.stack.model, "generate", None)
    with pytest.warns(UserWarning, match=r"no panel \(--no-panel leaves it out\): this llama does not generate"):
        run_in(tmp_path / "run", loaded, drawn, 2, effort=0, random_states=1, rivals=(), panel=True)
    assert (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "panel.json").exists()


@pytest.mark.parametrize(
    ("asked", "least"), [({"remove_params": "30%"}, 0.3), ({"remove_bytes": "45%", "effort": 2}, 0.45)]
)
def test_an_amount_is_met_by_everyone_who_proposes(loaded, samples, tmp_path, asked, least):
    facts = run_in(tmp_path / "run", loaded, samples, None, random_states=2, **{"effort": 0, **asked})
    # Blocks alike: as many as it takes, or, where that is just met, one more.
    counts = {len(candidate.removed) for candidate in facts.candidates}
    assert counts == {math.ceil(6 * least)}
    assert facts.budget == len(facts.removed) == math.ceil(6 * least)
    assert facts.asked in ("--remove-params 30%", "--remove-bytes 45%")
    assert facts.speed is None
    assert {c.method.split(":")[0] for c in facts.candidates} >= {"fisher", "block-influence", "random"}
    assert Spectrum.load(tmp_path / "run" / facts.spectra["fisher"]).budget is None


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return load(str(tiny_folder(tmp_path_factory.mktemp("hybrid"), "nemotron_h")))


def test_what_is_fast_enough_is_removed_and_timed(hybrid, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "FEWEST", 1)
    monkeypatch.setattr(engines, "LONGEST", 0.0)
    place, out = tmp_path / "times.json", tmp_path / "run"
    kinds = timing.block_kinds(hybrid.stack)
    seconds = {"mamba": 3.0, "moe": 1.0}
    blocks = tuple(Latency(seconds.get(kind, 0.5), 1.0) for kind in kinds)
    whole = Latency(2 + sum(block.prefill for block in blocks), 2 + float(len(blocks)))
    identity, facts = model_identity(hybrid.stack.model), {"turns": 5, "error": 0.0, "machine": {}, "provenance": {}}
    facts["engine"] = "transformers"
    times = Times("m", identity, Request(8, 2), whole, kinds, blocks, **facts)
    times.save(place)
    drawn = split_samples("starter", hybrid.tokenizer, samples=16, held_out=4, tokens=20, seed=0, loss_on="all")
    asked = {"speedup": 1.4, "latency_of": "prefill", "times": place, "effort": 1, "rivals": ("block-influence",)}
    found = run_in(out, hybrid, drawn, None, random_states=1, **asked)
    assert found.asked == "--speedup 1.4"
    for candidate in found.candidates:
        assert times.speedups(times.without(candidate.removed))["prefill"] >= 1.4
    refined = [c for c in found.candidates if c.method.startswith("refined")]
    assert refined
    assert found.speed["predicted"] == times.speedups(times.without(found.removed))
    assert found.speed["measured"].keys() == found.speed["predicted"].keys()
    with pytest.raises(InputError, match=r"--speedup 9.0 stands for .* times as fast"):
        run_in(tmp_path / "other", hybrid, drawn, None, **{**asked, "speedup": 9.0})
    assert not (tmp_path / "other").exists()


def test_times_are_measured_where_none_are_given(loaded, samples, tmp_path, monkeypatch):
    # Of one pass on a busy machine no block may seem to take any time.
    monkeypatch.setattr(engines, "FEWEST", 5)
    monkeypatch.setattr(engines, "LONGEST", 0.0)
    request = {"prompt_tokens": 4, "new_tokens": 2}
    asked = {"remove_latency": "1%", "latency_of": "prefill", **request}
    facts = run_in(tmp_path / "run", loaded, samples, None, effort=0, rivals=(), random_states=1, **asked)
    times = Times.load(tmp_path / "run" / "times.json")
    assert times.request == Request(**request)
    assert times.weights("prefill").whole * 0.01 <= sum(times.weights("prefill").units[i] for i in facts.removed)
    assert facts.seconds["times"] > 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"remove": None}, "expected one of --remove .* got none of them"),
        ({"remove": 2, "speedup": 1.5}, "got --remove 2 and --speedup 1.5"),
        ({"remove_params": "1%", "remove_bytes": "1%"}, "got --remove-params 1% and --remove-bytes 1%"),
        ({"remove": 2, "times": "times.json"}, "--times says how long blocks take; it needs --speedup"),
        ({"speedup": 1.0}, "--speedup expects a finite number, above 1"),
    ],
)
def test_one_budget_is_asked_for(asked, message, tmp_path):
    values = {"model": "m", "out": tmp_path / "run", **asked}
    if "times" in values:
        values["times"] = tmp_path / values["times"]
    with pytest.raises(InputError, match=message):
        RunSettings(**values)
