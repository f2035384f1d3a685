"""Times of blocks, by a clock that goes on where a block is run."""

import pytest

from excise.choosing import timing
from excise.choosing.timing import block_kinds, kept_times, measure_times, predicted_and_measured
from excise.evaluation import speed
from excise.ising.times import Latency, Request, Times
from excise.models.stack import find_stack
from tests.contexts import context_of
from tests.tiny import tiny_model

SECONDS = {"mamba": 3.0, "moe": 2.0, "attention": 5.0}


@pytest.fixture
def clocked(monkeypatch):
    """A Nemotron-H each of whose blocks takes the seconds of its kind a call, twice as many to read a prompt."""
    stack, clock = find_stack(tiny_model("nemotron_h")), [0.0]
    for block in stack.blocks:
        seconds = SECONDS.get(block.kind, 0.0)

        def run(module, arguments, seconds=seconds):
            clock[0] += seconds * (2 if arguments[0].shape[1] > 1 else 1)

        block.module.register_forward_pre_hook(run)
    # Norm, head and everything else.
    stack.model.register_forward_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 1))
    monkeypatch.setattr(speed, "_now", lambda prompt: clock[0])
    return stack


def test_what_blocks_take_is_found_kind_by_kind(clocked):
    times = measure_times(context_of(clocked), Request(4, 3))
    for kind, block in zip(block_kinds(clocked), times.blocks, strict=True):
        # One attention block alone has a cache and cannot go, so it counts among the rest.
        seconds = 0.0 if kind == "attention" else SECONDS.get(kind, 0.0)
        assert (block.prefill, block.decode) == (pytest.approx(2 * seconds), pytest.approx(seconds))
    once = 1 + sum(SECONDS.get(block.kind, 0.0) for block in clocked.blocks)
    assert times.whole == Latency(2 * once - 1, once)
    assert (times.turns, times.error) == (timing.FEWEST, 0.0)
    removed = tuple(i for i, kind in enumerate(times.kinds) if kind == "moe")
    facts = predicted_and_measured(clocked, removed, times)
    assert facts["predicted"] == pytest.approx(facts["measured"])
    assert facts["predicted"]["decode"] == pytest.approx(once / (once - 2 * len(removed)))


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("llama", {"attention+feed-forward": 6}),
        # Alike in their weights, and not in what they attend to.
        ("gemma3_text", {"attention+feed-forward": 4, "attention+feed-forward/2": 2}),
    ],
)
def test_blocks_of_one_kind_have_one_name(model_type, kinds):
    found = block_kinds(find_stack(tiny_model(model_type)))
    assert {kind: found.count(kind) for kind in found} == kinds


def test_an_interrupted_run_keeps_its_times(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    context, place = context_of(find_stack(tiny_model("llama", 2))), tmp_path / "times.json"
    first = kept_times(context, Request(4, 2), place)
    assert kept_times(context, Request(4, 2), place) == first == Times.load(place)
    assert kept_times(context, Request(5, 2), place).request == Request(5, 2)
