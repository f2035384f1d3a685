"""The command line: verbs chained through their artefacts, and errors that say what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.gguf_files import write_gguf
from tests.svg_files import Figure
from tests.tiny import tiny_folder, tiny_model

from excise.artefacts import read_json
from excise.choosing import engines
from excise.ising.spectrum import Spectrum
from excise.ising.times import Times


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), "llama", layers=5))


def test_the_stages_chain_through_their_files(excise, model, tmp_path):
    gradients, spectrum, verified = tmp_path / "g.safetensors", tmp_path / "spectrum-fisher.json", tmp_path / "v.json"
    assert excise("score", model, "--samples", 24, "--tokens", 24, "--out", gradients)[0] == 0
    code, out, _ = excise("solve", gradients, "--remove", 2, "--states", 3, "--out", spectrum, "--json")
    states = json.loads(out)
    assert code == 0
    assert states["certified"]
    assert len(states["states"]) == 3
    code, out, _ = excise(
        "verify", model, "--spectrum", spectrum, "--removed", "1-2", "--gradients", gradients,
        "--samples", 4, "--tokens", 24, "--out", verified, "--json",
    )  # fmt: skip
    measured = json.loads(out)
    assert code == 0
    assert {c["method"] for c in measured["candidates"]} == {"fisher:0", "fisher:1", "fisher:2", "given:1-2"}
    assert measured == {name: value for name, value in read_json(verified).items() if name != "made_by"}
    code, out, _ = excise("prune", model, "--spectrum", spectrum, "--state", 1, "--out", tmp_path / "small", "--json")
    pruned = json.loads(out)
    assert code == 0
    assert pruned["removed"] == states["states"][1]["removed"]
    assert pruned["self_test"]["loads_in_stock_transformers"]
    assert not list(tmp_path.glob(".*work*"))


@pytest.mark.parametrize("rule", ["figure", "code"])
def test_prune_merges_as_well_as_drops(excise, model, tmp_path, rule):
    code, out, _ = excise("prune", model, "--removed", "1-2", "--out", tmp_path / "m", "--merge", rule, "--json")
    pruned = json.loads(out)
    assert code == 0
    assert pruned["merge"] == {"rule": rule, "runs": [{"kept": 0, "removed": [1, 2]}]}
    assert pruned["self_test"]["max_abs_logit_difference"] < 1e-4
    weights = {
        name: load_file(path / "model.safetensors") for name, path in (("m", tmp_path / "m"), ("o", Path(model)))
    }
    kept, top = (weights[w][f"model.layers.{i}.mlp.up_proj.weight"] for w, i in (("m", 0), ("o", 2)))
    assert np.array_equal(kept, top) == (rule == "code")
    assert f"1, 2 into 0 (rule '{rule}'" in (tmp_path / "m" / "README.md").read_text()


def test_run_prints_what_it_writes(excise, model, tmp_path):
    options = ("--remove", 2, "--samples", 24, "--held-out", 4, "--tokens", 24, "--out", tmp_path / "run")
    code, out, _ = excise("run", model, *options, "--json")
    assert code == 0
    assert json.loads(out)["removed"] == json.loads((tmp_path / "run" / "run.json").read_text())["removed"]
    code, _, err = excise("run", model, *options)
    assert (code, "already done" in err) == (0, True)
    code, _, err = excise("run", model, *options, "--seed", 1)
    assert (code, "--force" in err) == (2, True)


def test_run_heals_and_says_so(excise, model, tmp_path):
    options = ("--remove", 2, "--samples", 12, "--held-out", 4, "--tokens", 20, "--effort", 0, "--rivals", "")
    healing = ("--heal-race", 2, "--heal-samples", 16, "--heal-tokens", 16, "--heal-steps", 2, "--heal-batch", 4)
    code, out, err = excise("run", model, *options, *healing, "--out", tmp_path / "run")
    assert code == 0, err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "repaired" in out
    assert out.count("race: ") == 2
    assert f"healed {facts['healed']['losses']['healed']:.4f}" in out
    assert facts["healed"]["steps"] == 2
    assert facts["healed"]["samples"]["samples"] == 16
    assert facts["healed"]["samples"]["tokens"] == 16
    assert facts["healed"]["settings"]["batch"] == 4


def test_run_judges_repairs_and_heals_on_what_it_is_told(excise, model, tmp_path):
    other = tmp_path / "other.jsonl"
    words = ["blocks", "of", "a", "model", "are", "removed", "and", "the", "rest", "is", "measured"]
    rows = [{"text": " ".join(words[i % len(words) :] + words[: i % len(words)] + [str(i)])} for i in range(24)]
    other.write_text("\n".join(map(json.dumps, rows)))
    options = ("--remove", 1, "--samples", 12, "--held-out", 4, "--tokens", 20, "--effort", 0, "--rivals", "")
    elsewhere = ("--held-out-data", other, "--repair-tokens", 64, "--heal", "--heal-data", other)
    healing = ("--heal-train", "cuts", "--heal-samples", 8, "--heal-tokens", 16, "--heal-steps", 1, "--heal-batch", 4)
    code, _, err = excise("run", model, *options, *elsewhere, *healing, "--out", tmp_path / "run")
    assert code == 0, err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["calibration"]["data"] == "starter"
    assert facts["held_out"]["data"] == facts["healed"]["samples"]["data"] == str(other)
    assert facts["settings"]["repair_tokens"] == 64
    assert facts["healed"]["settings"]["train"] == "cuts"


def test_prune_repairs_where_data_is_given(excise, model, tmp_path):
    drawn = ("--samples", 24, "--held-out", 6, "--tokens", 24)
    code, out, err = excise("prune", model, "--removed", "2", "--out", tmp_path / "r", "--data", "starter", *drawn)
    assert code == 0, err
    recipe = json.loads((tmp_path / "r" / "excise.json").read_text())
    kept = recipe.get("repair") or recipe["repair_left_out"]
    assert ("repaired_loss" in recipe) == ("repair" in recipe) == ("repaired in closed form: Δ loss" in out)
    assert kept["losses"]["pruned"] == recipe["pruned_loss"]
    assert "self-test: passed: its logits equal those of the original" in out
    card = (tmp_path / "r" / "README.md").read_text()
    assert ("Loss after repair" in card) == (
        "feed-forward of block 1; feed-forward of block 3, fitted on 24 samples of starter" in card
    )
    weights, original = (load_file(path / "model.safetensors") for path in (tmp_path / "r", Path(model)))
    differing = {
        name for name in original if ".layers.1." in name and not np.array_equal(weights[name], original[name])
    }
    assert differing == ({"model.layers.1.mlp.down_proj.weight"} if "repair" in recipe else set())
    sharing = str(tiny_folder(tmp_path / "sharing", "gemma4_text", layers=6))
    code, _, err = excise("prune", sharing, "--removed", "1", "--out", tmp_path / "x", "--repair", *drawn)
    assert code == 2
    assert "use keys and values of blocks below them" in err
    assert not (tmp_path / "x").exists()


def test_inspect_lists_the_blocks(excise, model):
    code, out, _ = excise("inspect", model, "--json")
    blocks = json.loads(out)["blocks"]
    assert code == 0
    assert [block["index"] for block in blocks] == list(range(5))
    assert blocks[0]["sublayers"] == ["attention", "feed-forward"]
    assert excise("inspect", model)[1].count("LlamaDecoderLayer") == 5


def test_refine_and_compare_write_what_they_print(excise, model, tmp_path):
    options = ("--samples", 24, "--tokens", 24, "--json")
    code, out, _ = excise("refine", model, "--remove", "1,2", "--out", tmp_path / "refined", *options)
    assert code == 0
    found = json.loads(out)
    assert found == read_json(tmp_path / "refined" / "candidates.json")
    assert len(found["budgets"]["2"]["removed"]) == 2
    assert Figure(tmp_path / "refined" / "figures" / "predictions-1.svg").title.endswith("at M = 1")
    spectrum = tmp_path / "refined" / "spectrum-fitted-2.json"
    assert Spectrum.load(spectrum)[0].removed == tuple(found["budgets"]["2"]["spectrum"][0]["removed"])
    methods = ("--methods", "first,norm-ratio", "--eval-samples", 4)
    code, out, _ = excise("compare", model, "--remove", "1,2", "--out", tmp_path / "cmp", *methods, *options)
    assert code == 0
    assert {(row["method"], row["remove"]) for row in json.loads(out)["rows"]} == {
        ("first", 1), ("first", 2), ("norm-ratio", 1), ("norm-ratio", 2),
    }  # fmt: skip
    assert "| norm-ratio |" in (tmp_path / "cmp" / "compare.md").read_text()


def test_solve_takes_any_matrix(excise, tmp_path):
    np.save(tmp_path / "H.npy", np.diag([3.0, 1.0, 2.0, 5.0]))
    code, out, _ = excise("solve", "--hessian", tmp_path / "H.npy", "--remove", 2, "--json")
    assert code == 0
    assert json.loads(out)["states"][0] == {"removed": [1, 2], "energy": 3.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("solve", "--remove", "2"), "either a gradients file or --hessian"),
        (("inspect", "/no/such/folder"), "no folder"),
        (("prune", "x", "--out", "y"), "either --removed"),
        (("prune", "x", "--out", "y", "--removed", "1", "--merge", "mean"), "expected --merge in figure, code"),
        (("prune", "x", "--out", "y", "--removed", "1", "--repair", "--merge", "code"), "leave out --merge"),
        (("prune", "x", "--out", "y", "--removed", "1", "--no-repair", "--data", "starter"), "--no-repair or --data"),
        (("run", "x", "--remove", "2", "--out", "y", "--heal-preset", "large"), "expected --heal-preset in small"),
        (("run", "x", "--remove", "2", "--out", "y", "--heal-lr", "0"), "--heal-lr expects"),
        (("run", "x", "--remove", "2", "--out", "y", "--protect", "a"), "--protect expects indices"),
        (("score", "x", "--placement", "nowhere"), "expected --placement in auto, resident, streamed"),
        (("score", "x", "--max-memory", "cpu=much"), "--max-memory expects each device once, such as 0=20GiB"),
        (
            ("score", "x", "--max-memory", "cpu=1GB", "--device-map", "m.json"),
            "expected one of --max-memory, --device-map",
        ),
        (("heal", "x", "--out", "y", "--teacher", "z", "--teacher-placement", "streamed"), "pass --offline FOLDER too"),
        (("refine", "x", "--remove", "2", "--out", "y", "--effort", "0"), "--effort expects a finite number, above 0"),
        (("compare", "x", "--remove", "4..2", "--out", "y"), "--remove expects a range"),
        (("compare", "x", "--remove", "2", "--out", "y", "--methods", "best"), "expected --methods 'all' or some of"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(excise, arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = excise(*arguments)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert out == ""


def test_interrupt_exits_with_130(excise, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("excise.cli.terminal.load_model", interrupted)
    code, _, err = excise("inspect", "x")
    assert code == 130
    assert "goes on where it stopped" in err


@pytest.fixture
def matrix(tmp_path):
    factor = np.random.default_rng(0).normal(size=(60, 8))
    np.save(tmp_path / "H.npy", factor.T @ factor)
    return tmp_path / "H.npy"


def test_several_budgets_in_one_call_equal_single_ones(excise, matrix, tmp_path):
    code, out, _ = excise(
        "solve", "--hessian", matrix, "--remove", "2..4", "--states", 5, "--figure", tmp_path / "curve.svg", "--json"
    )  # fmt: skip
    spectra = json.loads(out)["spectra"]
    assert code == 0
    assert [s["budget"] for s in spectra] == [2, 3, 4]
    assert len(Figure(tmp_path / "curve.svg").tips) == 3
    for spectrum in spectra:
        single = json.loads(
            excise("solve", "--hessian", matrix, "--remove", spectrum["budget"], "--states", 5, "--json")[1]
        )
        assert single["states"] == spectrum["states"]
    assert excise("solve", "--hessian", matrix, "--remove", "2,4")[1].count("yes") == 2


def test_a_figure_of_another_format_is_refused_before_anything_is_solved(excise, matrix, tmp_path):
    options = ["--remove", "2..4", "--out", tmp_path / "spectra.json", "--figure", tmp_path / "curve.png"]
    code, _, err = excise("solve", "--hessian", matrix, *options)
    assert code == 2
    assert "name it curve.svg" in err
    assert not (tmp_path / "spectra.json").exists()


def test_a_weight_budget_removes_at_least_that_much(excise, matrix, tmp_path):
    weights = np.array([1.0, 5.0, 2.0, 2.0, 7.0, 1.0, 3.0, 3.0])
    np.save(tmp_path / "w.npy", weights)
    code, out, _ = excise(
        "solve", "--hessian", matrix, "--weights", tmp_path / "w.npy", "--remove-weight", "50%", "--json"
    )  # fmt: skip
    states = json.loads(out)["states"]
    assert code == 0
    assert all(12 <= weights[s["removed"]].sum() <= 19 for s in states)
    everything = [[i for i in range(8) if mask >> i & 1] for mask in range(1, 256)]
    H = np.load(matrix)
    lowest = min(H[np.ix_(r, r)].sum() for r in everything if 12 <= weights[r].sum() <= 19)
    assert states[0]["energy"] == pytest.approx(lowest)


def test_kinds_parameters_and_counts_come_from_the_gradients(excise, model, tmp_path):
    gradients = tmp_path / "g.safetensors"
    excise("score", model, "--samples", 40, "--tokens", 24, "--out", gradients)
    sublayers = ("solve", gradients, "--granularity", "sublayer", "--json")
    states = json.loads(excise(*sublayers, "--remove", 3, "--kinds", "attention")[1])["states"]
    assert all(i % 2 == 0 for s in states for i in s["removed"])
    states = json.loads(excise(*sublayers, "--remove", 3, "--at-most", "attention=1")[1])["states"]
    assert all(sum(i % 2 == 0 for i in s["removed"]) <= 1 for s in states)
    states = json.loads(excise("solve", gradients, "--remove-params", "45%", "--json")[1])["states"]
    assert min(len(s["removed"]) for s in states) == 3
    assert json.loads(excise("solve", gradients, "--remove", "45%", "--json")[1])["states"] == states
    code, _, err = excise("solve", gradients, "--remove", "45%", "--remove-params", "1000")
    assert code == 2
    assert "ask for two shares; give one" in err
    code, _, err = excise(*sublayers, "--remove", 3, "--kinds", "moe")
    assert code == 2
    assert "attention, feed-forward" in err


def test_queries_on_the_spectrum(excise, matrix):
    far = json.loads(excise("solve", "--hessian", matrix, "--remove", 3, "--choose", 2, "--by", "pearson", "--json")[1])
    assert len(far["states"]) == 2
    whole = json.loads(excise("solve", "--hessian", matrix, "--remove", 3, "--touching", -1, "--json")[1])
    first = next(k for k, s in enumerate(whole["states"]) if 7 in s["removed"])
    assert whole["first_touching"] == first
    assert "removed in (of 20 states)" in excise("solve", "--hessian", matrix, "--remove", 3)[1]


def test_prune_goes_from_folder_to_folder_and_from_gguf_to_gguf(excise, model, tmp_path):
    code, out, _ = excise("prune", model, "--removed", "1,-1", "--out", tmp_path / "small", "--no-self-test", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["removed"], facts["original_blocks"]) == ([1, 4], [0, 2, 3])
    assert facts["bytes"]["after"] < facts["bytes"]["before"]
    assert "self_test" not in facts
    write_gguf(tiny_model("llama", 3), tmp_path / "a.gguf")
    code, out, _ = excise("prune", tmp_path / "a.gguf", "--removed", 1, "--out", tmp_path / "b.gguf")
    assert code == 0
    assert "parameters" in out
    assert "with and without KV cache; logits differ by at most 0" in out
    code, _, err = excise("prune", model, "--removed", 1, "--out", tmp_path / "c.gguf")
    assert code == 2
    assert "a GGUF file is pruned from a GGUF file" in err


def test_a_spectrum_is_fast_enough_by_measured_times(excise, model, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "FEWEST", 1)
    monkeypatch.setattr(engines, "LONGEST", 0.0)
    gradients, place = tmp_path / "g.safetensors", tmp_path / "times.json"
    excise("score", model, "--samples", 40, "--tokens", 24, "--out", gradients)
    code, out, _ = excise("times", model, "--prompt-tokens", 8, "--new-tokens", 2, "--out", place)
    assert code == 0
    assert all(text in out for text in ("attention+feed-forward", "everything else", "whole model"))
    asked = ("solve", gradients, "--remove-latency", "5%", "--latency-of", "decode", "--json")
    code, out, _ = excise(*asked, "--times", place)
    found, weights = json.loads(out), Times.load(place).weights("decode")
    assert code == 0
    assert found["certified"]
    assert all(sum(weights.units[i] for i in s["removed"]) >= 0.05 * weights.whole for s in found["states"])
    code, _, err = excise(*asked)
    assert code == 2
    assert "run `excise times MODEL --out FILE`" in err
    code, _, err = excise(*asked, "--times", place, "--granularity", "sublayer")
    assert code == 2
    assert "times are those of whole blocks" in err
