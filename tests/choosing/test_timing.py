"""Times of blocks, by a clock that goes on where a block is run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from excise.choosing import engines
from excise.choosing.timing import block_kinds, kept_times, measure_times, predicted_and_measured
from excise.context import Context
from excise.evaluation import speed
from excise.ising.times import Latency, Request, Times
from excise.models.loading import Loaded, load
from excise.models.stack import find_stack
from excise.surgery.gguf import open_gguf
from tests.contexts import context_of
from tests.gguf_files import write_gguf
from tests.ising.test_weighing import times
from tests.tiny import tiny_model

SECONDS = {"mamba": 3.0, "moe": 2.0, "attention": 5.0}


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    """Clocks that are right at once need no more."""
    monkeypatch.setattr(engines, "FEWEST", 2)
    monkeypatch.setattr(engines, "LONGEST", 0.0)


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
    found = measure_times(context_of(clocked), Request(4, 2))
    for kind, block in zip(block_kinds(clocked), found.blocks, strict=True):
        # One attention block alone has a cache and cannot go, so it counts among the rest.
        seconds = 0.0 if kind == "attention" else SECONDS.get(kind, 0.0)
        assert (block.prefill, block.decode) == (pytest.approx(2 * seconds), pytest.approx(seconds))
    once = 1 + sum(SECONDS.get(block.kind, 0.0) for block in clocked.blocks)
    assert found.whole == Latency(2 * once - 1, once)
    assert (found.turns, found.error) == (engines.FEWEST, 0.0)
    removed = tuple(i for i, kind in enumerate(found.kinds) if kind == "moe")
    facts = predicted_and_measured(Loaded.of(clocked), removed, found)
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


def test_an_interrupted_run_keeps_its_times(tmp_path):
    context, place = context_of(find_stack(tiny_model("llama", 2))), tmp_path / "times.json"
    first = kept_times(context, Request(4, 2), "transformers", place)
    assert kept_times(context, Request(4, 2), "transformers", place) == first == Times.load(place)
    assert kept_times(context, Request(5, 2), "transformers", place).request == Request(5, 2)


def test_what_cannot_be_timed_here_is_predicted_alone_and_says_why():
    found = times((1.0, 3.0), engine="llama.cpp")
    with pytest.warns(UserWarning, match=r"speed was not measured: llama.cpp reads .gguf files"):
        facts = predicted_and_measured(Loaded.of(tiny_model("llama", 2)), (0,), found)
    assert facts["measured"] is None
    assert "llama.cpp reads" in facts["reason"]
    assert facts["predicted"]["decode"] == pytest.approx(5 / 4)


class Binding:
    """llama.cpp's binding by a clock of its own: two seconds a block to read, one to write."""

    __version__ = "1"

    class CommonParams:
        def __init__(self):
            self.model, self.cpuparams, self.cpuparams_batch = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()

    class Server:
        def __init__(self, parameters):
            self.blocks = int(open_gguf(Path(parameters.model.path)).fields["llama.block_count"].contents())

        def handle_completions(self, asked):
            assert len(asked["prompt"]) == 4
            return {
                "timings": {"prompt_ms": 2000.0 * self.blocks + 500, "predicted_per_token_ms": 1000.0 * self.blocks}
            }


def test_llama_cpp_is_timed_on_pruned_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", Binding)
    write_gguf(tiny_model("llama", 5), tmp_path / "model.gguf")
    loaded = load(str(tmp_path / "model.gguf"))
    found = measure_times(Context(loaded), Request(4, 3), "llama.cpp")
    assert found.whole == Latency(10.5, 5.0)
    assert all((block.prefill, block.decode) == pytest.approx((2.0, 1.0)) for block in found.blocks)
    facts = predicted_and_measured(loaded, (1, 2), found)
    assert facts["measured"] == pytest.approx(facts["predicted"])
    assert facts["measured_on"]["xllamacpp"] == "1"
