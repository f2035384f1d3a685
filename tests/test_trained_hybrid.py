"""The small trained hybrid: removal on a model of all kinds of blocks that means something."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from excise.context import Context
from excise.data import load_samples
from excise.ising.spectrum import Spectrum
from excise.measuring.measure import measure
from excise.measuring.score import score
from excise.measuring.sweep import sweeps
from excise.models.headers import read_checkpoint
from excise.models.loading import load
from excise.repair.measured import measure_repaired
from excise.repair.several import repair_removals, write_removal
from tests.contexts import context_of

PLACE = Path(__file__).parents[1] / "examples" / "tiny-hybrid"
MODEL, HELD_OUT = PLACE / "model", PLACE / "held_out.txt"
RECORD = json.loads((PLACE / "training.json").read_text())
MOE = [1, 3, 5, 7, 9, 11, 13, 16]


@pytest.fixture(scope="module")
def trained():
    return load(str(MODEL))


def windows(trained, samples):
    return load_samples(str(HELD_OUT), trained.tokenizer, samples=samples, tokens=128, seed=0)


def test_it_is_small_and_has_every_kind(trained):
    kinds = [block.kind for block in trained.stack.blocks]
    assert {kind: kinds.count(kind) for kind in kinds} == {"mamba": 5, "moe": 8, "attention": 2, "feed-forward": 2}
    assert [i for i, kind in enumerate(kinds) if kind == "moe"] == MOE
    parameters = sum(parameter.numel() for parameter in trained.stack.model.parameters())
    assert parameters == RECORD["parameters"] <= 3_000_000
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000


def test_its_loss_is_what_its_record_says_and_far_below_that_of_word_counts(trained):
    recorded = RECORD["held_out"]["prose"]
    samples = load_samples(str(HELD_OUT), trained.tokenizer, **recorded["drawn"])
    loss = measure(context_of(trained.stack), samples, [()]).loss()
    assert loss == pytest.approx(recorded["loss"], abs=5e-3)
    counts = np.bincount(np.concatenate([sample.input_ids for sample in samples])).astype(float)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()  # what no model without context goes below on this text
    assert loss < entropy - 1
    curve = [point for _, point in RECORD["training_loss"]["curve"]]
    assert curve[0] - curve[-1] > 1.5
    assert curve[-1] == pytest.approx(recorded["loss"], abs=0.7)


def test_every_block_matters_and_each_in_its_own_measure(trained):
    singles = [(i,) for i in range(len(trained.stack.blocks))]
    measured = measure(context_of(trained.stack), windows(trained, 12), [(), *singles])
    rises = measured.losses[1:] - measured.losses[0]
    assert (rises > 0).all()
    assert rises.max() > 10 * rises.min()
    assert np.std(np.log(rises)) > 0.5
    moe = rises[MOE]
    assert moe.max() > 2 * moe.min()


def test_experts_alone_from_score_to_self_test(excise, tmp_path):
    gradients, spectrum, out = tmp_path / "gradients.safetensors", tmp_path / "spectrum.json", tmp_path / "out"
    data = ("--data", HELD_OUT, "--samples", 40, "--tokens", 48)
    assert excise("score", MODEL, *data, "--out", gradients)[0] == 0
    assert excise("solve", gradients, "--kinds", "moe", "--remove", 2, "--out", spectrum)[0] == 0
    found = Spectrum.load(spectrum)
    assert found.certified
    assert len(found) == 20
    assert {i for state in found for i in state.removed} <= set(MOE)
    status, printed, _ = excise("prune", MODEL, "--spectrum", spectrum, "--out", out, "--json")
    assert status == 0
    report = json.loads(printed)["self_test"]
    assert (report["level"], report["loads_in_stock_transformers"], report["cache_agrees"]) == ("generates", True, True)
    assert report["tokenizer_loads"]
    assert report["max_abs_logit_difference"] < 1e-4 * report["max_abs_logit"]
    config = json.loads((out / "config.json").read_text())
    assert config["layers_block_type"].count("moe") == 6
    assert len(config["layers_block_type"]) == 15
    left = {tensor.name for tensor in read_checkpoint(out).tensors}
    assert not any(name.split(".")[2] in ("15", "16") for name in left if ".layers." in name)


def test_what_is_left_is_still_a_language_model(trained):
    samples = windows(trained, 12)
    context = context_of(trained.stack)
    cheapest = min(MOE, key=lambda i: measure(context, samples[:4], [(i,)]).loss((i,)))
    assert measure(context, samples, [(cheapest,)]).loss((cheapest,)) < math.log(trained.stack.config.vocab_size) - 1


@pytest.mark.slow
def test_it_is_streamed_as_it_is_in_memory(trained, tmp_path):
    both = {"resident": trained, "streamed": load(str(MODEL), placement="streamed")}
    assert sweeps(both["streamed"].stack)
    samples, removals = windows(trained, 12), [(3,), (4, 5), (7, 10), (9, 14, 15)]
    fitting, judging = samples[:8], samples[8:]
    seen: dict[str, list[np.ndarray]] = {}
    written = {}
    for name, loaded in both.items():
        context = Context(loaded, batch_tokens=512)
        gradients = score(context, judging)
        seen[name] = [gradients.A / np.abs(gradients.A).max(), gradients.losses]
        for statistic in ("loss", "divergence"):
            seen[name].append(measure(context, judging, removals, statistic=statistic).losses)
            seen[name].append(measure_repaired(context, fitting, judging, removals, statistic=statistic).losses)
        repairs = repair_removals(context, [(7, 10)], fitting, judging)
        write_removal(loaded, (7, 10), repairs, tmp_path / name)
        written[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
    for resident, streamed in zip(*seen.values(), strict=True):
        np.testing.assert_allclose(streamed, resident, rtol=1e-6, atol=1e-6)
    assert written["streamed"] == written["resident"]
